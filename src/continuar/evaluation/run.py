"""The result of an evaluation: every number with all it depends on, as JSON and as a table.

Work cut into shards that survive a kill.

1. A job is a directory with ``job.json``: everything that decides its shards. Another job is not continued there.
2. Shard k is the images k size, k size + 1, ...: one batch. A finished one is ``shards/NNNNNN.safetensors``, and beside it
   ``NNNNNN.json`` with its checksum, written last. One without it, or with another checksum, is made again.
3. Which process makes a shard does not matter to what is in it, and shards are read in their order: results depend neither on the
   number of processes nor on interruptions.

An evaluation from beginning to end, by any number of processes.

1. The first process checks everything that can be checked, opens the job's directory and says which shards are still to be made.
2. Process r of R makes every R-th of them: images, their features and logits, one batch at a time; each is a file when finished.
3. The first process reads the shards in their order, merges moments, measures the reference and scores.

A killed evaluation continues with the same command.
"""

from __future__ import annotations

import logging
import math
import os
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
from continuar.checkpoints.store import checksum, read_json, read_tensors, write_json, write_tensors
from continuar.config import differences, to_json
from continuar.distributed import EvaluationProcesses
from continuar.errors import UserError, require
from continuar.evaluation.metrics import K_DENSITY, K, NeighbourSearch, neighbours_picture
from continuar.evaluation.networks import FeatureNetwork
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
from continuar.evaluation.samples import Samples, by
from continuar.pictures import grid, save_png
from continuar.statistics import MomentAccumulator, Moments

FORMAT = 1


@dataclass(frozen=True)
class Speed:
    """Of one run; what an interrupted one had made before does not count."""

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
    """See the module's docstring."""

    samples: dict[str, Any]
    reference: dict[str, Any]
    network: dict[str, Any]
    is_fid: bool
    scores: Scores
    notes: tuple[str, ...]
    speed: Speed
    provenance: dict[str, Any]

    def title(self, short: str, long: str) -> str:
        """As `FeatureNetwork.title`."""
        return short if self.is_fid else f"{long} ({self.network['name']})"

    def to_json(self) -> dict[str, Any]:
        """What result.json holds."""
        scores = self.scores
        return {
            "format": FORMAT,
            "samples": self.samples,
            "reference": self.reference,
            "network": self.network,
            "is_fid": self.is_fid,
            "scores": scores.values(),
            "titles": {name: title for name, title in titles(self).items() if name in scores.values()},
            "parameters": {
                "inception_score_splits": scores.inception_score.splits if scores.inception_score else None,
                "kernel_distance_subsets": scores.kernel_distance.subsets if scores.kernel_distance else None,
                "kernel_distance_subset_size": scores.kernel_distance.subset_size if scores.kernel_distance else None,
                "k_of_precision_and_recall": K,
                "k_of_density_and_coverage": K_DENSITY,
            },
            "notes": list(self.notes),
            "speed": asdict(self.speed),
            "provenance": self.provenance,
        }

    def table(self) -> str:
        """For people, one line per fact."""
        s, r, n = self.samples, self.reference, self.network
        what = f"{s['model']} ({s['weights']})" if s["kind"] == "generated" else s["path"]
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in s.get("settings", {}).items())
        lines = [
            ("samples", f"{what}: {s['images']} images of {by(s['size'])}" + (f", seed {s['seed']}" if "seed" in s else "")),
            *([("settings", settings)] if s["kind"] == "generated" else []),
            ("reference", f"{r['path']}: {r['images'] or 'an unknown number of'} images; {self._second_reference()}"),
            ("network", f"{n['name']}, {n['dimensions']} features, weights SHA-256 {n['sha256']}"),
            ("", ""),
            *self._scores(),
            ("", ""),
            *(("note", note) for note in self.notes),
            ("time", self._time()),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines) + "\n"

    def _second_reference(self) -> str:
        return f"{self.reference['images_of_precision_and_recall']} of them for precision, recall and kernel distance"

    def _scores(self) -> list[tuple[str, str]]:
        s, names = self.scores, titles(self)
        lines = [(names["frechet_distance"], f"{s.frechet_distance:.4f}")]
        if s.spatial_frechet_distance is not None:
            lines.append((names["spatial_frechet_distance"], f"{s.spatial_frechet_distance:.4f}"))
        if s.inception_score is not None:
            i = s.inception_score
            lines.append((names["inception_score"], f"{i.mean:.3f} ± {i.std:.3f} ({i.splits} splits), {i.whole:.3f} (whole)"))
        if s.kernel_distance is not None:
            k = s.kernel_distance
            lines.append((names["kernel_distance"], f"{k.mean:.6f} ± {k.std:.6f} ({k.subsets} subsets of {k.subset_size})"))
        if s.precision_recall is not None:
            p = s.precision_recall
            lines.append(("precision, recall", f"{p.precision:.4f}, {p.recall:.4f} (k = {K})"))
            lines.append(("density, coverage", f"{p.density:.4f}, {p.coverage:.4f} (k = {K_DENSITY})"))
        if s.class_accuracy is not None:
            lines.append((names["class_accuracy"], f"{s.class_accuracy:.4f}"))
        return lines

    def _time(self) -> str:
        speed = self.speed
        rate = "all made before" if speed.images_per_second is None else f"{speed.images_per_second:.3g} images/s"
        more = f", {speed.processes} processes" if speed.processes > 1 else ""
        return f"{speed.wall_seconds:.1f} s, {rate}{more}"


