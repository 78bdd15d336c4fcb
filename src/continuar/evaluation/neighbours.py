"""Nearest neighbours among features: is a sample a copy of a training image?"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from continuar.errors import require
from continuar.pictures import grid


class NeighbourSearch:
    """The k nearest references of each query, told of the references block by block.

    Distances are those of the differences themselves, in float32: that of a copy is 0.
    """

    def __init__(self, query_QD: np.ndarray, k: int) -> None:
        require(k >= 1, f"k is {k}; allowed: 1 or more")
        self._query_QD, self._k, self._seen = torch.from_numpy(query_QD.astype(np.float32)), k, 0
        self._distance_QK = torch.full((len(query_QD), k), float("inf"))
        self._index_QK = torch.full((len(query_QD), k), -1)

    def add(self, reference_BD: np.ndarray, first: int, block: int = 1024) -> None:
        """Tells of the references ``first``, ``first`` + 1, ..."""
        reference = torch.from_numpy(reference_BD.astype(np.float32))
        index = torch.arange(first, first + len(reference))
        self._seen += len(reference)
        for start in range(0, len(self._query_QD), block):
            rows = slice(start, start + block)
            distance = torch.cdist(self._query_QD[rows], reference, compute_mode="donot_use_mm_for_euclid_dist")
            distances = torch.cat((self._distance_QK[rows], distance), 1)
            indices = torch.cat((self._index_QK[rows], index.expand_as(distance)), 1)
            kept = distances.sort(dim=1, stable=True).indices[:, : self._k]
            self._distance_QK[rows], self._index_QK[rows] = distances.gather(1, kept), indices.gather(1, kept)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances and indices [Q, k], nearest first; of equal distances the lower index first.

        Raises:
            UserError: fewer references than k.
        """
        require(self._k <= self._seen, f"k is {self._k}; allowed: 1 to {self._seen}, the number of references")
        return self._distance_QK.numpy(), self._index_QK.numpy()


def nearest_neighbours(
    query_QD: np.ndarray, reference_ND: np.ndarray, k: int = 1, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances and indices [Q, k] of each query's k nearest references, nearest first."""
    require(1 <= k <= len(reference_ND), f"k is {k}; allowed: 1 to {len(reference_ND)}, the number of references")
    search = NeighbourSearch(query_QD, k)
    for first in range(0, len(reference_ND), block):
        search.add(reference_ND[first : first + block], first)
    return search.result()


def neighbours_picture(samples_QHW3: np.ndarray, neighbours_QKHW3: np.ndarray, distance_QK: np.ndarray) -> Image.Image:
    """A row per sample: the sample, then its nearest training images with their distances.

    Args:
        samples_QHW3: uint8. neighbours_QKHW3: uint8, nearest first. distance_QK: in feature space.
    """
    rows = np.concatenate([samples_QHW3[:, None], neighbours_QKHW3], 1)
    captions = [c for row in distance_QK for c in ("sample", *(f"{rank}: {d:.3g}" for rank, d in enumerate(row, 1)))]
    return grid(rows.reshape(-1, *rows.shape[2:]), captions, columns=rows.shape[1])
