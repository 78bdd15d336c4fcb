"""Mean and covariance of features, streamed in float64, and the Frechet distance between two of them.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^{1/2} S2 S1^{1/2})^{1/2})   (Dowson & Landau 1982; Heusel et al. 2017)

The last trace is the sum of the singular values of S1^{1/2} S2^{1/2}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from continuar.checkpoints.store import read_tensors, write_tensors
from continuar.errors import require


@dataclass(frozen=True)
class Moments:
    """count; mean [D] and unbiased covariance [D, D], float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    def save(self, path: Path) -> None:
        """As safetensors."""
        values = {"count": np.array(self.count), "mean": self.mean, "covariance": self.covariance}
        write_tensors(path, {k: torch.from_numpy(np.asarray(v)) for k, v in values.items()})

    @classmethod
    def load(cls, path: Path) -> Moments:
        """The inverse of `save`.

        Raises:
            UserError: unreadable, or other entries.
        """
        tensors = read_tensors(path)
        require(set(tensors) == {"count", "mean", "covariance"}, f"{path} has {sorted(tensors)}; allowed: count, covariance, mean")
        return cls(int(tensors["count"]), tensors["mean"].numpy(), tensors["covariance"].numpy())


class MomentAccumulator:
    """Adds features block by block (Chan et al. 1983: exact merging of means and scatter matrices)."""

    def __init__(self) -> None:
        self._count, self._mean, self._scatter = 0, np.zeros(0), np.zeros((0, 0))

    @property
    def count(self) -> int:
        """Features so far."""
        return self._count

    def add(self, features_ND: np.ndarray) -> None:
        """Adds a block of features."""
        x = features_ND.astype(np.float64)
        mean = x.mean(0)
        self._merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: MomentAccumulator) -> None:
        """Adds what another accumulator has seen."""
        self._merge(other._count, other._mean, other._scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self._count == 0:
            self._count, self._mean, self._scatter = count, mean, scatter
        elif count:
            total, delta = self._count + count, mean - self._mean
            self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self._count * count / total)
            self._mean = self._mean + delta * (count / total)
            self._count = total

    def moments(self) -> Moments:
        """What was seen so far.

        Raises:
            UserError: fewer than two features.
        """
        require(self._count >= 2, f"{self._count} features; at least 2 are needed for a covariance")
        return Moments(self._count, self._mean, self._scatter / (self._count - 1))


def moments(features_ND: np.ndarray, block: int = 4096) -> Moments:
    """The moments of features [N, D]."""
    accumulator = MomentAccumulator()
    for first in range(0, len(features_ND), block):
        accumulator.add(features_ND[first : first + block])
    return accumulator.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """The (squared) Frechet distance of two Gaussians; 0 for equal ones, never negative."""
    require(a.mean.shape == b.mean.shape, f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared")
    # Not the roots of the product's eigenvalues: a zero one comes out near 1e-16, and its root near 1e-8, once per missing rank.
    inner = np.linalg.svd(_square_root(a.covariance) @ _square_root(b.covariance), compute_uv=False)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * inner.sum()
    return max(0.0, float(((a.mean - b.mean) ** 2).sum() + trace))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
