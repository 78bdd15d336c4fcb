"""One evaluation: sharded over processes, resumable, with a report that holds everything the numbers depend on.

1. The first process checks everything that can be refused, and finds the shards that are still to be made. A shard is one batch.
2. Process r of R makes every R-th of them: images, their features and logits. Each becomes a file when it is finished.
3. The first process reads the shards in their order, merges moments, measures the reference and scores.

Neither interruptions nor the number of processes change the result: a shard does not depend on who makes it, and the order of
merging is fixed. The same command continues a killed evaluation.
"""

from __future__ import annotations

import logging
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continuar import __version__
from continuar.config import differences, rename_old_fields, to_json
from continuar.distributed import SingleProcess
from continuar.errors import UserError, require
from continuar.evaluation.metrics import NeighbourSearch, neighbours_picture
from continuar.evaluation.networks import Extracted, FeatureNetwork
from continuar.evaluation.reference import (
    REFERENCE_IMAGES,
    Reference,
    Scores,
    Statistics,
    open_reference,
    read_statistics,
    score_samples,
    write_statistics,
)
from continuar.evaluation.samples import Samples, hxw
from continuar.io import checksum, read_json, read_tensors, write_json, write_tensors
from continuar.pictures import grid, save_png

FORMAT = 1
JOB, RESULT = "job.json", "result.json"
PREVIEW = 100
"""The pixels of so many samples are kept, for pictures."""
NEIGHBOURS = 4
_LOG = logging.getLogger("continuar")

OnProgress = Callable[[int, int], None]
"""Called with (done, in all)."""
Bar = Callable[[str], OnProgress]
"""Makes a progress callback from a description."""


def no_bar(description: str) -> OnProgress:
    """Shows nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of one evaluation."""

    batch_size: int = 64
    """Images generated and measured together; they make one shard."""
    reference_images: int = REFERENCE_IMAGES
    """If the reference is images: how many of them to use for precision, recall, density, coverage and the kernel distance."""
    split: str = "train"
    """Part of the reference to read, if it has several, such as "train" or "test"."""
    save_images: bool = False
    """Keep every image as images/NNNNNN.png."""
    neighbours: int = 0
    """Show the nearest reference images of this many samples in neighbours.png."""
    discard_shards: bool = False
    """Delete the features of the samples after the result is written."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch size is {self.batch_size}; allowed: 1 or more")
        require(self.reference_images >= 0, f"reference images is {self.reference_images}; allowed: 0 or more")
        require(0 <= self.neighbours <= PREVIEW, f"neighbours is {self.neighbours}; allowed: 0 to {PREVIEW}")


@dataclass(frozen=True)
class Speed:
    """Times of one run, without what an interrupted one made before."""

    wall_seconds: float
    """From the first check to the last score."""
    images_per_second: float | None
    """Making samples and their features, all processes together; None if all had been made before."""
    images_made: int
    process_seconds: float
    """Summed over processes and interrupted runs."""
    processes: int


@dataclass(frozen=True)
class Report:
    """The result of an evaluation, as JSON and as a table."""

    samples: dict[str, Any]
    reference: dict[str, Any]
    network: FeatureNetwork
    dimensions: int
    scores: Scores
    notes: tuple[str, ...]
    speed: Speed
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns the content of result.json."""
        network, values = self.network, self.scores.values
        return {
            "format": FORMAT,
            "samples": self.samples,
            "reference": self.reference,
            "network": {"name": network.name, "sha256": network.sha256, "dimensions": self.dimensions},
            "is_fid": network.is_fid,
            "scores": values,
            "titles": {name: title for name, title in titles(network).items() if name in values},
            "parameters": self.scores.parameters,
            "notes": list(self.notes),
            "speed": asdict(self.speed),
            "provenance": self.provenance,
        }

    def table(self) -> str:
        """Formats the report for people, one line per fact."""
        s, r, speed = self.samples, self.reference, self.speed
        what = f"{s['model']} ({s['weights']})" if s["kind"] == "generated" else s["path"]
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in s.get("settings", {}).items())
        kept = f"{r['images_of_precision_and_recall']} of them for precision, recall and kernel distance"
        rate = "all made before" if speed.images_per_second is None else f"{speed.images_per_second:.3g} images/s"
        lines = [
            ("samples", f"{what}: {s['images']} images of {hxw(s['size'])}" + (f", seed {s['seed']}" if "seed" in s else "")),
            *([("settings", settings)] if settings else []),
            ("reference", f"{r['path']}: {r['images'] or 'an unknown number of'} images; {kept}"),
            ("network", f"{self.network.name}, {self.dimensions} features, weights SHA-256 {self.network.sha256}"),
            ("", ""),
            *self._scores(),
            ("", ""),
            *(("note", note) for note in self.notes),
            ("time", f"{speed.wall_seconds:.1f} s, {rate}" + (f", {speed.processes} processes" if speed.processes > 1 else "")),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines) + "\n"

    def _scores(self) -> list[tuple[str, str]]:
        v, k, names = self.scores.values, self.scores.parameters, titles(self.network)
        # The first value of a line decides whether the line is there.
        lines = {
            "frechet_distance": "{frechet_distance:.4f}",
            "spatial_frechet_distance": "{spatial_frechet_distance:.4f}",
            "inception_score": "{inception_score:.3f} ± {inception_score_std:.3f} ({inception_score_splits} splits), "
            "{inception_score_whole:.3f} (all at once)",
            "kernel_distance": "{kernel_distance:.6f} ± {kernel_distance_std:.6f} "
            "({kernel_distance_subsets} subsets of {kernel_distance_subset_size})",
            "precision": "{precision:.4f}, {recall:.4f} (k = {k_of_precision_and_recall})",
            "density": "{density:.4f}, {coverage:.4f} (k = {k_of_density_and_coverage})",
            "class_accuracy": "{class_accuracy:.4f}",
        }
        names |= {"precision": "precision, recall", "density": "density, coverage"}
        return [(names[name], text.format(**v, **k)) for name, text in lines.items() if name in v]


