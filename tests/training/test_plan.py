"""What a run costs: counted against real tensors and against what was measured."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from continuar.cli.main import main
from continuar.distributed import GIB
from continuar.errors import UserError
from continuar.models.autoregressive import Model, ModelConfig
from continuar.orders import View
from continuar.recipes import RECIPES
from continuar.training.config import Run
from continuar.training.estimate import AsOnGPU, Machine, Memory, activations, estimate_run, out_of_memory, saved
from continuar.training.step import TrainStep
from continuar.training.trainer import train
from tests.tiny import model_configs, name, random_tokens, tiny_run, write_images


def on_meta(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return config.build()


def really_saved(config: ModelConfig, batch: int, queried: int, bf16: bool) -> int:
    """Bytes of the storages that a real forward pass on the CPU saves, under real autocast."""
    model, found = config.build().train(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    view = View(torch.rand(batch, config.tokens.seq_len).argsort(1), config.tokens.seq_len - queried)
    inputs = random_tokens(config, batch, 0), torch.zeros(batch, dtype=torch.int64), view
    with saved_tensors_hooks(pack, lambda t: t), AsOnGPU(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(*inputs, 0.1).mean()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss.requires_grad
    return sum(s.nbytes() for key, s in found.items() if key not in weights)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("config", model_configs(), ids=name)
def test_what_is_counted_on_the_meta_device_is_what_real_tensors_take(config: ModelConfig, bf16: bool) -> None:
    queried = config.tokens.seq_len if config.backbone.kind == "causal" else 12
    assert saved(on_meta(config), 3, queried, bf16)[0] == really_saved(config, 3, queried, bf16)


def test_activations_are_linear_in_the_batch_and_take_the_larger_extreme() -> None:
    model = on_meta(model_configs()[0])
    found = activations(model, bf16=True)
    extremes = [saved(model, 3000, queried, True)[0] for queried in (12, 16)]
    assert 3000 * found.per_image + found.copies == pytest.approx(max(extremes))
    timeless = next(config for config in model_configs() if config.head.kind == "flow")  # embeds no table of timesteps
    assert activations(on_meta(timeless), bf16=False).copies == 0


def test_recomputed_blocks_leave_their_inputs_and_one_block() -> None:
    config = next(c for c in model_configs() if c.backbone.kind == "causal" and c.order.kind == "raster")
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, attention_dropout=0.0))
    batch, positions, width = 3, config.tokens.seq_len, config.backbone.width

    def count(depth: int, activation_checkpointing: bool) -> int:
        deeper = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, depth=depth))
        return saved(on_meta(deeper), batch, positions, False, activation_checkpointing)[0]

    block_input = 4 * batch * positions * width
    assert count(6, True) - count(2, True) == 4 * block_input
    one_block = (count(6, False) - count(2, False)) / 4
    # Of six blocks one is left in full, and of the others their inputs; what is saved outside of blocks is in both.
    assert count(6, False) - count(6, True) == pytest.approx(5 * (one_block - block_input), rel=0.01)
    assert one_block > 10 * block_input


def test_recomputing_is_planned_as_less_memory_and_at_most_a_third_more_work() -> None:
    run = RECIPES["mar_b_imagenet256"]()
    again = dataclasses.replace(run, train=dataclasses.replace(run.train, activation_checkpointing=True))
    plain, less = (estimate_run(r, 1000, Machine(gpus=8)) for r in (run, again))
    assert less.memory["ddp"].per_image < 0.7 * plain.memory["ddp"].per_image
    assert less.memory["ddp"].parts == plain.memory["ddp"].parts
    assert 1.1 < less.flops_per_image / plain.flops_per_image < 4 / 3


MEASURED = [json.loads(line) for line in (Path(__file__).parents[2] / "benchmarks/results/memory.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("result", MEASURED, ids=lambda r: f"{r['recipe']}-{r['engine']}-{r['diffusion_batch_mul']}")
def test_memory_is_within_a_tenth_of_what_was_measured(result: dict) -> None:
    run = RECIPES[result["recipe"]]()
    run = dataclasses.replace(
        run,
        head=dataclasses.replace(run.head, diffusion_batch_mul=result["diffusion_batch_mul"]),
        train=dataclasses.replace(run.train, batch_size=result["batch_size"], engine="eager"),
    )
    memory = estimate_run(run, run.data.classes, Machine()).memory["ddp"]
    assert memory.total(result["batch_size"]) / GIB == pytest.approx(result["peak_memory_gib"], rel=0.1)


def test_parts_follow_their_closed_forms() -> None:
    run = RECIPES["cifar10"]()
    kept = ("weights", "gradients", "optimizer", "averages")
    for gpus in (1, 64):
        plan = estimate_run(run, 10, Machine(gpus=gpus))
        p = plan.parameters
        assert p == pytest.approx(7.86e6, rel=1e-3)
        assert [plan.memory["ddp"].parts[k] / p for k in kept] == [4, 4, 8, 4]
        assert [plan.memory["fsdp"].parts[k] * gpus / p for k in kept] == pytest.approx([4, 4, 8, 4])
        assert plan.network["ddp"] == pytest.approx(8 * p * (gpus - 1) / gpus)
        assert plan.micro_batch * plan.accumulated * gpus == 512
        done = plan.days * 86_400 * gpus * 989e12 * 0.4
        assert done == pytest.approx(run.train.steps * 512 * plan.flops_per_image)
    with_averages = dataclasses.replace(run, ema=dataclasses.replace(run.ema, snapshot_images=1))
    assert estimate_run(with_averages, 10, Machine()).memory["ddp"].parts["averages"] == 12 * p
    halves = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=32))
    plan = estimate_run(halves, 10, Machine(gpus=8))
    assert (plan.micro_batch, plan.accumulated) == (32, 2)
    assert plan.network["ddp"] == pytest.approx(7 * p)


def test_graphs_hold_one_set_of_activations_their_inputs_and_gradients() -> None:
    run = RECIPES["cifar10"]()

    def ddp(run: Run, **train: Any) -> Memory:
        return estimate_run(dataclasses.replace(run, train=dataclasses.replace(run.train, **train)), 10, Machine()).memory["ddp"]

    eager, graphs = ddp(run, engine="eager"), ddp(run, engine="graphs")
    inputs = 512 * (64 * 48 * 4 + 8 + 64 * 8)
    assert graphs.per_image == eager.per_image
    assert graphs.parts["copies of weights"] == eager.parts["copies of weights"]
    assert graphs.parts["inputs and gradients of graphs"] == eager.parts["gradients"] + inputs
    accumulating = ddp(run, engine="graphs", micro_batch=128).parts["inputs and gradients of graphs"]
    assert accumulating == eager.parts["gradients"] + inputs / 4


@given(st.floats(0.1, 100), st.integers(1, 64))
def test_the_micro_batch_that_fits_is_the_largest_divisor_that_does(gib: float, share: int) -> None:
    memory = Memory({"weights": 10.0 * GIB}, per_image=1.0 * GIB)
    fits, capacity = memory.fits(gib, share), 0.92 * gib * GIB
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    assert fits == max((size for size in divisors if memory.total(size) <= capacity), default=0)


def test_plan_prints_parts_and_advice(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "mar_b_imagenet256", "--gpus", "8", "--dataset-images", "1281167"]) == 0
    out = capsys.readouterr().out
    assert "207.92 M" in out
    assert "39.1 GiB for 1,281,167 images (a cache of latents on disk)" in out
    rows = dict(re.findall(r"^  (.*?)  +([\d.]+ +[\d.]+)$", out, re.MULTILINE))
    ddp, fsdp = zip(
        *([float(x) for x in row.split()] for key, row in rows.items() if key not in ("total", "sent per step, and received")),
        strict=True,
    )
    total = [float(x) for x in rows["total"].split()]
    assert [sum(ddp), sum(fsdp)] == pytest.approx(total, abs=0.05)
    assert "ddp    does not fit into 92% of 80 GiB; it does with --train.micro-batch 128" in out
    assert main(["plan", "mar_kl_cifar10"]) == 0  # mean and log variance, in bfloat16, of image and mirror image
    spec = RECIPES["mar_kl_cifar10"]().tokenizer.spec
    assert f"{spec.seq_len * spec.dim * 2 * 2 * 2:,} bytes per image (a cache of latents on disk)" in capsys.readouterr().out
    assert main(["plan", "digits"]) == 0
    assert "ddp    fits into 92% of 80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits", "--gpus", "0"], "gpus is 0; allowed: 1 or more"),
        (["digits", "--gpus", "3"], "3 processes for a batch of 64; allowed: a number of processes that divides it"),
        (["digits", "--gpus", "2", "--train.micro-batch", "64"], "train.micro_batch is 64; allowed: a divisor of 32"),
        (["digits", "--utilisation", "1.5"], "utilisation is 1.5; allowed: above 0 to 1"),
        (["digits", "--gpu-memory", "-1"], "gpu_memory is -1.0; allowed: above 0"),
        (["digits", "--dataset-images", "-1"], "--dataset-images is -1; allowed: 0 or more"),
        (["digit"], "did you mean digits"),
        (["--gpus", "8"], "the recipe comes first"),
    ],
)
def test_plan_refuses_bad_values(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_out_of_memory_names_the_micro_batch_that_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = str(out_of_memory(RECIPES["mar_b_imagenet256"](), 1000, 8, "ddp", 80.0))
    assert line.startswith(
        "out of memory with micro-batches of 256; by the estimate of `continuar plan`, 128 fit into 92% of 80 GiB"
    )

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainStep, "__call__", fail)
    with pytest.raises(UserError, match=r"out of memory with micro-batches of 8; try --train.micro-batch 4"):
        train(tiny_run(write_images(tmp_path / "data")), tmp_path / "run", device=torch.device("cpu"))
