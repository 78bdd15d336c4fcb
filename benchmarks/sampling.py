"""Seconds per image of the paper's models with the fast engine, beside the floor; and that it equals the eager one.

    python benchmarks/sampling.py --out benchmarks/results                        the speed table
    python benchmarks/sampling.py --equality --out benchmarks/results             images against the eager engine's
    python benchmarks/sampling.py --only B1 --kernels plain triton --profile      one case, both kinds of kernels, where time goes

Random weights (the time does not depend on what they are), tokens of 16 x 16 x 16, guidance 3.0 linear, 100 diffusion steps. The
floor is the model's FLOPs over an 8192^3 bf16 matrix product measured in the same run. Cases go in order of importance, as many as
the time budget allows; results are written after each. A case that fails is shown with its traceback, and the next one follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_times import kernel_table

from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models import BackboneConfig, CausalConfig, MAEConfig
from continuar.models.autoregressive import Model, ModelConfig
from continuar.orders import MAROrderConfig, RasterOrderConfig
from continuar.pipeline import make_engine, to_uint8
from continuar.sampling import generate as eager
from continuar.sampling.fast.engine import FastEngine
from continuar.sampling.fast.kernels import Kernels
from continuar.sampling.generate import make_plan
from continuar.sampling.memory import bytes_per_image
from continuar.sampling.options import SamplingOptions
from continuar.sampling.speed import GenerationSpeed, matmul_peak, measure_speed
from continuar.tokenizers import LatentConfig
from continuar.tokenizers.vae import NAMED
from continuar.training.estimate import generation_flops

SIZES = {
    "B": MAEConfig(width=768, encoder_depth=12, heads=12, decoder_depth=12),
    "L": MAEConfig(width=1024, encoder_depth=16, heads=16, decoder_depth=16),
    "H": MAEConfig(width=1280, encoder_depth=20, heads=16, decoder_depth=20),
    "AR-L": CausalConfig(width=1024, depth=32, heads=16),
    "tiny": MAEConfig(width=32, encoder_depth=1, heads=2, decoder_depth=1, buffer=4),
}


@dataclass(frozen=True)
class Case:
    """A row of the table. ``required`` and ``aim`` are seconds per image on one H200; ``about`` is how many seconds it may take."""

    size: str
    depth: int
    width: int
    steps: int | None
    batch: int
    required: float | None = None
    aim: float | None = None
    about: float = 60.0
    diffusion_steps: int = 100

    @property
    def title(self) -> str:
        return f"{self.size}, head {self.depth}x{self.width}, {self.steps or 256} steps, batch {self.batch}"

    def model(self, device: torch.device) -> Model:
        order = RasterOrderConfig() if isinstance(SIZES[self.size], CausalConfig) else MAROrderConfig()
        head = DiffusionHeadConfig(width=self.width, depth=self.depth)
        return build(SIZES[self.size], order, head, device)

    def options(self) -> SamplingOptions:
        return SamplingOptions(
            steps=self.steps,
            guidance_scale=3.0,
            head=DiffusionOptions(diffusion_steps=self.diffusion_steps),
            guidance_schedule="linear",
        )


CASES = {
    "B1": Case("L", 3, 1024, 64, 1, 0.40, 0.20, 40),
    "B256": Case("L", 8, 1280, 64, 256, 0.068, 0.055, 90),
    "base": Case("B", 6, 1024, 64, 256, 0.031, 0.026, 50),
    "huge": Case("H", 12, 1536, 64, 128, 0.13, 0.11, 70),
    "B8": Case("L", 8, 1280, 64, 8, 0.20, 0.12, 40),
    "AR": Case("AR-L", 3, 1024, None, 8, None, None, 90),
    "256 steps": Case("L", 8, 1280, 256, 256, 0.25, 0.20, 220),
    "smoke": Case("tiny", 2, 64, 4, 2, None, None, 5, 5),
}
TABLE = [name for name in CASES if name != "smoke"]


def triton_kernels(few_rows: int | None = None, **launch: Any) -> Kernels:
    from continuar.sampling.fast.triton_kernels import MAX_SMALL_ROWS, Launch, TritonKernels

    return TritonKernels(MAX_SMALL_ROWS if few_rows is None else few_rows, Launch(**launch) if launch else None)


KERNELS: dict[str, Callable[[], Kernels]] = {
    "plain": Kernels,
    "triton": triton_kernels,
    "triton-rows": lambda: triton_kernels(0),
    "triton-apart": lambda: triton_kernels(dependent=False),
    "triton-8": lambda: triton_kernels(dependent=True, columns=8),
}
"""Plain; fused, as the engine chooses; without the step for few rows; with it, each launch waiting for the one before to end; with
programs of 8 columns instead of 16."""


def build(backbone: BackboneConfig, order: Any, head: DiffusionHeadConfig, device: torch.device) -> Model:
    """A model of random weights, none of which are zero: what a GPU may clock at depends on the numbers."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ModelConfig(LatentConfig().spec, 1000, order, backbone, head).build().eval().requires_grad_(False)
        for parameter in model.head.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def start_of(model: Model, batch: int, device: torch.device, known: int = 0) -> eager.SamplingInput:
    seeds = torch.arange(batch, device=device)
    start = eager.SamplingInput.blank(model.config.tokens, seeds, seeds % 1000)
    if known:
        start.tokens.normal_()
        start.known_BN[:, :known] = True
    return start


