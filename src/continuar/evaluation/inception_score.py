"""The inception score: are single images recognised with certainty, and is everything there? (Salimans et al. 2016)

1. p(y | x) from the logits of each image, in float64.
2. Per split: IS = exp(E_x KL(p(y | x) || p(y))), where p(y) is the mean of p(y | x) over the split. As
   E_x KL = E_x sum_y p(y | x) log p(y | x) - sum_y p(y) log p(y), each split is two running sums and no [N, C] array of float64.
3. The mean and standard deviation over splits is what papers print. The whole is one split of all images: sums add up.

It is the inception score proper only of the Inception network's logits without bias, as Dhariwal & Nichol (2021) compute them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require

SPLITS = 10
_BLOCK = 4096


@dataclass(frozen=True)
class InceptionScore:
    """Mean and population standard deviation over ``splits``; ``whole`` is that of all images at once. Each in 1..C."""

    mean: float
    std: float
    whole: float
    splits: int


def inception_score(
    logits_NC: np.ndarray, *, splits: int = SPLITS, seed: int | None = 0, probabilities: bool = False
) -> InceptionScore:
    """The score of images whose classes a network has judged.

    Args:
        logits_NC: of every image, or its class probabilities if ``probabilities``.
        splits: 1 to N, of equal size within one.
        seed: of the shuffle before splitting, without which images sorted by class would score low; None keeps their order.

    Raises:
        UserError: fewer images than splits.
    """
    require(logits_NC.ndim == 2, f"logits are {logits_NC.shape}; allowed: [images, classes]")
    require(1 <= splits <= len(logits_NC), f"splits is {splits}; allowed: 1 to {len(logits_NC)}, the number of images")
    index = np.arange(len(logits_NC)) if seed is None else np.random.default_rng(seed).permutation(len(logits_NC))
    sums = [_sums(logits_NC[part], probabilities) for part in np.array_split(index, splits)]
    scores = np.array([_score(*s) for s in sums])
    count, certainty = sum(s[0] for s in sums), sum(s[1] for s in sums)
    whole = _score(count, certainty, torch.stack([s[2] for s in sums]).sum(0))
    return InceptionScore(float(scores.mean()), float(scores.std()), whole, splits)


def _sums(logits_NC: np.ndarray, probabilities: bool) -> tuple[int, float, Tensor]:
    """Count, sum over x and y of p log p, sum over x of p [C]."""
    certainty, total_C = 0.0, torch.zeros(logits_NC.shape[1], dtype=torch.float64)
    for block in torch.from_numpy(np.ascontiguousarray(logits_NC)).split(_BLOCK):
        p_BC = block.double() if probabilities else block.double().softmax(1)
        certainty += float(torch.xlogy(p_BC, p_BC).sum())
        total_C += p_BC.sum(0)
    return len(logits_NC), certainty, total_C


def _score(count: int, certainty: float, total_C: Tensor) -> float:
    mean_C = total_C / count
    return float(np.exp(certainty / count - float(torch.xlogy(mean_C, mean_C).sum())))