def titles(report: Report) -> dict[str, str]:
    """What the values of `Scores` may be called."""
    score, kernel = report.title("IS", "inception score"), report.title("KID", "kernel distance")
    return {
        "frechet_distance": report.title("FID", "Frechet distance"),
        "spatial_frechet_distance": report.title("sFID", "spatial Frechet distance"),
        "inception_score": score,
        "inception_score_std": f"{score}, std over splits",
        "inception_score_whole": f"{score}, of all at once",
        "kernel_distance": kernel,
        "kernel_distance_std": f"{kernel}, std over subsets",
        **{name: report.title(name, name) for name in ("precision", "recall", "density", "coverage")},
        "class_accuracy": "class accuracy",
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """What computed it: versions, hardware, commit."""
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
    """The commit this package runs from, "+changes" if it was changed since; None if it is not in a checkout of its own."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain", "--untracked-files=no") else revision


JOB = "job.json"
_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class Shards:
    """``count`` images in shards of ``size``, of one job in one directory."""

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
            differing = differences(read_json(path), to_json(self.job))
            listed = "; ".join(differing[:3]) + (f"; {len(differing) - 3} more" if len(differing) > 3 else "")
            require(not differing, f"{directory} holds an evaluation of other settings ({listed}); choose another directory")
        else:
            empty = not directory.exists() or not any(directory.iterdir())
            require(empty, f"{directory} is not empty; choose another directory")

    def begin(self) -> None:
        """Writes the job, if it is not there; not before the first batch is made, so that what a model refuses leaves nothing."""
        if not (self.directory / JOB).is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / JOB, self.job)

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def rows(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def _paths(self, number: int) -> tuple[Path, Path]:
        folder = self.directory / "shards"
        return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"

    def save(self, number: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """Writes a finished shard, which took so long."""
        data, seal = self._paths(number)
        data.parent.mkdir(exist_ok=True)
        temporary = data.with_name(f".{data.name}.{os.getpid()}.tmp")
        write_tensors(temporary, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()})
        sealed = {"crc32": checksum(temporary), "images": len(self.rows(number)), "seconds": seconds}
        temporary.replace(data)
        write_json(seal, sealed)

    def is_finished(self, number: int) -> bool:
        """Whether a shard is there, intact; a damaged one is said loudly."""
        data, seal = self._paths(number)
        if not (data.is_file() and seal.is_file()):
            return False
        try:
            intact = checksum(data) == read_json(seal).get("crc32")
        except (UserError, AttributeError):
            intact = False
        if not intact:
            _LOG.warning("shard %s is damaged and made again", data)
            seal.unlink()
        return intact

    def unfinished(self) -> list[int]:
        """The shards that are still to be made."""
        return [n for n in range(len(self)) if not self.is_finished(n)]

    def load(self, number: int) -> tuple[dict[str, np.ndarray], float]:
        """A finished shard's arrays and seconds.

        Raises:
            UserError: it is not there, or its checksum differs.
        """
        data, seal = self._paths(number)
        require(self.is_finished(number), f"{data} is missing or damaged; the same command makes it again")
        return {k: v.numpy() for k, v in read_tensors(data).items()}, float(read_json(seal)["seconds"])

    def discard(self) -> None:
        """Deletes every shard."""
        shutil.rmtree(self.directory / "shards", ignore_errors=True)


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
    group: EvaluationProcesses | None = None,
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
    options, group, out = options or EvaluationOptions(), group or EvaluationProcesses(), Path(out)
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