def run_case(case: Case, kind: str, precision: Any, peak: float, device: torch.device, repeats: int) -> dict[str, Any]:
    """One case as a row of the results."""
    model, options = case.model(device), case.options()
    start = start_of(model, case.batch, device)
    engine = FastEngine(model, precision, kernels=KERNELS[kind](), strict=True)
    speed = measure_speed(engine, start, options, repeats)
    floor = generation_flops(model.config, options) / peak
    assert options.head is not None
    plan = make_plan(model.order, options, model.order.seq_len)
    estimate = bytes_per_image(model, plan, options.head, 2, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return {
        "case": case.title,
        "kernels": kind,
        "precision": precision,
        "seconds_per_image": speed.seconds_per_image,
        "spread": max(speed.seconds) / min(speed.seconds) - 1,
        "floor": floor,
        "required": case.required,
        "aim": case.aim,
        "head": speed.share("head"),
        "transformer": speed.share("transformer"),
        "warmup_seconds": speed.warmup_seconds,
        "peak_gib": (speed.peak_bytes or 0) / 2**30,
        "estimated_batch_gib": estimate * case.batch / 2**30,
        **_per_call(case, speed),
    }


def _per_call(case: Case, speed: GenerationSpeed) -> dict[str, float]:
    """Mean time of the head per diffusion step and of the transformer per autoregressive step, in microseconds."""
    steps = case.steps or 256
    return {
        "us_per_diffusion_step": 1e6 * speed.parts.get("head", 0.0) / steps / case.diffusion_steps,
        "us_per_transformer_step": 1e6 * speed.parts.get("transformer", 0.0) / steps,
    }


def equality(device: torch.device) -> Iterator[dict[str, Any]]:
    """Largest differences between the engines on a model of middling size; bf16 on one autoregressive step, as chains amplify."""
    head = DiffusionHeadConfig(width=512, depth=3, prediction="v_prediction")
    mae = MAEConfig(width=256, encoder_depth=4, heads=8, decoder_depth=4)
    families = (
        ("MAR", mae, MAROrderConfig(), 16),
        ("AR, kv-cache", CausalConfig(width=256, depth=8, heads=8), RasterOrderConfig(), None),
    )
    for name, backbone, order, steps in families:
        model = build(backbone, order, head, device)
        exact, low = (FastEngine(model, precision, strict=True) for precision in ("float32", "bfloat16"))
        for batch in (1, 8, 256):
            for guidance in (1.0, 3.0):
                for known in (0, 100):
                    options = SamplingOptions(steps=steps, guidance_scale=guidance, head=DiffusionOptions(diffusion_steps=25))
                    start = start_of(model, batch, device, known)
                    truth = eager.generate(model, start, options)
                    first, again = (exact.generate(start, options) for _ in range(2))
                    # After one step from the same known tokens: what bf16 does to z, seen in the tokens drawn from it.
                    step, coarse = (next(iter(e.stream(start, options))).tokens for e in (exact, low))
                    drawn = step.ne(start.tokens) & step.ne(0)
                    yield {
                        "model": name,
                        "batch": batch,
                        "guidance_scale": guidance,
                        "known": known,
                        "float32_largest": (first - truth).abs().max().item(),
                        "float32_replayed_largest": (again - truth).abs().max().item(),
                        "equal": bool(max((first - truth).abs().max(), (again - truth).abs().max()) < 1 / 255),
                        "bf16_step_relative": ((coarse - step)[drawn].norm() / step[drawn].norm()).item(),
                    }


def decoder_row(batch: int, low: bool, device: torch.device) -> dict[str, Any]:
    """Decoding by KL-16 of the paper's architecture, which comes on top; 64 images at a time, as the pipeline does it."""
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = NAMED["kl16_mar"].build().eval().requires_grad_(False)
    tokens, seconds = torch.randn(batch, 256, 16, device=device), []
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for part in tokens.split(64):
                to_uint8(tokenizer.decode(part)).cpu()
            seconds.append(time.perf_counter() - began)
    return {"batch": batch, "precision": "bfloat16" if low else "float32", "decoder_seconds_per_image": min(seconds) / batch}


def profile_case(case: Case, kind: str, precision: Any, device: torch.device) -> str:
    """The kernels of one warm generation, per image."""
    model = case.model(device)
    engine, start, options = (
        FastEngine(model, precision, kernels=KERNELS[kind](), strict=True),
        start_of(model, case.batch, device),
        case.options(),
    )
    engine.generate(start, options)
    return f"{case.title}: {kernel_table(lambda: engine.generate(start, options), case.batch, 'image')}"


def line(row: dict[str, Any]) -> str:
    goals = f"required {row['required']}, aim {row['aim']}" if row["required"] else ""
    return (
        f"{row['case']:<38} {row['precision']:<8} {row['kernels']:<14} {row['seconds_per_image']:.4f} s/image ±{row['spread']:.1%} "
        f"floor {row['floor']:.4f}  {goals}  head {row['head']:.0%} ({row['us_per_diffusion_step']:.0f} us/step) "
        f"transformer {row['transformer']:.0%}  {row['peak_gib']:.1f} GiB (batch est. {row['estimated_batch_gib']:.1f})  "
        f"warm-up {row['warmup_seconds']:.0f} s"
    )


def markdown(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A table of all that the rows hold."""
    text = ["# Sampling", "", ", ".join(f"{k} {v}" for k, v in header.items()), ""]
    if rows:
        keys = list(rows[0])
        text += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        text += ["| " + " | ".join(_cell(r[k]) for k in keys) + " |" for r in rows]
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def write(out: Path | None, header: dict[str, Any], name: str, rows: list[dict[str, Any]]) -> None:
    """OUT/NAME.json and OUT/NAME.md."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(markdown(header, rows), encoding="utf-8")


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def eager_row(case: Case, device: torch.device) -> str:
    """The eager engine on the same machine, float32 with TF32 products, one generation after a short one."""
    model, options = case.model(device), case.options()
    start, engine = start_of(model, case.batch, device), make_engine(model, "eager")
    torch.set_float32_matmul_precision("high")
    measure_speed(engine, start, options.for_head(model.config.head).override(diffusion_steps=2), 1)
    began = time.perf_counter()
    for _ in engine.stream(start, options):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    torch.set_float32_matmul_precision("highest")
    return f"{case.title:<38} eager engine {(time.perf_counter() - began) / case.batch:.3f} s/image"


def speed_table(options: argparse.Namespace, header: dict[str, Any], peak: float, began: float) -> list[str]:
    """Measures the cases, as many as there is time for; returns those that failed."""
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for which in options.only:
        case = CASES[which]
        for kind in options.kernels:
            left = options.budget - (time.perf_counter() - began)
            if left < case.about:
                print(f"{case.title}: not begun, {left:.0f} s are left and it may take {case.about:.0f}", flush=True)
                continue
            try:
                rows.append(run_case(case, kind, options.precision, peak, device, options.repeats))
                print(line(rows[-1]), flush=True)
                write(options.out, header, "sampling", rows)
                free()
                if options.profile and device.type == "cuda":
                    print(profile_case(case, kind, options.precision, device), flush=True)
            except Exception:  # shown, and said at the end; the next case may work
                traceback.print_exc()
                failed.append(f"{which} with {kind}")
            free()
        try:
            if options.eager and options.budget - (time.perf_counter() - began) > case.about:
                print(eager_row(case, device), flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(f"{which} with the eager engine")
        free()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=TABLE)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=["triton"])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no case is begun")
    parser.add_argument("--equality", action="store_true", help="compare images with the eager engine's instead")
    parser.add_argument("--decoder", action="store_true", help="time KL-16's decoder instead")
    parser.add_argument("--eager", action="store_true", help="time the eager engine too")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take the time (CUDA)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    device, began = torch.device(options.device), time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = matmul_peak(device)
    header = {"device": name, "torch": torch.__version__, "peak TFLOP/s": round(peak / 1e12, 2), "commit": commit()}
    print(header, flush=True)
    if options.equality:
        compared: list[dict[str, Any]] = []
        for row in equality(device):
            compared.append(row)
            print(json.dumps(row), flush=True)
            write(options.out, header, "sampling_equality", compared)
        unequal = [row for row in compared if not row["equal"]]
        if unequal:
            raise SystemExit(f"{len(unequal)} of {len(compared)} are not equal")
        return
    if options.decoder:
        decoded = [decoder_row(batch, low, device) for low in (False, True) for batch in (1, 8, 128, 256)]
        print("\n".join(map(json.dumps, decoded)), flush=True)
        write(options.out, header, "sampling_decoder", decoded)
        return
    failed = speed_table(options, header, peak, began)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
