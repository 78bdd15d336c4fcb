"""Mean and covariance of features, streamed in float64, and the Frechet distance between two of them.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^{1/2} S2 S1^{1/2})^{1/2})   (Dowson & Landau 1982; Heusel et al. 2017)

The last trace is the sum of the singular values of S1^{1/2} S2^{1/2}.

The inception score: are single images recognised with certainty, and is everything there? (Salimans et al. 2016)

1. p(y | x) from the logits of each image, in float64.
2. Per split: IS = exp(E_x KL(p(y | x) || p(y))), where p(y) is the mean of p(y | x) over the split. As
   E_x KL = E_x sum_y p(y | x) log p(y | x) - sum_y p(y) log p(y), each split is two running sums and no [N, C] array of float64.
3. The mean and standard deviation over splits is what papers print. The whole is one split of all images: sums add up.

It is the inception score proper only of the Inception network's logits without bias, as Dhariwal & Nichol (2021) compute them.

The kernel distance of two sets of features (KID where they are the Inception network's; Binkowski et al. 2018).

1. k(x, y) = (x . y / D + 1)^3.
2. Unbiased squared maximum mean discrepancy of m samples and m references:
   MMD^2 = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean_ij k(x_i, y_j).
3. Its mean and standard deviation over random subsets. Being unbiased it is 0 on average for equal distributions, and can be
   negative.

Are the samples realistic, and is all of reality among them? Both from balls around features.

1. Around every feature lies a ball that reaches to its k-th nearest neighbour in its own set.
2. Precision: the share of samples inside some ball of the reference; recall: the share of references inside some ball of the
   samples (Kynkäänniemi et al. 2019; k = 3).
3. Density: in how many balls of the reference a sample lies, divided by k; 1 on average for equal distributions, above where
   samples crowd where references are dense. Coverage: the share of reference balls that hold a sample (Naeem et al. 2020; k = 5).

Distances are computed in float64 by |a|^2 + |b|^2 - 2 a.b, in blocks: 50,000 samples against 10,000 references of 2,048 dimensions
need under 2 GiB, features included. Precision and recall depend on the number of references; the paper's suite (ADM's) has 10,000.

Nearest neighbours among features: is a sample a copy of a training image?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from continuar.errors import require
from continuar.evaluation.networks import check_same_dimensions, float64_device
from continuar.pictures import grid
from continuar.statistics import Moments


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
