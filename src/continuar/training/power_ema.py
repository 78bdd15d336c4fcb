"""Averages whose length is chosen after training (Karras et al. 2024, "EDM2", arXiv 2312.02696, Section 3).

1. A power-function average of exponent gamma weighs the weights of time tau in [0, t] by
   p(tau) = (gamma + 1) tau^gamma/t^(gamma + 1). Its *length* is the standard deviation of p relative to t: it grows with training,
   and initial weights vanish.
2. Training keeps two of them, updated by average += (1 - beta)(weights - average), beta = (1 - 1/t)^(gamma + 1) at step t, and
   now and then writes both to ``averages/step-NNNNNNNN.safetensors`` of the run.
3. Afterwards any other profile is the least-squares combination of those that were written; the same combination of the averages
   is, nearly, the average of that length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from continuar.distributed import SingleProcess, gathered, local
from continuar.errors import require
from continuar.io import read_tensors, write_tensors
from continuar.models.base import TokenModel
from continuar.tensors import lerp_unless_
from continuar.training.config import EMAConfig

Numbers = float | np.ndarray
FOLDER = "averages"
_STORED = torch.float16
"""Type of the files, as in EDM2: weights are far from its limits, and combining rounds less than bfloat16 would."""


def exponent(length: float) -> float:
    """gamma of an average of that length: the largest root of length^2 = (gamma + 1)/((gamma + 2)^2 (gamma + 3))."""
    s = length**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def inner_product(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> np.ndarray:
    """The integral of p_a p_b over time, for profiles that end at t_a and t_b; arguments are broadcast."""
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    outer = np.where(t_a < t_b, gamma_b, gamma_a)  # of the profile that goes on longer
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** outer / later


def combination(times: Sequence[float], gammas: Sequence[float], t: float, gamma: float) -> np.ndarray:
    """Coefficients [n] of the combination of n profiles that is nearest, in least squares, to that of gamma ending at t."""
    ends, exponents = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    gram = inner_product(ends[:, None], exponents[:, None], ends[None], exponents[None])
    wanted = inner_product(ends, exponents, t, gamma)
    return np.linalg.lstsq(gram, wanted, rcond=1e-15)[0]


class PowerAverages:
    """The averages of a model that trains, spread over processes as its weights are.

    Args:
        source: the model, already sharded where it is.
        config: lengths, and whether there are any.
    """

    def __init__(self, source: TokenModel, config: EMAConfig) -> None:
        self._lengths = config.lengths if config.snapshot_images else ()
        self._gammas = [exponent(length) for length in self._lengths]
        self._parameters = dict(source.named_parameters())
        self.tensors = {f"{s}/{name}": p.detach().clone() for s in self._lengths for name, p in self._parameters.items()}

    @cached_property
    def _parts(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """(averages, source): this process's parts, which share the memory of ``tensors`` and of the parameters."""
        averages = [[local(self.tensors[f"{s}/{name}"]) for name in self._parameters] for s in self._lengths]
        return averages, [local(p.detach()) for p in self._parameters.values()]

    def update(self, step: int, bad: Tensor | None = None) -> None:
        """Follows the weights after optimizer step ``step`` (0-based), unless ``bad``, a bool tensor."""
        averages, source = self._parts
        for gamma, average in zip(self._gammas, averages, strict=True):
            beta = (1 - 1 / (step + 1)) ** (gamma + 1)
            lerp_unless_(average, source, 1 - beta, bad)

    def write(self, run_directory: Path, done: int, parallel: SingleProcess) -> None:
        """Adds ``averages/step-NNNNNNNN.safetensors`` to the run; all processes together, and the first writes."""
        averages = {}
        for name, tensor in self.tensors.items():
            all_of_it = gathered(tensor)
            if parallel.first:
                averages[name] = all_of_it.to("cpu", _STORED)
        if parallel.first:
            write_tensors(run_directory / FOLDER / f"step-{done:08d}.safetensors", averages)


def drop_after(run_directory: Path, step: int) -> None:
    """Removes what was written after ``step``, which will be trained again."""
    for path in _written(run_directory):
        if _step(path) > step:
            path.unlink()


def reconstruct(run_directory: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """Averaged weights of any length, float32, and the step they end at.

    Args:
        length: relative standard deviation, as those of the run; most exact between them.
        step: one at which averages were written; None is the last.

    Raises:
        UserError: there are no averages, none of that step, or a length that no profile has.
    """
    require(0 < length < 0.28, f"length is {length}; allowed: above 0 to below 0.28 (a uniform average has 0.289)")
    written = _written(run_directory)
    require(bool(written), f"{run_directory} has no averages; a run writes them with --ema.snapshot-images N")
    steps = [_step(path) for path in written]
    end = steps[-1] if step is None else step
    require(end in steps, f"step is {end}; averages were written at {_listed(steps)}")
    files = [path for path in written if _step(path) <= end]
    lengths = sorted({float(name.split("/", 1)[0]) for name in read_tensors(files[-1])})
    profiles = [(path, s) for path in files for s in lengths]
    weights = combination([_step(p) for p, _ in profiles], [exponent(s) for _, s in profiles], end, exponent(length))
    result: dict[str, Tensor] = {}
    for path in files:
        tensors = read_tensors(path)
        for s in lengths:
            weight = float(weights[profiles.index((path, s))])
            for name in (n for n in tensors if n.startswith(f"{s}/")):
                part = tensors[name].double() * weight
                key = name.split("/", 1)[1]
                result[key] = result[key] + part if key in result else part
    return {name: tensor.float() for name, tensor in result.items()}, end


def _written(run_directory: Path) -> list[Path]:
    return sorted((run_directory / FOLDER).glob("step-*.safetensors"))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (f", ... ({len(steps)} in all)" if len(steps) > 8 else "")
