"""References: statistics of real images that samples are compared with, and all scores of samples against one.

A reference holds two things that must not be mixed up. The Frechet distance takes the mean and covariance of *every* image;
precision, recall, density, coverage and the kernel distance take the features of a fixed number of images, 10,000 in ADM's suite:
more references make smaller balls, and other numbers.

The npz layout is that of ADM's suite (Dhariwal & Nichol 2021): mu, sigma, mu_s, sigma_s, arr_0, any of which may be absent. This
package adds features, count, size, network, sha256, source and version. Files are read with ``allow_pickle=False``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continuar import __version__
from continuar.data.loader import DIGITS
from continuar.errors import UserError, require
from continuar.evaluation.metrics import (
    K_DENSITY,
    SPLITS,
    SUBSET_SIZE,
    K,
    NeighbourSearch,
    class_accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from continuar.evaluation.networks import Extracted, FeatureNetwork
from continuar.evaluation.samples import ARRAY, Images, NpzImages, hxw, npz_errors, npz_names, open_images
from continuar.io import atomic_file
from continuar.statistics import MomentAccumulator, Moments, moments

REFERENCE_IMAGES = 10_000


@dataclass(frozen=True)
class Statistics:
    """Statistics of real images in one network's features."""

    moments: Moments
    """Moments of every image; count 0 if the file does not hold it."""
    network: str
    sha256: str
    """Digest of the network's weights; empty in files of ADM's suite, which are of the FID Inception network."""
    size: tuple[int, int] | None
    """Height and width; None if the file does not hold them."""
    features_RD: np.ndarray | None
    """float32, of the images that precision, recall, density, coverage and the kernel distance take."""
    spatial: Moments | None = None
    """mu_s and sigma_s of ADM's layout: moments of the spatial features of every image, for networks that have them."""
    source: str = ""

    def matches(self, network: FeatureNetwork) -> bool:
        """True if this network with these weights computed them."""
        if not self.sha256:
            return network.is_fid
        return (self.network, self.sha256) == (network.name, network.sha256)

    def __str__(self) -> str:
        return f"statistics of {_identity(self.network, self.sha256)}"


def _identity(network: str, sha256: str) -> str:
    return f"the network '{network}' ({f'weights {sha256[:12]}' if sha256 else 'FID weights'})"


def reference_indices(count: int, kept: int) -> np.ndarray:
    """Draws which of ``count`` images give the features that are kept: the same every time, in order."""
    # At random, because data sets are sorted by class; sorted again, because images are read in order.
    return np.sort(np.random.default_rng(0).choice(count, min(kept, count), replace=False))