def titles(network: FeatureNetwork) -> dict[str, str]:
    """Returns the names that the values of `Scores` may be called by."""
    score, kernel = network.title("IS", "inception score"), network.title("KID", "kernel distance")
    return {
        "frechet_distance": network.title("FID", "Frechet distance"),
        "spatial_frechet_distance": network.title("sFID", "spatial Frechet distance"),
        "inception_score": score,
        "inception_score_std": f"{score}, std over splits",
        "inception_score_whole": f"{score}, of all at once",
        "kernel_distance": kernel,
        "kernel_distance_std": f"{kernel}, std over subsets",
        **{name: network.title(name, name) for name in ("precision", "recall", "density", "coverage")},
        "class_accuracy": "class accuracy",
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns versions, hardware and commit."""
    return {
        "continuar": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def commit() -> str | None:
    """Returns the commit this package runs from, with "+changes" if files have changed since; None outside its own checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed into someone else's repository must not report that repository's commit.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain", "--untracked-files=no") else revision


@dataclass(frozen=True)
class Shards:
    """The shards of one job in one directory: ``count`` images, ``size`` to a shard.

    job.json holds everything that decides the images and their features; another job is not continued. Shard k is
    shards/NNNNNN.safetensors, and beside it NNNNNN.json with its checksum, written last: without it a shard counts as unfinished.
    """

    directory: Path
    job: dict[str, Any]
    count: int
    size: int

    def check(self) -> None:
        """Refuses a directory in which the job can neither begin nor continue.

        Raises:
            UserError: it holds another job, or something else.
        """
        directory, path = self.directory, self.directory / JOB
        require(not directory.exists() or directory.is_dir(), f"--out is the file {directory}; allowed: a directory")
        if path.is_file():
            old = rename_old_fields(read_json(path))
            if old.get("settings", {}).get("engine") == "graphs":
                # The name of the fast engine in version 0.1.0. No general rule: training has an engine of that name.
                old["settings"]["engine"] = "fast"
            differing = differences(old, to_json(self.job))
            listed = "; ".join(differing[:3]) + (f"; {len(differing) - 3} more" if len(differing) > 3 else "")
            require(not differing, f"{directory} holds an evaluation of other settings ({listed}); choose another directory")
        else:
            empty = not directory.exists() or not any(directory.iterdir())
            require(empty, f"{directory} is not empty; choose another directory")

    def begin(self) -> None:
        """Writes the job, if it is not there."""
        if not (self.directory / JOB).is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / JOB, self.job)

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def rows(self, number: int) -> range:
        """Returns the images of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def _paths(self, number: int) -> tuple[Path, Path]:
        folder = self.directory / "shards"
        return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"

    def save(self, number: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """Writes a finished shard, and how long it took."""
        data, seal = self._paths(number)
        data.parent.mkdir(exist_ok=True)
        write_tensors(data, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()})
        write_json(seal, {"crc32": checksum(data), "images": len(self.rows(number)), "seconds": seconds})

    def is_finished(self, number: int) -> bool:
        """Tells whether a shard is there and intact, and warns of a damaged one."""
        data, seal = self._paths(number)
        if not (data.is_file() and seal.is_file()):
            return False
        try:
            intact = checksum(data) == read_json(seal).get("crc32")
        except (UserError, AttributeError):
            intact = False
        if not intact:
            # Without its seal it is unfinished from now on, also for the other processes.
            _LOG.warning("shard %s is damaged and made again", data)
            seal.unlink()
        return intact

    def unfinished(self) -> list[int]:
        """Returns the shards that are still to be made."""
        return [n for n in range(len(self)) if not self.is_finished(n)]

    def load(self, number: int) -> tuple[dict[str, np.ndarray], float]:
        """Returns a finished shard's arrays and seconds.

        Raises:
            UserError: it is missing, or its checksum differs.
        """
        data, seal = self._paths(number)
        require(self.is_finished(number), f"{data} is missing or damaged; the same command makes it again")
        return {k: v.numpy() for k, v in read_tensors(data).items()}, float(read_json(seal)["seconds"])

    def discard(self) -> None:
        """Deletes every shard."""
        shutil.rmtree(self.directory / "shards", ignore_errors=True)


def evaluate(
    samples: Samples,
    reference: str | Path,
    network: FeatureNetwork,
    out: str | Path,
    *,
    options: EvaluationOptions | None = None,
    group: SingleProcess | None = None,
    bar: Bar = no_bar,
) -> Report | None:
    """Scores samples and writes OUT/result.json, samples.png and the pictures that the options ask for.

    Args:
        samples: what to score.
        reference: statistics or images in an npz file, a folder, or Parquet.
        network: whose features.
        out: a new or empty directory, or that of the same evaluation, which then continues.
        group: the processes that share the work; each calls this with equal arguments.
        bar: shows progress.

    Returns:
        The report; None in processes other than the first.

    Raises:
        UserError: see `open_reference`, `Shards.check`, `EvaluationOptions`; settings that the model refuses.
    """
    options, group, out = options or EvaluationOptions(), group or SingleProcess(), Path(out)
    began = time.perf_counter()
    opened, described, shards = None, {}, None
    if group.first:
        opened = _open(reference, network, samples, options)
        described, shards = _job(samples, network, out, options)
        shards.check()
    shards, unfinished = group.share_object((shards, shards.unfinished() if shards else []))
    assert shards is not None
    # Strided, not in runs: the processes make the low numbers first, and finish at about the same time.
    mine = unfinished[group.rank :: group.world]
    _make(samples, network, shards, mine, save_images=options.save_images, on_progress=bar("samples"))
    group.wait()
    if opened is None:
        return None
    made, seconds = sum(len(shards.rows(n)) for n in unfinished), time.perf_counter() - began
    found, preview_PHW3, process_seconds = _collect(shards, samples.count)
    search = NeighbourSearch(found.features_ND[: options.neighbours], NEIGHBOURS) if options.neighbours else None
    statistics = opened.measure(
        network,
        batch_size=options.batch_size,
        kept=options.reference_images,
        search=search,
        on_progress=None if opened.is_ready and search is None else bar("reference"),
    )
    # Logits of other classes cannot tell whether an image shows what was asked for.
    labels = samples.labels if samples.classes and samples.classes == network.classes else None
    scores = score_samples(found, statistics, labels_M=labels, device=network.device)
    against = {
        "path": opened.name,
        "source": statistics.source,
        "images": statistics.moments.count,
        "images_of_precision_and_recall": 0 if statistics.features_RD is None else len(statistics.features_RD),
    }
    rate = made / seconds if made else None
    speed = Speed(time.perf_counter() - began, rate, made, process_seconds, group.world)
    notes = (*samples.notes, *opened.notes, *scores.notes)
    dimensions = found.features_ND.shape[1]
    report = Report(described, against, network, dimensions, scores, notes, speed, provenance(network.device))
    save_png(grid(preview_PHW3), out / "samples.png")
    if search is not None:
        _draw_neighbours(search, preview_PHW3, opened, out / "neighbours.png")
    # Last of all: a sweep takes an evaluation with a result for finished.
    write_json(out / RESULT, report.to_json())
    if options.discard_shards:
        shards.discard()
    return report


def _open(reference: str | Path, network: FeatureNetwork, samples: Samples, options: EvaluationOptions) -> Reference:
    """Opens the reference, and refuses neighbours that it or the samples cannot give."""
    require(samples.count >= 2, f"{samples.name} has {samples.count} images; at least 2 are needed")
    opened = open_reference(reference, network, samples.size, options.split)
    require(
        options.neighbours <= samples.count,
        f"neighbours is {options.neighbours}; allowed: 0 to {samples.count}, the number of images",
    )
    count = 0 if opened.images is None else len(opened.images)
    require(
        not options.neighbours or count >= NEIGHBOURS,
        f"neighbours need a reference with {NEIGHBOURS} images; {reference} has {count}",
    )
    return opened


def _job(samples: Samples, network: FeatureNetwork, out: Path, options: EvaluationOptions) -> tuple[dict[str, Any], Shards]:
    """Describes the samples, and the shards of their job."""
    described = samples.describe() | {"batch_size": options.batch_size}
    # A model or folder of another name or place is still the same: hashes of contents decide.
    job = {name: value for name, value in described.items() if name not in ("model", "weights", "path")}
    job |= {"network": network.name, "network_sha256": network.sha256, "save_images": options.save_images}
    return described, Shards(out, job, samples.count, options.batch_size)


def finished(
    samples: Samples, reference: str | Path, network: FeatureNetwork, out: Path, options: EvaluationOptions
) -> dict[str, Any] | None:
    """Returns the content of result.json if this evaluation is finished; None if it is not, or not begun.

    Raises:
        UserError: another evaluation is there, or one against another reference.
    """
    if not (out / RESULT).is_file():
        return None
    _job(samples, network, out, options)[1].check()
    found = read_json(out / RESULT)
    path = found["reference"]["path"]
    require(path == str(reference), f"{out} holds an evaluation against {path}, not {reference}; choose another directory")
    return found


def measured(
    path: str | Path, network: FeatureNetwork, size: tuple[int, int], target: Path, options: EvaluationOptions, bar: Bar = no_bar
) -> Statistics:
    """Returns a reference's statistics, and keeps them in the file ``target`` unless they are ready as they are.

    Raises:
        UserError: as `open_reference`; ``target`` is of another reference or network.
    """
    opened = open_reference(path, network, size, options.split)
    if opened.is_ready:
        return opened.measure(network)
    if target.is_file():
        found, _ = read_statistics(target)
        if found is None or not found.matches(network) or (found.source, found.size) != (opened.name, size):
            raise UserError(f"{target} is not of {opened.name} in the features of '{network.name}'; choose another directory")
        return found
    statistics = opened.measure(network, batch_size=options.batch_size, kept=options.reference_images, on_progress=bar("reference"))
    write_statistics(target, statistics)
    return statistics


def _make(
    samples: Samples, network: FeatureNetwork, shards: Shards, numbers: list[int], *, save_images: bool, on_progress: OnProgress
) -> None:
    """Makes these shards."""
    for done, number in enumerate(numbers):
        on_progress(done, len(numbers))
        began, rows = time.perf_counter(), shards.rows(number)
        images_BHW3 = samples.make(rows.start, shards.size)
        found = network(images_BHW3)
        shards.begin()  # after the first batch, so that a refusal of the model leaves nothing behind
        arrays = {"features": found.features_ND, "logits": found.logits_NC, "spatial": found.spatial_NS}
        # Pictures are drawn by the first process, which may not have made these samples.
        if rows.start < PREVIEW:
            arrays["pixels"] = images_BHW3[: PREVIEW - rows.start]
        if save_images:
            folder = shards.directory / "images"
            folder.mkdir(exist_ok=True)
            for index, pixels in zip(rows, images_BHW3, strict=True):
                save_png(pixels, folder / f"{index:06d}.png")
        shards.save(number, {k: v for k, v in arrays.items() if v is not None}, time.perf_counter() - began)
    on_progress(len(numbers), len(numbers))


def _collect(shards: Shards, count: int) -> tuple[Extracted, np.ndarray, float]:
    """Reads all shards in their order: features of every sample, pixels of the first `PREVIEW`, and the seconds they took."""
    # Filled in place: at 50,000 samples, lists and their concatenations would hold everything twice.
    full: dict[str, np.ndarray] = {}
    preview, seconds = [], 0.0
    for number in range(len(shards)):
        arrays, took = shards.load(number)
        if "pixels" in arrays:
            preview.append(arrays.pop("pixels"))
        for name, values in arrays.items():
            full.setdefault(name, np.empty((count, values.shape[1]), np.float32))[shards.rows(number)] = values
        seconds += took
    return Extracted(full["features"], full.get("logits"), full.get("spatial")), np.concatenate(preview), seconds


def _draw_neighbours(search: NeighbourSearch, preview_PHW3: np.ndarray, opened: Reference, path: Path) -> None:
    distances_QK, indices_QK = search.result()
    assert opened.images is not None
    found = np.stack([opened.images.take(row) for row in indices_QK.tolist()])
    save_png(neighbours_picture(preview_PHW3[: len(indices_QK)], found, distances_QK), path)
