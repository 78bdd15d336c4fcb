"""Nearest neighbours among features: is a sample a copy of a training image?"""

from __future__ import annotations

import numpy as np
import torch

from continuar.errors import require


def nearest_neighbours(
    query_QD: np.ndarray, reference_ND: np.ndarray, k: int = 1, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances and indices [Q, k] of each query's k nearest references, nearest first."""
    require(1 <= k <= len(reference_ND), f"k is {k}; allowed: 1 to {len(reference_ND)}, the number of references")
    reference = torch.from_numpy(reference_ND.astype(np.float32))
    distances, indices = [], []
    for first in range(0, len(query_QD), block):
        query = torch.from_numpy(query_QD[first : first + block].astype(np.float32))
        found = torch.cdist(query, reference, compute_mode="donot_use_mm_for_euclid_dist").topk(k, dim=1, largest=False)
        distances.append(found.values.numpy())
        indices.append(found.indices.numpy())
    return np.concatenate(distances), np.concatenate(indices)
