"""Moments of streamed samples, and PSNR: the measurements that training, caching and evaluation share.

Blocks are merged exactly (Chan, Golub & LeVeque 1983):

1. A block of n samples has its mean m and its scatter S = sum (x - m)(x - m)^T.
2. Two blocks merge by d = m2 - m1:  m = m1 + d n2 / (n1 + n2),  S = S1 + S2 + d d^T n1 n2 / (n1 + n2).

Unlike E[x^2] - E[x]^2, this loses no digits where the mean is large beside the standard deviation. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require


@dataclass(frozen=True)
class Moments:
    """Count, mean [D] and unbiased covariance [D, D] of samples, float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


class MomentAccumulator:
    """Adds samples block by block; mergeable across shards and processes.

    Args:
        covariance: keep the scatter matrix [D, D]; False keeps its diagonal [D], which is enough for standard deviations.

    Attributes:
        count: samples so far. mean: [D], empty before the first block.
    """

    def __init__(self, covariance: bool = True) -> None:
        self._covariance = covariance
        self.count, self.mean = 0, np.zeros(0)
        self._scatter = np.zeros((0, 0) if covariance else 0)

    def add(self, samples_ND: np.ndarray, variance_ND: np.ndarray | None = None) -> None:
        """Adds a block of samples.

        Args:
            variance_ND: the samples are then means of Gaussians with these variances, whose draws are what is measured:
                E[x] = E[mean], Var[x] = Var[mean] + E[variance]. Only without covariance.
        """
        x = samples_ND.astype(np.float64)
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred if self._covariance else (centred**2).sum(0)
        if variance_ND is not None:
            scatter = scatter + variance_ND.astype(np.float64).sum(0)
        self._merge(len(x), mean, scatter)

    def merge(self, other: MomentAccumulator) -> None:
        """Adds all samples of another accumulator."""
        self._merge(other.count, other.mean, other._scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self.count == 0:
            self.count, self.mean, self._scatter = count, mean, scatter
        elif count:
            total, delta = self.count + count, mean - self.mean
            outer = np.outer(delta, delta) if self._covariance else delta**2
            self._scatter = self._scatter + scatter + outer * (self.count * count / total)
            self.mean = self.mean + delta * (count / total)
            self.count = total

    def all_reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds the samples of all processes; every process calls this, after adding at least one block.

        Args:
            total: sums a CPU tensor over all processes.
        """
        count, mean = self.count, self.mean
        self.count = int(total(torch.tensor(count)))
        self.mean = total(torch.from_numpy(mean * (count / self.count))).numpy()
        # The scatter around the common mean: again no difference of large numbers.
        delta = mean - self.mean
        outer = np.outer(delta, delta) if self._covariance else delta**2
        self._scatter = total(torch.from_numpy(self._scatter + outer * count)).numpy()

    def moments(self) -> Moments:
        """The moments of the samples so far.

        Raises:
            UserError: fewer than two samples.
        """
        require(self.count >= 2, f"{self.count} features; at least 2 are needed for a covariance")
        return Moments(self.count, self.mean, self._scatter / (self.count - 1))

    def std(self) -> np.ndarray:
        """Population standard deviation [D] of each dimension."""
        return np.sqrt((np.diagonal(self._scatter) if self._covariance else self._scatter) / self.count)

    def overall(self) -> tuple[float, float]:
        """Mean and population standard deviation of all values together, whatever their dimension."""
        mean = self.mean.mean()
        return float(mean), float(np.sqrt((self.std() ** 2 + (self.mean - mean) ** 2).mean()))


def moments(samples_ND: np.ndarray, block: int = 4096) -> Moments:
    """The moments of samples [N, D].

    Raises:
        UserError: fewer than two samples.
    """
    accumulator = MomentAccumulator()
    for first in range(0, len(samples_ND), block):
        accumulator.add(samples_ND[first : first + block])
    return accumulator.moments()


def psnr(mean_squared_error: np.ndarray | float, peak: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, of the shape of the error: 10 log10(peak^2 / MSE); infinite where the error is 0.

    Args:
        peak: the width of the range of values: 255 for uint8 images, 2 for images in [-1, 1].
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.divide(peak**2, mean_squared_error))
