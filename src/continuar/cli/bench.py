"""``continuar bench sample MODEL|RECIPE``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from continuar.checkpoints.store import PipelineConfig
from continuar.cli.common import Autoencoder, Device, SamplingSettings, add_tokenizer, at_least, load_pipeline
from continuar.distributed import pick_device
from continuar.errors import unknown_name
from continuar.pipeline import Pipeline, shipped_models
from continuar.recipes import RECIPES
from continuar.sampling.generate import SamplingInput, make_plan
from continuar.sampling.speed import GenerationSpeed, matmul_peak, measure_speed
from continuar.tokenizers import LatentTokenizer, PixelConfig
from continuar.training.config import BaseRun
from continuar.training.estimate import generation_flops


@dataclass(frozen=True)
class Options:
    """Options of `continuar bench sample`."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="MODEL|RECIPE",
            help="A run directory, a saved model, the name of a shipped model or of a recipe, or an official MAR checkpoint file.",
        ),
    ]
    batch: tuple[int, ...] = (1, 8)
    """Batch sizes to measure; each gives one row."""
    settings: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(default_factory=SamplingSettings)
    tokenizer: Autoencoder = None
    repeats: int = 2
    """Timed generations per batch size, after one that warms up."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Measure how fast images are generated here.

    One row per batch size: seconds per image, memory, the shares of transformer, head and decoder, and the distance from the floor.
    The floor is the time of the model's FLOPs at the speed of one large matrix product, measured in the same run (bfloat16 on a
    GPU, float32 on a CPU). A recipe is measured with random weights: its images are noise, its time is the same. A model of latents
    is measured without decoding if no --tokenizer is given.
    """
    at_least(1, repeats=options.repeats)
    for size in options.batch:
        at_least(1, batch=size)
    pipe = _pipeline(options.model, options.tokenizer, options.device)
    settings = pipe.defaults.override(**options.settings.given())
    plan = make_plan(pipe.model.order, settings, pipe.model.order.seq_len)
    engine = pipe.engine(options.settings.engine, options.settings.precision)
    guided = bool(pipe.classes) and settings.guidance_scale != 1.0
    peak = matmul_peak(pipe.device)
    floor = generation_flops(pipe.config.model, settings if guided else settings.override(guidance_scale=1.0)) / peak
    print(f"{options.model} on {_name(pipe.device)}, torch {torch.__version__}, {len(plan)} steps, {_head(settings.to_dict())}")
    print(f"floor {floor:.3g} s/image: {floor * peak / 1e12:.3g} TFLOP at {peak / 1e12:.3g} TFLOP/s\n")
    print("batch   s/image  images/s  x floor  transformer   head  decoder     memory  warm-up")
    for size in options.batch:
        seeds = torch.arange(size, device=pipe.device)
        start = SamplingInput.blank(pipe.config.model.tokens, seeds, seeds % len(pipe.classes) if pipe.classes else None)
        speed = measure_speed(engine, start, settings, options.repeats)
        print(_row(speed, floor, _decoding(pipe, start.tokens)), flush=True)


def _row(speed: GenerationSpeed, floor: float, decoding: float | None) -> str:
    """One batch size; ``decoding`` in seconds per batch, which comes on top of the generation's."""
    generating = min(speed.seconds)
    total = generating + (decoding or 0.0)
    shares = [speed.share(part) * generating / total if speed.parts else None for part in ("transformer", "head")]
    shares.append(None if decoding is None else decoding / total)
    shown = ["-" if share is None else f"{share:.0%}" for share in shares]
    memory = "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**30:.2f} GiB"
    each = total / speed.images
    cells = f"{shown[0]:>12} {shown[1]:>6} {shown[2]:>8} {memory:>10}  {speed.warmup_seconds:.1f} s"
    return f"{speed.images:>5} {each:>9.4f} {1 / each:>9.2f} {each / floor:>8.1f} {cells}"


def _decoding(pipe: Pipeline, tokens: torch.Tensor) -> float | None:
    """Seconds to decode a batch of tokens to pixels; None without a decoder."""
    if isinstance(pipe.tokenizer, LatentTokenizer):
        return None
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        pipe.decode(tokens, len(tokens))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _pipeline(name: str, tokenizer: str | None, device: str) -> Pipeline:
    """A model, or a recipe's with random weights."""
    if name in shipped_models() or Path(name).exists():
        return load_pipeline(name, tokenizer, weights="ema", device=device, tokens_only=True)
    if name not in RECIPES:
        raise unknown_name("model or recipe", name, dict.fromkeys((*shipped_models(), *RECIPES)))
    pipe = _random(RECIPES[name](), device)
    add_tokenizer(pipe, name, tokenizer, needed=False)
    return pipe


def _random(run: BaseRun, device: str) -> Pipeline:
    classes, tokenizer = run.data.classes or 10, run.tokenizer
    if isinstance(tokenizer, PixelConfig):
        tokenizer = replace(tokenizer, std=tokenizer.std or 0.5)  # measured on images, in training
    torch.manual_seed(0)
    with torch.device(pick_device(device)):
        model = run.model_config(classes).build()
    return Pipeline(PipelineConfig(model.config, tokenizer, tuple(map(str, range(classes))), run.sampling), model)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def _head(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "steps" and value is not None)
