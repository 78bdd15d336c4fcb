"""An evaluation from beginning to end, by any number of processes.

1. The first process checks everything that can be checked, opens the job's directory and says which shards are still to be made.
2. Process r of R makes every R-th of them: images, their features and logits, one batch at a time; each is a file when finished.
3. The first process reads the shards in their order, merges moments, measures the reference and scores.

A killed evaluation continues with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continuar.checkpoints.store import read_json, write_json
from continuar.errors import UserError, require
from continuar.evaluation.moments import MomentAccumulator, Moments
from continuar.evaluation.neighbours import NeighbourSearch, neighbours_picture
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.processes import Processes
from continuar.evaluation.reference import (
    REFERENCE_IMAGES,
    Reference,
    Statistics,
    open_reference,
    read_statistics,
    write_statistics,
)
from continuar.evaluation.report import Report, Speed, provenance
from continuar.evaluation.samples import Samples
from continuar.evaluation.scores import score_samples
from continuar.evaluation.shards import Shards
from continuar.pictures import grid, save_png

RESULT = "result.json"
PREVIEW = 100
"""Of this many images the pixels are kept, for pictures."""
NEIGHBOURS = 4

OnProgress = Callable[[int, int], None]
Bar = Callable[[str], OnProgress]


def no_bar(description: str) -> OnProgress:
    """Shows nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate, beside what and against what."""

    batch_size: int = 64
    """Images made and measured at once; a shard."""
    reference_images: int = REFERENCE_IMAGES
    """How many images of a reference without features give those of precision, recall, density, coverage, kernel distance."""
    split: str = "train"
    """Which part of a reference that has several."""
    save_images: bool = False
    """Keep every image as images/NNNNNN.png."""
    neighbours: int = 0
    """Show the nearest reference images of this many samples in neighbours.png."""
    discard_shards: bool = False
    """Delete the features of the samples once the result is written."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch size is {self.batch_size}; allowed: 1 or more")
        require(self.reference_images >= 0, f"reference images is {self.reference_images}; allowed: 0 or more")
        require(0 <= self.neighbours <= PREVIEW, f"neighbours is {self.neighbours}; allowed: 0 to {PREVIEW}")


def evaluate(
    samples: Samples,
    reference: str | Path,
    network: FeatureNetwork,
    out: str | Path,
    *,
    options: EvaluationOptions | None = None,
    group: Processes | None = None,
    bar: Bar = no_bar,
) -> Report | None:
    """Scores samples and writes OUT/result.json, samples.png and what else was asked for.

    Args:
        samples: what to score.
        reference: statistics or images in an npz file, a folder, or Parquet.
        network: whose features.
        out: a new or empty directory, or that of the same evaluation, which then continues.
        group: the processes that share the work; each calls this with equal arguments.
        bar: from a description to what is told (done, in all).

    Returns:
        The report; None in processes other than the first.

    Raises:
        UserError: see `open_reference`, `Shards.check`, `EvaluationOptions`; settings that the model refuses.
    """
    options, group, out = options or EvaluationOptions(), group or Processes(), Path(out)
    began = time.perf_counter()
    opened = _open(samples, reference, network, out, options) if group.is_first else None
    plan = group.share(None if opened is None else (opened.shards, opened.shards.unfinished()))
    assert plan is not None
    shards, unfinished = plan
    mine = unfinished[group.rank :: group.count]
    _make(samples, network, shards, mine, save_images=options.save_images, on_progress=bar("samples"))
    group.wait()
    if opened is None:
        return None
    against = opened.reference
    made = sum(len(shards.rows(n)) for n in unfinished)
    seconds = time.perf_counter() - began
    collected = _collect(shards, samples)
    search = NeighbourSearch(collected.features_MD[: options.neighbours], NEIGHBOURS) if options.neighbours else None
    measuring = None if against.is_ready and search is None else bar("reference")
    statistics = against.measure(
        network, batch_size=options.batch_size, kept=options.reference_images, search=search, on_progress=measuring
    )
    labels = samples.labels if samples.classes and samples.classes == network.classes else None
    device = next(network.module.parameters(), torch.empty(0)).device
    scores = score_samples(
        collected.moments,
        collected.features_MD,
        collected.logits_MC,
        statistics,
        labels_M=labels,
        spatial=collected.spatial,
        device=device,
    )
    report = Report(
        samples=opened.samples,
        reference=_describe(against, statistics),
        network={"name": network.name, "sha256": network.sha256, "dimensions": len(statistics.moments.mean)},
        is_fid=network.is_fid,
        scores=scores,
        notes=(*samples.notes, *against.notes, *scores.notes),
        speed=Speed(
            wall_seconds=time.perf_counter() - began,
            images_per_second=made / seconds if made else None,
            images_made=made,
            process_seconds=collected.seconds,
            processes=group.count,
        ),
        provenance=provenance(device),
    )
    save_png(grid(collected.preview_PHW3), out / "samples.png")
    if search is not None:
        _draw_neighbours(search, collected.preview_PHW3, against, out / "neighbours.png")
    write_json(out / RESULT, report.to_json())
    if options.discard_shards:
        shards.discard()
    return report


