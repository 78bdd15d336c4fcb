"""Are the samples realistic, and is all of reality among them? Both from balls around features.

1. Around every feature lies a ball that reaches to its k-th nearest neighbour in its own set.
2. Precision: the share of samples inside some ball of the reference; recall: the share of references inside some ball of the
   samples (Kynkäänniemi et al. 2019; k = 3).
3. Density: in how many balls of the reference a sample lies, divided by k; 1 on average for equal distributions, above where
   samples crowd where references are dense. Coverage: the share of reference balls that hold a sample (Naeem et al. 2020; k = 5).

Distances are computed in float64 by |a|^2 + |b|^2 - 2 a.b, in blocks: 50,000 samples against 10,000 references of 2,048 dimensions
need under 2 GiB, features included. Precision and recall depend on the number of references; the paper's suite (ADM's) has 10,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require
from continuar.evaluation.features import check_same_dimensions, float64_device

K, K_DENSITY = 3, 5
_BLOCK_BYTES = 1 << 28
_COLUMNS = 4096
_ROUNDING = 1e-12
"""Squared distances below this share of the squared norms are rounding errors of equal features."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Each 0..1, but density, which is 0 or more."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    samples_MD: np.ndarray,
    reference_ND: np.ndarray,
    *,
    k: int = K,
    k_density: int = K_DENSITY,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """See the module's docstring.

    Args:
        k, k_density: neighbours, 1 to the smaller set's size - 1; of precision and recall, of density and coverage.
        device: where to compute; MPS has no float64, so the CPU does it there.

    Raises:
        UserError: features of different dimensions, or too few of them.
    """
    check_same_dimensions(samples_MD, reference_ND)
    for name, value, count in (("k", k, min(len(samples_MD), len(reference_ND))), ("k of density", k_density, len(reference_ND))):
        require(1 <= value < count, f"{name} is {value} with {count} features; allowed: 1 to {count - 1}")
    target = float64_device(device)
    # Distances do not change, but lose fewer digits, around the mean.
    mean_D = torch.from_numpy(reference_ND.mean(0, dtype=np.float64)).to(target)
    samples, reference = (_Features(torch.from_numpy(f).to(target), mean_D) for f in (samples_MD, reference_ND))
    radius_M1 = _radii(samples, [k])
    radius_N2 = _radii(reference, [k, k_density])
    inside, balls = 0, 0
    found_N, covered_N = (torch.zeros(len(reference_ND), dtype=torch.bool, device=target) for _ in range(2))
    for rows, distance_BN in _distances(samples, reference):
        near_BN = distance_BN <= radius_N2[:, 0]
        dense_BN = distance_BN <= radius_N2[:, 1]
        inside += int(near_BN.any(1).sum())
        balls += int(dense_BN.sum())
        covered_N |= dense_BN.any(0)
        found_N |= (distance_BN <= radius_M1[rows]).any(0)
    return PrecisionRecall(
        precision=inside / len(samples_MD),
        recall=float(found_N.double().mean()),
        density=balls / (k_density * len(samples_MD)),
        coverage=float(covered_N.double().mean()),
    )


class _Features:
    """Features as they came, in float32, with the squared norms of what they are in float64 around a mean."""

    def __init__(self, features_ND: Tensor, mean_D: Tensor) -> None:
        self._features_ND, self._mean_D = features_ND, mean_D
        self.norms_N = torch.cat([self.block(s).square().sum(1) for s in _slices(len(features_ND), _COLUMNS)])

    def __len__(self) -> int:
        return len(self._features_ND)

    def block(self, rows: slice) -> Tensor:
        return self._features_ND[rows].double() - self._mean_D


def _slices(count: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _distances(a: _Features, b: _Features) -> Iterator[tuple[slice, Tensor]]:
    """(rows, squared distances [B, N] of these rows of ``a`` to all of ``b``), a block of rows at a time."""
    for rows in _slices(len(a), max(1, _BLOCK_BYTES // (8 * len(b)))):
        x_BD, norms_B1 = a.block(rows), a.norms_N[rows, None]
        distance_BN = torch.empty(len(x_BD), len(b), dtype=torch.float64, device=x_BD.device)
        for columns in _slices(len(b), _COLUMNS):
            scale = norms_B1 + b.norms_N[columns]
            part = scale - 2 * (x_BD @ b.block(columns).T)
            distance_BN[:, columns] = torch.where(part > _ROUNDING * scale, part, 0.0)
        yield rows, distance_BN


def _radii(features: _Features, ks: list[int]) -> Tensor:
    """Squared distances [N, len(ks)] to the k-th nearest other feature of the same set; each is its own nearest, not counted."""
    largest = max(ks) + 1
    found = [d_BN.topk(largest, dim=1, largest=False).values[:, ks] for _, d_BN in _distances(features, features)]
    return torch.cat(found)
