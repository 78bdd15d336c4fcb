"""Scores of image features: Frechet distance, inception score, kernel distance, precision and recall, nearest neighbours.

Everything but the neighbours is float64. The scores are written out here, because torchmetrics' classes take images instead of
features, and torch-fidelity cannot be imported without torchvision. The tests compare them with torchmetrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from continuar.distributed import pick_device
from continuar.errors import require
from continuar.pictures import grid
from continuar.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017); 0 for equal ones, never negative.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^{1/2} S2 S1^{1/2})^{1/2})

    Raises:
        UserError: features of different dimensions.
    """
    require(a.mean.shape == b.mean.shape, f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared")
    # The trace of the last root is the sum of the singular values of S1^{1/2} S2^{1/2}. The usual roots of the eigenvalues of S1 S2
    # are worse for singular covariances: a zero eigenvalue comes out near 1e-16, and its root near 1e-8, once per missing rank.
    inner = np.linalg.svd(_square_root(a.covariance) @ _square_root(b.covariance), compute_uv=False)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * inner.sum()
    # Equal Gaussians give 0 only up to rounding, of either sign.
    return max(0.0, float(((a.mean - b.mean) ** 2).sum() + trace))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    # Zero eigenvalues of a singular covariance come out slightly negative.
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


SPLITS = 10


@dataclass(frozen=True)
class InceptionScore:
    """Mean and population standard deviation over ``splits``, and the score of all images as one split. Each in 1..classes."""

    mean: float
    std: float
    whole: float
    splits: int


def inception_score(logits_NC: np.ndarray, *, splits: int = SPLITS, seed: int | None = 0) -> InceptionScore:
    """The inception score (Salimans et al. 2016): IS = exp(E_x KL(p(y | x) || p(y))), with p(y) the mean of p(y | x) over a split.

    It is the IS of papers only for the Inception network's logits without bias, as Dhariwal & Nichol (2021) compute it.

    Args:
        logits_NC: logits of every image.
        splits: 1 to N, of equal size within one.
        seed: shuffles the images before splitting; None keeps their order, which scores low if they are sorted by class.

    Raises:
        UserError: fewer images than splits.
    """
    require(logits_NC.ndim == 2, f"logits are {logits_NC.shape}; allowed: [images, classes]")
    require(1 <= splits <= len(logits_NC), f"splits is {splits}; allowed: 1 to {len(logits_NC)}, the number of images")
    index = np.arange(len(logits_NC)) if seed is None else np.random.default_rng(seed).permutation(len(logits_NC))
    # E_x KL = E_x sum_y p(y | x) log p(y | x) - sum_y p(y) log p(y). Both terms are sums over images, so the sums of all splits
    # give the score of all images, and only one split is held in float64.
    sums = []
    for part in np.array_split(index, splits):
        p_BC = torch.from_numpy(logits_NC[part]).double().softmax(1)
        sums.append((len(part), float(torch.xlogy(p_BC, p_BC).sum()), p_BC.sum(0)))
    scores = np.array([_exp_mean_kl(*split) for split in sums])
    counts, certainties, totals = zip(*sums, strict=True)
    whole = _exp_mean_kl(sum(counts), sum(certainties), torch.stack(totals).sum(0))
    return InceptionScore(float(scores.mean()), float(scores.std()), whole, splits)


def _exp_mean_kl(count: int, certainty: float, total_C: Tensor) -> float:
    """exp(E_x KL) from the number of images, their sum of p log p, and their sum of p."""
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
    """The kernel distance (KID with the FID Inception weights; Binkowski et al. 2018).

    It is the mean over random subsets of the unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x . y / D + 1)^3.
    Being unbiased, it is 0 on average for equal distributions and can be negative.

    Args:
        subsets: 1 or more.
        subset_size: images of each side in a subset, drawn without replacement; 2 to the smaller set's size.
        seed: of the subsets.
        device: where to compute; the CPU stands in for MPS, which has no float64.

    Raises:
        UserError: features of different dimensions, or a subset larger than a set.
    """
    _check_dimensions(samples_MD, reference_ND)
    fewest = min(len(samples_MD), len(reference_ND))
    require(2 <= subset_size <= fewest, f"subset size is {subset_size}; allowed: 2 to {fewest}, the smaller set")
    require(subsets >= 1, f"subsets is {subsets}; allowed: 1 or more")
    rng, target = np.random.default_rng(seed), _float64_device(device)
    # The cube of float32 products loses most digits of a difference this small, hence float64.
    values = np.empty(subsets)
    for i in range(subsets):
        x, y = (f[rng.choice(len(f), subset_size, replace=False)] for f in (samples_MD, reference_ND))
        values[i] = _squared_mmd(*(torch.from_numpy(f).to(target, torch.float64) for f in (x, y)))
    return KernelDistance(float(values.mean()), float(values.std()), subsets, subset_size)


# torchmetrics has the same as an undocumented helper of its KID class, which is not worth an extra for every evaluation.
def _squared_mmd(x_MD: Tensor, y_MD: Tensor) -> float:
    """sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean_ij k(x_i, y_j)."""

    def kernel(a_MD: Tensor, b_MD: Tensor) -> Tensor:
        return (a_MD @ b_MD.T / a_MD.shape[1] + 1) ** 3

    def among(f_MD: Tensor) -> Tensor:
        k_MM = kernel(f_MD, f_MD)
        return (k_MM.sum() - k_MM.diagonal().sum()) / (len(f_MD) * (len(f_MD) - 1))

    return float(among(x_MD) + among(y_MD) - 2 * kernel(x_MD, y_MD).mean())


K, K_DENSITY = 3, 5
# Distances are computed in blocks: 50,000 samples against 10,000 references of 2,048 dimensions need under 2 GiB with the features.
_BLOCK_BYTES = 1 << 28
_COLUMNS = 4096
# Squared distances below this share of the squared norms are rounding errors between equal features.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision, recall and coverage in 0..1; density is 0 or more."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    samples_MD: np.ndarray, reference_ND: np.ndarray, *, k: int = K, k_density: int = K_DENSITY, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Precision, recall, density and coverage: are the samples realistic, and do they show everything that is real?

    Around every feature lies a ball that reaches to its k-th nearest neighbour in its own set.

    * Precision: the share of samples inside some ball of the reference. Recall: the share of references inside some ball of the
      samples (Kynkäänniemi et al. 2019; k = 3).
    * Density: the number of reference balls that hold a sample, divided by k, averaged over samples; 1 on average for equal
      distributions. Coverage: the share of reference balls that hold a sample (Naeem et al. 2020; k = 5).

    All four depend on the number of references; the suite of the paper (ADM's) has 10,000.

    Args:
        k, k_density: neighbours, 1 to the smaller set's size - 1; of precision and recall, of density and coverage.
        device: where to compute; the CPU stands in for MPS, which has no float64.

    Raises:
        UserError: features of different dimensions, or too few of them.
    """
    _check_dimensions(samples_MD, reference_ND)
    for name, value, count in (("k", k, min(len(samples_MD), len(reference_ND))), ("k of density", k_density, len(reference_ND))):
        require(1 <= value < count, f"{name} is {value} with {count} features; allowed: 1 to {count - 1}")
    target = _float64_device(device)
    # Moving the origin to the mean changes no distance, and |a|^2 + |b|^2 - 2 a.b loses fewer digits there.
    mean_D = torch.from_numpy(reference_ND.mean(0, dtype=np.float64)).to(target)
    samples, reference = (_CentredFeatures(torch.from_numpy(f).to(target), mean_D) for f in (samples_MD, reference_ND))
    radius_M1 = _squared_radii(samples, [k])
    radius_N2 = _squared_radii(reference, [k, k_density])
    inside, balls = 0, 0
    found_N, covered_N = (torch.zeros(len(reference_ND), dtype=torch.bool, device=target) for _ in range(2))
    for rows, distance_BN in _squared_distances(samples, reference):
        dense_BN = distance_BN <= radius_N2[:, 1]
        inside += int((distance_BN <= radius_N2[:, 0]).any(1).sum())
        balls += int(dense_BN.sum())
        covered_N |= dense_BN.any(0)
        found_N |= (distance_BN <= radius_M1[rows]).any(0)
    return PrecisionRecall(
        precision=inside / len(samples_MD),
        recall=float(found_N.double().mean()),
        density=balls / (k_density * len(samples_MD)),
        coverage=float(covered_N.double().mean()),
    )


class _CentredFeatures:
    """Float32 features, of which blocks are converted to float64 around a mean when needed; with their squared norms."""

    def __init__(self, features_ND: Tensor, mean_D: Tensor) -> None:
        self._features_ND, self._mean_D = features_ND, mean_D
        self.norms_N = torch.cat([self.block(s).square().sum(1) for s in _slices(len(features_ND), _COLUMNS)])

    def __len__(self) -> int:
        return len(self._features_ND)

    def block(self, rows: slice) -> Tensor:
        return self._features_ND[rows].double() - self._mean_D


def _slices(count: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _squared_distances(a: _CentredFeatures, b: _CentredFeatures) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, squared distances [B, N] of these rows of ``a`` to all of ``b``), a block of rows at a time."""
    for rows in _slices(len(a), max(1, _BLOCK_BYTES // (8 * len(b)))):
        x_BD, norms_B1 = a.block(rows), a.norms_N[rows, None]
        distance_BN = torch.empty(len(x_BD), len(b), dtype=torch.float64, device=x_BD.device)
        for columns in _slices(len(b), _COLUMNS):
            scale = norms_B1 + b.norms_N[columns]
            part = scale - 2 * (x_BD @ b.block(columns).T)
            distance_BN[:, columns] = torch.where(part > _ROUNDING * scale, part, 0.0)
        yield rows, distance_BN


def _squared_radii(features: _CentredFeatures, ks: list[int]) -> Tensor:
    """Squared distances [N, len(ks)] to the k-th nearest other feature of the same set."""
    # A feature is its own nearest neighbour at index 0, so the k-th other one is at index k.
    found = [d_BN.topk(max(ks) + 1, dim=1, largest=False).values[:, ks] for _, d_BN in _squared_distances(features, features)]
    return torch.cat(found)


def class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that are recognised as what they should show."""
    require(len(predicted) == len(labels) > 0, f"{len(predicted)} predictions for {len(labels)} labels; allowed: as many, not 0")
    return float((predicted == labels).mean())


def _check_dimensions(a_MD: np.ndarray, b_ND: np.ndarray) -> None:
    require(a_MD.ndim == b_ND.ndim == 2, f"features are {a_MD.shape} and {b_ND.shape}; allowed: [images, dimensions]")
    require(a_MD.shape[1] == b_ND.shape[1], f"features of {a_MD.shape[1]} and {b_ND.shape[1]} dimensions cannot be compared")


def _float64_device(device: torch.device | str) -> torch.device:
    found = pick_device(device)
    return torch.device("cpu") if found.type == "mps" else found


class NeighbourSearch:
    """The k nearest references of each query, among references that are added block by block: is a sample a training image?

    Args:
        query_QD: features. k: 1 or more.
    """

    def __init__(self, query_QD: np.ndarray, k: int) -> None:
        require(k >= 1, f"k is {k}; allowed: 1 or more")
        # float32, as the features come: a search keeps no copy of the references, so float64 would only cost time.
        self._query_QD, self._k, self._seen = torch.from_numpy(query_QD.astype(np.float32)), k, 0
        self._distance_QK = torch.full((len(query_QD), k), float("inf"))
        self._index_QK = torch.full((len(query_QD), k), -1)

    def add(self, reference_BD: np.ndarray, first: int) -> None:
        """Adds a block of references, whose indices are ``first``, ``first`` + 1, ..."""
        reference = torch.from_numpy(reference_BD.astype(np.float32))
        index = torch.arange(first, first + len(reference))
        self._seen += len(reference)
        # From the differences themselves, so that the distance of a copy is exactly 0.
        distance = torch.cdist(self._query_QD, reference, compute_mode="donot_use_mm_for_euclid_dist")
        distances = torch.cat((self._distance_QK, distance), 1)
        indices = torch.cat((self._index_QK, index.expand_as(distance)), 1)
        # The sort is stable and earlier references come first, so ties do not depend on the blocks; topk promises no order.
        kept = distances.sort(dim=1, stable=True).indices[:, : self._k]
        self._distance_QK, self._index_QK = distances.gather(1, kept), indices.gather(1, kept)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns Euclidean distances and indices [Q, k], nearest first; of equal distances the lower index first.

        Raises:
            UserError: fewer references than k.
        """
        require(self._k <= self._seen, f"k is {self._k}; allowed: 1 to {self._seen}, the number of references")
        return self._distance_QK.numpy(), self._index_QK.numpy()


def nearest_neighbours(
    query_QD: np.ndarray, reference_ND: np.ndarray, k: int = 1, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Returns Euclidean distances and indices [Q, k] of each query's k nearest references, nearest first."""
    require(1 <= k <= len(reference_ND), f"k is {k}; allowed: 1 to {len(reference_ND)}, the number of references")
    search = NeighbourSearch(query_QD, k)
    for rows in _slices(len(reference_ND), block):
        search.add(reference_ND[rows], rows.start)
    return search.result()


def neighbours_picture(samples_QHW3: np.ndarray, neighbours_QKHW3: np.ndarray, distance_QK: np.ndarray) -> Image.Image:
    """Draws a row per sample: the sample, then its nearest training images with their distances.

    Args:
        samples_QHW3: uint8. neighbours_QKHW3: uint8, nearest first. distance_QK: in feature space.
    """
    rows = np.concatenate([samples_QHW3[:, None], neighbours_QKHW3], 1)
    captions = [c for row in distance_QK for c in ("sample", *(f"{rank}: {d:.3g}" for rank, d in enumerate(row, 1)))]
    return grid(rows.reshape(-1, *rows.shape[2:]), captions, columns=rows.shape[1])
