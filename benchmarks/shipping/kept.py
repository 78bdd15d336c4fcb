"""What outlives the machine: a record, compact weights, metrics and pictures, each file replaced whole.

The work folder is the machine's: the run with its checkpoints, the classifier, saved models of the newest checkpoint. The results
folder is a few small files that travel, and from which another machine can go on:

* ``ema.safetensors``, ``raw.safetensors``: averaged and raw weights in bfloat16; ``classifier.safetensors`` likewise;
  ``tokenizer.safetensors`` where the tokenizer has a state
* ``metrics.jsonl``: every line since the beginning, images counted through
* ``record.json``: `Record`, with the config of the run and of the saved model
* ``grid.png``, ``neighbours.png``
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    TOKENIZER,
    WEIGHTS,
    atomic_directory,
    checksum,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from continuar.errors import require
from continuar.pipeline import newest_checkpoints
from continuar.training.state import OPTIMIZER, STATE

RECORD, METRICS, EARLIER = "record.json", "metrics.jsonl", "earlier.jsonl"
MAX_FILE_BYTES = 16 * 2**20
"""What a file of weights may take: the package holds no more, and transfers may have the same limit."""


@dataclass
class Record:
    """What was done so far, as JSON."""

    run: dict[str, Any] = field(default_factory=dict)
    """The run's config; empty before training began."""
    model: dict[str, Any] = field(default_factory=dict)
    """config.json of the saved model; empty before the first checkpoint."""
    segments: list[dict[str, Any]] = field(default_factory=list)
    """One per machine: origin of its weights, images trained there."""
    slices: list[dict[str, Any]] = field(default_factory=list)
    """One per call: begin, minutes, images, engine, hardware, torch, commit, notes."""
    classifier: dict[str, Any] = field(default_factory=dict)
    """Its config and its result; empty before it is trained."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Results by measurement, as the scripts wrote them."""
    finished: bool = False
    """Whether training reached its planned end."""
    failed_engines: list[str] = field(default_factory=list)
    """Engines that did not start on this kind of machine."""

    @property
    def images_before(self) -> int:
        """Images trained on in earlier segments."""
        return sum(s["images"] for s in self.segments[:-1])

    @property
    def images(self) -> int:
        """Images trained on in all."""
        return sum(s["images"] for s in self.segments)

    def save(self, path: Path) -> None:
        """Replaces the file at once."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Record:
        """The inverse of `save`.

        Raises:
            UserError: missing, not JSON, or other entries.
        """
        value, names = read_json(path), {f.name for f in dataclasses.fields(cls)}
        require(isinstance(value, dict) and set(value) == names, f"{path} is not a record; allowed: {', '.join(sorted(names))}")
        return cls(**value)


def replace_file(source: Path, destination: Path) -> None:
    """Copies a file: a reader sees all of the old or of the new one. What a kill leaves behind, the next call replaces."""
    temporary = destination.with_name(f".{destination.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(destination)


@dataclass(frozen=True)
class Folders:
    """The machine's folder and the one that travels."""

    work: Path
    results: Path

    @property
    def run(self) -> Path:
        """The training run."""
        return self.work / "run"

    @property
    def classifier(self) -> Path:
        """The saved classifier."""
        return self.work / "classifier"

    def model(self, kind: str) -> Path:
        """The saved model of the newest checkpoint, "ema" or "raw"."""
        return self.work / "models" / kind

    def images_of_segment(self) -> int:
        """Images of the newest checkpoint."""
        found = newest_checkpoints(self.run)
        step = int(read_json(found[0] / STATE)["step"]) if found else 0
        return step * int(read_json(self.run / CONFIG)["train"]["batch_size"]) if step else 0

    def publish(self, record: Record) -> None:
        """Puts everything there is into the results folder, weights first."""
        self.results.mkdir(parents=True, exist_ok=True)
        for kind in ("ema", "raw"):
            if (self.model(kind) / WEIGHTS).is_file():
                replace_file(self.model(kind) / WEIGHTS, self.results / f"{kind}.safetensors")
        if (self.model("ema") / TOKENIZER).is_file():
            replace_file(self.model("ema") / TOKENIZER, self.results / TOKENIZER)
        if (self.classifier / WEIGHTS).is_file():
            replace_file(self.classifier / WEIGHTS, self.results / "classifier.safetensors")
        self.publish_record(record)
        for name in ("grid.png", "neighbours.png"):
            if (self.work / name).is_file():
                replace_file(self.work / name, self.results / name)

    def publish_record(self, record: Record) -> None:
        """The record here and there, and the metrics."""
        record.save(self.work / RECORD)
        write_text(self.work / METRICS, "".join(f"{json.dumps(line)}\n" for line in self.metrics(record)))
        for name in (RECORD, METRICS):
            replace_file(self.work / name, self.results / name)

    def metrics(self, record: Record) -> list[dict[str, Any]]:
        """Every line of every segment, images counted through."""
        lines = _json_lines(self.work / EARLIER)
        number = len(record.segments) - 1
        own = _json_lines(self.run / METRICS)
        return lines + [{"segment": number, **line, "images": line["images"] + record.images_before} for line in own]

    def take_checkpoint(self, record: Record, seen: str) -> str:
        """Saves the newest checkpoint as compact models, if it is another than ``seen``; returns its name."""
        found = newest_checkpoints(self.run)
        if not found or found[0].name == seen:
            return seen
        for kind, file in (("ema", EMA), ("raw", WEIGHTS)):
            with atomic_directory(self.model(kind)) as temporary:
                for name in (CONFIG, TOKENIZER):
                    if (found[0] / name).is_file():
                        shutil.copyfile(found[0] / name, temporary / name)
                write_tensors(temporary / WEIGHTS, read_tensors(found[0] / file), torch.bfloat16)
        record.model = read_json(found[0] / CONFIG)
        record.segments[-1]["images"] = self.images_of_segment()
        self.publish(record)
        return found[0].name


