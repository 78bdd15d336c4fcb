"""The speed of an engine: seconds per generation, memory, and the time of each part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from continuar.cuda_graphs import Clock
from continuar.sampling.fast.engine import FastEngine
from continuar.sampling.generate import SamplingEngine, SamplingInput
from continuar.sampling.options import SamplingOptions


@dataclass(frozen=True)
class GenerationSpeed:
    """Measurements of one batch.

    Attributes:
        images: in the batch.
        warmup_seconds: the first generation, in which graphs are captured and kernels compiled.
        seconds: each later generation.
        peak_bytes: memory that PyTorch reserved on a GPU at most, warm-up included; None on a CPU.
        parts: mean seconds of "transformer" and "head" per later generation; empty if the engine has no clock.
    """

    images: int
    warmup_seconds: float
    seconds: tuple[float, ...]
    peak_bytes: int | None
    parts: dict[str, float]

    @property
    def seconds_per_image(self) -> float:
        """Seconds per image of the fastest generation."""
        return min(self.seconds) / self.images

    def share(self, part: str) -> float:
        """The part's share of a generation's time, 0..1."""
        return self.parts.get(part, 0.0) * len(self.seconds) / sum(self.seconds)


def measure_speed(engine: SamplingEngine, inputs: SamplingInput, options: SamplingOptions, repeats: int = 2) -> GenerationSpeed:
    """Generates a batch once to warm up, then ``repeats`` times for the measurement."""
    device = inputs.seeds_B.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def run() -> None:
        for _ in engine.stream(inputs, options):
            pass

    warmup, clock = timed(run, device), Clock(device)
    if isinstance(engine, FastEngine):
        engine.clock = clock
    seconds = tuple(timed(run, device) for _ in range(repeats))
    parts = {part: spent / repeats for part, spent in clock.read().items()}
    if isinstance(engine, FastEngine):
        engine.clock = None
    peak = torch.cuda.max_memory_reserved(device) if cuda else None
    return GenerationSpeed(len(inputs.seeds_B), warmup, seconds, peak, parts)


def matmul_peak(device: torch.device, repeats: int = 10) -> float:
    """FLOP/s of a large matrix product: bfloat16 8192^3 on a GPU, float32 1024^3 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b)

    run(3)  # the first product loads the library and picks a kernel
    return 2 * size**3 * repeats / timed(lambda: run(repeats), device)


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, including the work that it queues on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