def measure_images(
    images: Images,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    kept: int = REFERENCE_IMAGES,
    search: NeighbourSearch | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Streams every image through the network.

    Args:
        kept: how many images' features to keep, 0 or more.
        search: receives the features of every image.
        on_progress: called with (images done, images in all).

    Raises:
        UserError: fewer than two images, or one that is unreadable or of another size.
    """
    require(len(images) >= 2, f"{images.name} has {len(images)} images; at least 2 are needed for a covariance")
    require(kept >= 0, f"reference images is {kept}; allowed: 0 or more")
    chosen, features = set(reference_indices(len(images), kept).tolist()), []
    sums, spatial = MomentAccumulator(), MomentAccumulator()
    for first, block in images.blocks(batch_size):
        found = network(block)
        sums.add(found.features_ND)
        if found.spatial_NS is not None:
            spatial.add(found.spatial_NS)
        features.append(found.features_ND[[i for i in range(len(block)) if first + i in chosen]])
        if search is not None:
            search.add(found.features_ND, first)
        if on_progress is not None:
            on_progress(first + len(block), len(images))
    return Statistics(
        moments=sums.moments(),
        network=network.name,
        sha256=network.sha256,
        size=images.size,
        features_RD=np.concatenate(features) if kept else None,
        spatial=spatial.moments() if spatial.count else None,
        source=images.name,
    )


def few_images(count: int, dimensions: int) -> tuple[str, ...]:
    """Warns of a covariance that cannot have full rank; () if it can."""
    if not 0 < count <= dimensions:
        return ()
    return (f"{count} images for {dimensions} features: the covariance is singular and the Frechet distance biased; take more",)


@dataclass(frozen=True)
class Reference:
    """An opened reference, checked but not yet measured: statistics that can be used as they are, images, or both."""

    name: str
    statistics: Statistics | None
    images: Images | None
    notes: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """True if the statistics hold everything that the images could add."""
        return self.statistics is not None and (self.images is None or self.statistics.features_RD is not None)

    def measure(self, network: FeatureNetwork, **how: Any) -> Statistics:
        """Returns statistics in the network's features and computes the missing ones from the images.

        Args:
            how: keyword arguments of `measure_images`.
        """
        given = self.statistics
        if given is not None and self.is_ready and how.get("search") is None:
            return given
        assert self.images is not None
        measured = measure_images(self.images, network, **how)
        if given is None:
            return measured
        # ADM's files hold the moments of all images and the pixels of 10,000: those give only the features.
        features_RD = measured.features_RD if given.features_RD is None else given.features_RD
        return replace(measured, moments=given.moments, features_RD=features_RD, spatial=given.spatial, source=self.name)


def open_reference(path: str | Path, network: FeatureNetwork, size: tuple[int, int], split: str = "train") -> Reference:
    """Opens a reference for samples of ``size`` (height, width).

    Args:
        path: statistics or images in an npz file; or a folder, Parquet or tars, whose images are cropped to the samples' size.

    Raises:
        UserError: not there, damaged, of another resolution, or statistics of another network without images to measure anew.
    """
    path = Path(path)
    require(
        path.exists() or str(path) == DIGITS,
        f"reference {path} does not exist; allowed: a folder of images, a .parquet, .tar or .npz file",
    )
    if path.suffix != ".npz":
        require(size[0] == size[1], f"samples are of {hxw(size)} pixels; only against an .npz file may they be other than square")
        # Enlarged references would be blurred, and so would the best samples.
        natural = open_images(path, split=split)
        require(
            min(natural.size) >= size[0],
            f"the reference {path} is of {hxw(natural.size)} pixels, the samples of {hxw(size)}; allowed: as large or larger",
        )
        return Reference(str(path), None, open_images(path, size=size[0], split=split))
    statistics, images = read_statistics(path)
    # The network would resize both to one resolution and hide that they differ.
    known = images.size if images is not None else statistics.size if statistics is not None else None
    require(
        known is None or known == size,
        f"the reference {path} is of {hxw(known or ())} pixels, the samples of {hxw(size)}; allowed: the same",
    )
    notes = () if known else (f"{path} does not tell its resolution, so it cannot be compared with the samples' {hxw(size)}",)
    if statistics is not None and not statistics.matches(network):
        require(images is not None, f"{path} holds {statistics}, not of {_identity(network.name, network.sha256)}")
        statistics, notes = None, (*notes, f"{path} holds {statistics}; measured anew from its images")
    return Reference(str(path), statistics, images, notes)


def write_statistics(path: Path, statistics: Statistics, images_NHW3: np.ndarray | None = None) -> None:
    """Writes an npz file atomically; ``images_NHW3`` become its arr_0."""
    values: dict[str, Any] = {
        "mu": statistics.moments.mean,
        "sigma": statistics.moments.covariance,
        "count": np.int64(statistics.moments.count),
        "network": np.str_(statistics.network),
        "sha256": np.str_(statistics.sha256),
        "source": np.str_(statistics.source),
        "version": np.str_(__version__),
    }
    if statistics.size is not None:
        values["size"] = np.array(statistics.size, np.int64)
    if statistics.features_RD is not None:
        values["features"] = statistics.features_RD
    if statistics.spatial is not None:
        values |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if images_NHW3 is not None:
        values[ARRAY] = images_NHW3
    # Not compressed, so that `NpzImages` can seek in arr_0.
    with atomic_file(path) as file:
        np.savez(file, **values)


def read_statistics(path: Path) -> tuple[Statistics | None, Images | None]:
    """Reads the statistics in an npz file, and its images; at least one of them.

    Raises:
        UserError: damaged, without the needed keys, or entries of other shapes.
    """
    require(path.is_file(), f"{path} does not exist")
    with npz_errors(path), zipfile.ZipFile(path) as archive:
        names = npz_names(archive)
    images = NpzImages(path) if ARRAY in names else None
    if not {"mu", "sigma"} <= set(names):
        require(images is not None, f"{path} has the entries {', '.join(names) or 'none'}; allowed: mu and sigma, or {ARRAY}")
        return None, images
    with npz_errors(path):
        try:
            with np.load(path, allow_pickle=False) as file:
                # Everything but the images is small.
                values = {name: file[name] for name in names if name != ARRAY}
        except (ValueError, OSError) as problem:
            raise UserError(f"{path} is truncated or not an npz file of plain arrays: {problem}") from problem
    every = _moments(path, values, "mu", "sigma", int(values.get("count", 0)))
    features, dimensions, size = values.get("features"), len(every.mean), values.get("size")
    require(
        features is None or (features.ndim == 2 and features.shape[1] == dimensions and features.dtype.kind == "f"),
        f"{path}: features are {getattr(features, 'shape', ())}; allowed: [n, {dimensions}]",
    )
    # ADM's files do not name their network: it is always the FID Inception network.
    statistics = Statistics(
        every,
        network=str(values.get("network", "inception")),
        sha256=str(values.get("sha256", "")),
        size=None if size is None else (int(size[0]), int(size[1])),
        features_RD=features,
        spatial=_moments(path, values, "mu_s", "sigma_s", 0) if {"mu_s", "sigma_s"} <= set(names) else None,
        source=str(values.get("source", path)),
    )
    return statistics, images


def _moments(path: Path, values: dict[str, np.ndarray], mean: str, covariance: str, count: int) -> Moments:
    m, c = values[mean], values[covariance]
    require(
        m.ndim == 1 and c.shape == (len(m), len(m)) and m.dtype.kind == c.dtype.kind == "f",
        f"{path}: {mean} is {m.shape}, {covariance} {c.shape}; allowed: floats [D] and [D, D]",
    )
    require(bool(np.isfinite(m).all() and np.isfinite(c).all()), f"{path}: {mean} or {covariance} is not finite")
    return Moments(count, m.astype(np.float64), c.astype(np.float64))


@dataclass(frozen=True)
class Scores:
    """All scores of a set of samples."""

    values: dict[str, float]
    """By name. A score is absent if something that it needs is missing; ``notes`` explain it."""
    parameters: dict[str, int | None]
    """Splits, subsets and neighbours of these scores; None for absent scores."""
    notes: tuple[str, ...]


def score_samples(
    samples: Extracted, reference: Statistics, *, labels_M: np.ndarray | None = None, device: torch.device | str = "cpu"
) -> Scores:
    """Scores samples by their features, logits and spatial features.

    Args:
        labels_M: the classes that were asked for, if they are those of the logits.
        device: where distances are computed.

    Raises:
        UserError: the reference's features are of other dimensions.
    """
    features_MD, logits_MC, known_RD = samples.features_ND, samples.logits_NC, reference.features_RD
    count, dimensions = features_MD.shape
    notes = [f"samples: {n}" for n in few_images(count, dimensions)]
    notes += [f"reference: {n}" for n in few_images(reference.moments.count, dimensions)]
    values = {"frechet_distance": frechet_distance(moments(features_MD), reference.moments)}
    splits = subsets = subset_size = None
    if samples.spatial_NS is not None and reference.spatial is not None:
        values["spatial_frechet_distance"] = frechet_distance(moments(samples.spatial_NS), reference.spatial)
    elif samples.spatial_NS is not None:
        notes.append("no spatial Frechet distance (sFID): the reference has no spatial statistics (mu_s, sigma_s)")
    if logits_MC is None:
        notes.append("no inception score: the network judges no classes")
    elif count < SPLITS:
        notes.append(f"no inception score: {count} images for {SPLITS} splits")
    else:
        score, splits = inception_score(logits_MC), SPLITS
        values |= {"inception_score": score.mean, "inception_score_std": score.std, "inception_score_whole": score.whole}
    fewest = 0 if known_RD is None else min(count, len(known_RD))
    if known_RD is None or not len(known_RD):
        notes.append("no kernel distance, precision, recall, density and coverage: the reference has neither features nor images")
    elif fewest <= max(K, K_DENSITY):
        notes.append(f"no kernel distance, precision, recall, density and coverage: {fewest} images; {K_DENSITY + 1} are needed")
    else:
        # Small sets are halved, so that subsets differ and their spread means something.
        kernel = kernel_distance(features_MD, known_RD, subset_size=min(SUBSET_SIZE, fewest // 2), device=device)
        subsets, subset_size = kernel.subsets, kernel.subset_size
        values |= {"kernel_distance": kernel.mean, "kernel_distance_std": kernel.std}
        values |= asdict(precision_recall(features_MD, known_RD, device=device))
    if logits_MC is not None and labels_M is not None:
        values["class_accuracy"] = class_accuracy(logits_MC.argmax(1), labels_M)
    parameters = {
        "inception_score_splits": splits,
        "kernel_distance_subsets": subsets,
        "kernel_distance_subset_size": subset_size,
        "k_of_precision_and_recall": K,
        "k_of_density_and_coverage": K_DENSITY,
    }
    return Scores(values, parameters, tuple(notes))
