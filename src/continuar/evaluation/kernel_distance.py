"""The kernel distance of two sets of features (KID where they are the Inception network's; Binkowski et al. 2018).

1. k(x, y) = (x . y / D + 1)^3.
2. Unbiased squared maximum mean discrepancy of m samples and m references:
   MMD^2 = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean_ij k(x_i, y_j).
3. Its mean and standard deviation over random subsets. Being unbiased it is 0 on average for equal distributions, and can be
   negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require
from continuar.evaluation.features import check_same_dimensions, float64_device

SUBSETS, SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class KernelDistance:
    """Mean of MMD^2 over the subsets, and its population standard deviation, the usual error bar."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    samples_MD: np.ndarray,
    reference_ND: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> KernelDistance:
    """See the module's docstring; computed in float64.

    Args:
        subsets: how many, 1 or more.
        subset_size: images of each side in a subset, drawn without replacement; 2 to the smaller set's size.
        seed: of the subsets.
        device: where to compute; MPS has no float64, so the CPU does it there.

    Raises:
        UserError: features of different dimensions, or a subset larger than a set.
    """
    check_same_dimensions(samples_MD, reference_ND)
    fewest = min(len(samples_MD), len(reference_ND))
    require(2 <= subset_size <= fewest, f"subset size is {subset_size}; allowed: 2 to {fewest}, the smaller set")
    require(subsets >= 1, f"subsets is {subsets}; allowed: 1 or more")
    rng, target = np.random.default_rng(seed), float64_device(device)
    values = np.empty(subsets)
    for i in range(subsets):
        x, y = (f[rng.choice(len(f), subset_size, replace=False)] for f in (samples_MD, reference_ND))
        values[i] = squared_mmd(*(torch.from_numpy(f).to(target, torch.float64) for f in (x, y)))
    return KernelDistance(float(values.mean()), float(values.std()), subsets, subset_size)


def squared_mmd(x_MD: Tensor, y_ND: Tensor) -> float:
    """The unbiased estimate, step 2."""

    def among(f_MD: Tensor) -> Tensor:
        k_MM = _kernel(f_MD, f_MD)
        return (k_MM.sum() - k_MM.diagonal().sum()) / (len(f_MD) * (len(f_MD) - 1))

    return float(among(x_MD) + among(y_ND) - 2 * _kernel(x_MD, y_ND).mean())


def _kernel(x_MD: Tensor, y_ND: Tensor) -> Tensor:
    return (x_MD @ y_ND.T / x_MD.shape[1] + 1) ** 3