def restore(carried: Path, folders: Folders) -> Record:
    """Sets up the work folder of a new machine from a results folder; the record is written last, so a torn restore is done again.

    The run begins with a checkpoint at step 0 that holds the carried weights and an optimizer without moments. Where only the
    averaged weights were carried, they are both.
    """
    record = Record.load(carried / RECORD)
    shutil.rmtree(folders.work, ignore_errors=True)
    folders.work.mkdir(parents=True)
    for name in ("grid.png", "neighbours.png"):
        if (carried / name).is_file():
            replace_file(carried / name, folders.work / name)
    # Lines after the last checkpoint are of a stretch whose weights were not kept.
    lines = [line for line in _json_lines(carried / METRICS) if line["images"] <= record.images]
    write_text(folders.work / EARLIER, "".join(f"{json.dumps(line)}\n" for line in lines))
    if record.classifier and (carried / "classifier.safetensors").is_file():
        with atomic_directory(folders.classifier) as temporary:
            write_json(temporary / CONFIG, record.classifier["config"])
            write_json(temporary / "result.json", record.classifier["result"])
            shutil.copyfile(carried / "classifier.safetensors", temporary / WEIGHTS)
    else:
        record.classifier = {}
    if (carried / "ema.safetensors").is_file():
        _first_checkpoint(carried, record, folders.run / "checkpoints" / "step-00000000")
        origin = "carried weights" if (carried / "raw.safetensors").is_file() else "carried weights, the averaged ones for both"
        record.segments.append({"origin": f"{origin}; moments start anew", "images": 0})
    else:
        record.run, record.model, record.segments = {}, {}, []
    record.save(folders.work / RECORD)
    return record


def _first_checkpoint(carried: Path, record: Record, destination: Path) -> None:
    average = carried / "ema.safetensors"
    raw = carried / "raw.safetensors"
    with atomic_directory(destination) as temporary:
        write_json(temporary / CONFIG, record.model)
        write_tensors(temporary / WEIGHTS, read_tensors(raw if raw.is_file() else average), torch.float32)
        write_tensors(temporary / EMA, read_tensors(average), torch.float32)
        if (carried / TOKENIZER).is_file():
            shutil.copyfile(carried / TOKENIZER, temporary / TOKENIZER)
        write_tensors(temporary / OPTIMIZER, {})
        sums = {p.name: checksum(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {"step": 0, "checksums": sums})


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still be written to."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