def measured(
    path: str | Path, network: FeatureNetwork, size: tuple[int, int], target: Path, options: EvaluationOptions, bar: Bar = no_bar
) -> Statistics:
    """A reference's statistics, kept in the file ``target`` unless they are ready as they are.

    Raises:
        UserError: as `open_reference`; ``target`` is of another reference or network.
    """
    opened = open_reference(path, network, size, options.split)
    if opened.is_ready:
        return opened.measure(network)
    if target.is_file():
        found, _ = read_statistics(target)
        if found is None or not found.is_of(network) or (found.source, found.size) != (opened.name, size):
            raise UserError(f"{target} is not of {opened.name} in the features of '{network.name}'; choose another directory")
        return found
    statistics = opened.measure(network, batch_size=options.batch_size, kept=options.reference_images, on_progress=bar("reference"))
    write_statistics(target, statistics)
    return statistics


@dataclass(frozen=True)
class _Opened:
    reference: Reference
    samples: dict[str, Any]
    """What the samples are."""
    shards: Shards


def _open(samples: Samples, reference: str | Path, network: FeatureNetwork, out: Path, options: EvaluationOptions) -> _Opened:
    """Everything that can be refused before the work begins is refused here."""
    opened = open_reference(reference, network, samples.size, options.split)
    require(
        options.neighbours <= samples.count,
        f"neighbours is {options.neighbours}; allowed: 0 to {samples.count}, the number of images",
    )
    if options.neighbours:
        count = 0 if opened.images is None else len(opened.images)
        require(count >= NEIGHBOURS, f"neighbours need a reference with {NEIGHBOURS} images; {reference} has {count}")
    described, shards = _shards(samples, network, out, options)
    shards.check()
    return _Opened(opened, described, shards)


def _shards(samples: Samples, network: FeatureNetwork, out: Path, options: EvaluationOptions) -> tuple[dict[str, Any], Shards]:
    """What the samples are, and the shards of their job."""
    described = samples.describe() | {"batch_size": options.batch_size}
    # What model and images are called, and where they lie, does not decide what they are.
    job = {name: value for name, value in described.items() if name not in ("model", "weights", "path")}
    job |= {"network": network.name, "network_sha256": network.sha256, "save_images": options.save_images}
    return described, Shards(out, job, samples.count, options.batch_size)


def finished(
    samples: Samples, reference: str | Path, network: FeatureNetwork, out: Path, options: EvaluationOptions
) -> dict[str, Any] | None:
    """What result.json holds if this evaluation is finished there; None if it is not, or not begun.

    Raises:
        UserError: another evaluation is there, or one against another reference.
    """
    if not (out / RESULT).is_file():
        return None
    _shards(samples, network, out, options)[1].check()
    found = read_json(out / RESULT)
    path = found["reference"]["path"]
    require(path == str(reference), f"{out} holds an evaluation against {path}, not {reference}; choose another directory")
    return found


def _make(
    samples: Samples, network: FeatureNetwork, shards: Shards, numbers: list[int], *, save_images: bool, on_progress: OnProgress
) -> None:
    """Makes these shards."""
    for done, number in enumerate(numbers):
        on_progress(done, len(numbers))
        began, rows = time.perf_counter(), shards.rows(number)
        images_BHW3 = samples.make(rows.start, shards.size)
        found = network(images_BHW3)
        shards.begin()
        arrays = {"features": found.features_ND}
        if found.logits_NC is not None:
            arrays["logits"] = found.logits_NC
        if found.spatial_NS is not None:
            arrays["spatial"] = found.spatial_NS
        if rows.start < PREVIEW:
            arrays["pixels"] = images_BHW3[: PREVIEW - rows.start]
        if save_images:
            folder = shards.directory / "images"
            folder.mkdir(exist_ok=True)
            for index, pixels in zip(rows, images_BHW3, strict=True):
                save_png(pixels, folder / f"{index:06d}.png")
        shards.save(number, arrays, time.perf_counter() - began)
    on_progress(len(numbers), len(numbers))


@dataclass(frozen=True)
class _Collected:
    moments: Moments
    features_MD: np.ndarray
    logits_MC: np.ndarray | None
    preview_PHW3: np.ndarray
    spatial: Moments | None
    seconds: float


def _collect(shards: Shards, samples: Samples) -> _Collected:
    """All shards, in their order."""
    sums, spatial, seconds, preview = MomentAccumulator(), MomentAccumulator(), 0.0, []
    whole: dict[str, np.ndarray] = {}
    for number in range(len(shards)):
        arrays, took = shards.load(number)
        for name, values in arrays.items():
            if name == "pixels":
                preview.append(values)
            elif name == "spatial":
                spatial.add(values)
            else:
                whole.setdefault(name, np.empty((samples.count, values.shape[1]), np.float32))[shards.rows(number)] = values
        sums.add(arrays["features"])
        seconds += took
    located = spatial.moments() if spatial.count else None
    return _Collected(sums.moments(), whole["features"], whole.get("logits"), np.concatenate(preview), located, seconds)


def _describe(opened: Reference, statistics: Statistics) -> dict[str, object]:
    return {
        "path": opened.name,
        "source": statistics.source,
        "images": statistics.moments.count,
        "images_of_precision_and_recall": 0 if statistics.features_RD is None else len(statistics.features_RD),
    }


def _draw_neighbours(search: NeighbourSearch, preview_PHW3: np.ndarray, opened: Reference, path: Path) -> None:
    distances_QK, indices_QK = search.result()
    images = opened.images
    assert images is not None
    found = np.stack([np.concatenate([images.read(i, i + 1) for i in row]) for row in indices_QK.tolist()])
    save_png(neighbours_picture(preview_PHW3[: len(indices_QK)], found, distances_QK), path)
