"""How fast an engine generates: seconds, memory, and where the time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from continuar.cuda_graphs import Clock
from continuar.sampling.engines import Engine
from continuar.sampling.fast.engine import FastEngine
from continuar.sampling.generate import SamplingInput, SamplingOptions


@dataclass(frozen=True)
class Speed:
    """Of one batch of images.

    Attributes:
        images: in the batch.
        warmup_seconds: of the first generation, in which graphs are captured and kernels compiled.
        seconds: of each later one.
        peak_bytes: of memory that PyTorch held at once on a GPU, warm-up included; None on a CPU.
        parts: mean seconds of "transformer" and "head" in a later one; empty where the engine has no clock.
    """

    images: int
    warmup_seconds: float
    seconds: tuple[float, ...]
    peak_bytes: int | None
    parts: dict[str, float]

    @property
    def seconds_per_image(self) -> float:
        """Of the fastest generation."""
        return min(self.seconds) / self.images

    def share(self, part: str) -> float:
        """Of a generation's time."""
        return self.parts.get(part, 0.0) * len(self.seconds) / sum(self.seconds)


def measure(engine: Engine, start: SamplingInput, options: SamplingOptions, repeats: int = 2) -> Speed:
    """Generates ``start`` once to warm up and ``repeats`` times for the clock."""
    device = start.seeds_B.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warmup = _run(engine, start, options)
    clock = Clock(device)
    if isinstance(engine, FastEngine):
        engine.clock = clock
    seconds = [_run(engine, start, options) for _ in range(repeats)]
    parts = {part: spent / repeats for part, spent in clock.read().items()}
    if isinstance(engine, FastEngine):
        engine.clock = None
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Speed(len(start.seeds_B), warmup, tuple(seconds), peak, parts)


def _run(engine: Engine, start: SamplingInput, options: SamplingOptions) -> float:
    _wait(start.seeds_B.device)
    began = time.perf_counter()
    for _ in engine.stream(start, options):
        pass
    _wait(start.seeds_B.device)
    return time.perf_counter() - began


def matmul_peak(device: torch.device, repeats: int = 10) -> float:
    """FLOP/s of a large matrix product: bfloat16 8192^3 on a GPU, float32 1024^3 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    _wait(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
