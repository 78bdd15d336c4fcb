"""One slice of the whole job: restore, classifier, training, grid, evaluation, table; each step said, each result kept at once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from continuar.checkpoints.store import WEIGHTS, read_json, write_json
from continuar.configs import differences, from_json, to_json
from continuar.errors import require
from continuar.recipes import find_recipe
from continuar.training.config import Run
from shipping.children import Ended, watch
from shipping.kept import MAX_FILE_BYTES, RECORD, Folders, Record, replace_file, restore
from shipping.planning import continuation, forecast, override, plan_end, unplanned
from shipping.tables import evaluation_table, slice_table

HERE = Path(__file__).parents[1]
DEFAULTS = ("train.save_images=1500000", "train.sample_images=0")
"""How a run in slices differs from the recipe, beside its open end: a checkpoint about every minute; grids at the end of slices."""
NEXT_ENGINE = {"compile-graphs": "graphs", "compile": "eager", "graphs": "eager"}
WARM_STEPS = 50
"""After so many steps every shape has most likely been compiled or captured."""
TAIL_SECONDS = 45.0
"""For the grid and the last files, after training."""
UNKNOWN_STARTUP_SECONDS = 30.0
"""From the start of a training process to its 50th step, where no slice has measured it."""
GRID_SECONDS = 60.0
"""The longest that drawing the grid may take."""
WANTED_ACCURACY = 0.9
"""Class accuracy of samples that the shipped defaults aim at."""
LOW_GUIDANCE = 1.5
"""Where distances tend to be smallest: measured beside the guidance that is chosen by accuracy."""
GRACE_SECONDS = 20.0
"""After the end of training, until a child that does not stop is killed."""


@dataclass
class Job:
    """One slice at work."""

    options: argparse.Namespace
    folders: Folders
    record: Record
    began: float
    notes: list[str] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    _said: float = 0.0

    @property
    def end(self) -> float:
        """When the slice is over, in seconds since the epoch."""
        return self.began + 60 * self.options.minutes

    def note(self, text: str) -> None:
        """Says something now and in the record."""
        print(f"[{time.time() - self.began:4.0f} s] {text}", flush=True)
        self.notes.append(text)

    def script(self, name: str, *arguments: str | Path) -> list[str]:
        """The command of a child."""
        return [sys.executable, str(HERE / name), *map(str, arguments)]

    def save(self) -> None:
        """The record with what this slice did so far."""
        self.entry |= {
            "minutes": round((time.time() - self.began) / 60, 2),
            "images_after": self.record.images,
            "notes": self.notes,
        }
        self.folders.publish_record(self.record)

    def tell(self, ended: Ended, what: str) -> None:
        """What became of a child."""
        if ended.reason == "finished":
            self.note(f"{what}: done in {ended.seconds:.0f} s; {ended.last_line}")
        else:
            self.note(f"{what}: {ended.reason} after {ended.seconds:.0f} s; {ended.last_line or 'it said nothing'}")
            print("".join(f"    {line}\n" for line in ended.tail), end="", flush=True)


def run_slice(options: argparse.Namespace) -> None:
    """Steps 1 to 6 of the module's docstring. A step that fails is said, and the ones after it are done all the same."""
    require(options.minutes > 0, f"--minutes is {options.minutes}; allowed: above 0")
    require(options.processes >= 1, f"--processes is {options.processes}; allowed: 1 or more")
    for path in (options.train, options.test, options.squeezenet):
        require(path.exists(), f"{path} does not exist")
    job = open_job(options)
    steps: list[tuple[str, Callable[[Job], None]]] = [
        ("classifier", train_classifier),
        ("training", train_model),
        ("grid", draw_grid),
    ]
    if options.evaluate:
        steps.append(("evaluation", evaluate))
    for name, step in steps:
        try:
            step(job)
        except Exception as problem:
            traceback.print_exc()
            job.note(f"{name} failed: {type(problem).__name__}: {problem}")
        job.save()
    job.folders.publish(job.record)
    print(slice_table(job.record, job.folders.metrics(job.record), job.folders.results))
    print(evaluation_table(job.record.evaluation), flush=True)


def open_job(options: argparse.Namespace) -> Job:
    """Restores what there is, and decides the run's config."""
    folders = Folders(options.work, options.results)
    record, note = find_record(options, folders)
    run = decide_run(options, record)
    changed = differences(record.run, to_json(run)) if record.run else []
    if not record.segments:
        record.segments.append({"origin": "initial weights", "images": 0})
    record.segments[-1]["images"] = folders.images_of_segment()
    record.run = to_json(run)
    job = Job(options, folders, record, options.began)
    job.entry = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit(),
        "images_before": record.images,
    }
    record.slices.append(job.entry)
    job.note(f"{note}; {record.images:,} images so far")
    if changed:
        job.note(f"config: {'; '.join(changed)}")
    job.checkpoint = folders.take_checkpoint(record, "")
    folders.publish(record)
    job.save()
    return job


def find_record(options: argparse.Namespace, folders: Folders) -> tuple[Record, str]:
    """The record to go on from, and a word about where it comes from."""
    if (folders.work / RECORD).is_file():
        return Record.load(folders.work / RECORD), f"going on in {folders.work}"
    if options.carry is not None:
        record = restore(options.carry, folders)
        if record.run:
            number = len(record.segments) - 1
            record.run = to_json(continuation(from_json(Run, record.run), number, options.rewarm_images))
            record.save(folders.work / RECORD)
            return record, f"new machine: weights from {options.carry}, moments re-warmed over {options.rewarm_images:,} images"
        return record, f"new machine: {options.carry} has no weights; from the beginning"
    folders.work.mkdir(parents=True, exist_ok=True)
    return Record(), f"from the beginning in {folders.work}"


def decide_run(options: argparse.Namespace, record: Record) -> Run:
    """The record's run, or the recipe's, with this call's overrides.

    Raises:
        UserError: an override that does not fit, or a model whose weights would be too large to ship.
    """
    run = from_json(Run, record.run, "run") if record.run else unplanned(override(find_recipe("cifar10")(), DEFAULTS))
    run = override(run, [f"data.path={json.dumps(str(options.train))}", *options.set])
    with torch.device("meta"):
        model = run.model_config(run.data.classes).build()
    size = 2 * sum(p.numel() for p in model.parameters())
    require(size < MAX_FILE_BYTES - 2**17, f"weights take {size / 2**20:.1f} MiB in bfloat16; allowed: less than 15.9")
    return run


def train_classifier(job: Job) -> None:
    """Step 2."""
    options, folder = job.options, job.folders.classifier
    if not (folder / "result.json").is_file():
        command = job.script("cifar10_classifier.py", "--train", options.train, "--test", options.test, "--out", folder)
        command += ["--minutes", str(options.classifier_minutes), "--device", options.device, *options.classifier_options.split()]
        end = min(job.end - TAIL_SECONDS, time.time() + 60 * options.classifier_minutes + 60)
        job.tell(watch(command, job.folders.work / "classifier.log", end=end), "classifier")
    if (folder / "result.json").is_file():
        job.record.classifier = {"config": read_json(folder / "config.json"), "result": read_json(folder / "result.json")}
        job.folders.publish(job.record)


def train_model(job: Job) -> None:
    """Step 3: one engine after another until one runs."""
    options, record = job.options, job.record
    run = from_json(Run, record.run, "run")
    stop = job.end - TAIL_SECONDS - (60 * options.evaluate_minutes if options.evaluate else 0)
    if options.later_minutes is not None:
        run = planned(job, run, stop)
        record.finished = False
    if record.finished:
        return job.note(f"training reached its end at {record.images:,} images; --later-minutes would plan another")
    engine = options.engine or run.train.engine
    while stop - time.time() > options.least_seconds:
        if engine in record.failed_engines and engine in NEXT_ENGINE and not options.engine:
            job.note(f"engine {engine} is passed over: it did not start before")
            engine = NEXT_ENGINE[engine]
            continue
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, engine=engine))
        ended, started = train_with(job, run, stop)
        if ended.reason == "finished":
            record.finished = record.images - record.images_before >= run.train.images
            return None
        if not started and engine in NEXT_ENGINE:
            record.failed_engines = sorted({*record.failed_engines, engine})
        if engine not in NEXT_ENGINE:
            return None
        engine = NEXT_ENGINE[engine]
        job.note(f"falling back to engine {engine}")
    return job.note("no time left for training")


def planned(job: Job, run: Run, stop: float) -> Run:
    """The run with its end where the slices end; as it is, where no slice has measured how fast it trains."""
    options, record = job.options, job.record
    rates = [line["images_per_second"] for line in job.folders.metrics(record)]
    if not rates:
        job.note("the end is not planned: no rate of training was measured yet; the learning rate stays as it is")
        return run
    startup = [s["startup_seconds"] for s in record.slices if "startup_seconds" in s][-1:] or [UNKNOWN_STARTUP_SECONDS]
    later = max(0.0, 60 * options.later_minutes - (startup[0] if options.later_minutes else 0))
    own = record.images - record.images_before
    run = plan_end(run, own, forecast(rates, stop - time.time() - startup[0] + later), record.images_before)
    falls = record.images_before + max(run.train.images - run.optim.decay_images, 0)
    job.note(f"planned to end at {record.images_before + run.train.images:,} images, the rate falling from {falls:,}")
    return run


def train_with(job: Job, run: Run, stop: float) -> tuple[Ended, bool]:
    """Trains with one engine; also whether it got as far as to be called started."""
    folders, record, options = job.folders, job.record, job.options
    write_json(folders.work / "run.json", run)
    record.run = to_json(run)
    heartbeat = folders.work / "heartbeat.json"
    heartbeat.unlink(missing_ok=True)
    began, before = time.time(), record.images
    state: dict[str, Any] = {}

    def tick() -> None:
        if heartbeat.is_file():
            state.update(read_json(heartbeat))
        if "startup_seconds" not in state and state.get("done", 0) >= WARM_STEPS:
            state["startup_seconds"] = round(time.time() - began, 1)
        job.checkpoint = folders.take_checkpoint(record, job.checkpoint)
        say_progress(job, state)

    command = job.script("ship_cifar10.py", "train", folders.work, "--stop-at", repr(stop), "--device", options.device)
    command += ["--processes", str(options.processes)]
    ended = watch(
        command,
        folders.work / f"train-{run.train.engine}.log",
        end=stop + GRACE_SECONDS,
        on_tick=tick,
        progress=lambda: state.get("done", 0),
        patience=options.compile_minutes * 60 if run.train.engine in NEXT_ENGINE else math.inf,
        warm_at=WARM_STEPS,
    )
    job.entry |= {k: v for k, v in state.items() if k in ("hardware", "torch", "startup_seconds")}
    job.entry |= {"engine": run.train.engine, "images": job.entry.get("images", 0) + record.images - before}
    job.tell(ended, f"training with engine {run.train.engine}")
    return ended, state.get("done", 0) >= WARM_STEPS


def say_progress(job: Job, state: dict[str, Any], every_seconds: float = 30.0) -> None:
    """A line now and then, and the metrics into the results."""
    if time.time() - job._said < every_seconds:
        return
    job._said = time.time()
    job.save()
    lines = job.folders.metrics(job.record)
    if lines and state:
        last = lines[-1]
        text = f"{last['images']:,} images  loss {last['loss']:.4f}  lr {last['lr']:.2e}  {last['images_per_second']:,.0f} images/s"
        print(f"[{time.time() - job.began:4.0f} s]   {text}", flush=True)


def draw_grid(job: Job) -> None:
    """Step 4."""
    work = job.folders.work
    if not (job.folders.model("raw") / WEIGHTS).is_file():
        return job.note("no grid: there are no weights yet")
    command = job.script("ship_cifar10.py", "grid", work, "--device", job.options.device)
    ended = watch(command, work / "grid.log", end=min(job.end - 5, time.time() + GRID_SECONDS))
    job.tell(ended, "grid")
    return job.folders.publish(job.record)


def evaluate(job: Job) -> None:
    """Step 5: what matters most comes first; every finished row is in the record at once."""
    options, folders = job.options, job.folders
    if not (folders.classifier / "result.json").is_file():
        return job.note("no evaluation: there is no classifier")
    ema, raw = folders.model("ema"), folders.model("raw")
    out, common = folders.work / "evaluation", ["--device", options.device]
    judged = [*common, "--train", options.train, "--test", options.test, "--squeezenet", options.squeezenet]
    judged += ["--classifier", folders.classifier, *options.evaluation_options.split()]
    few, many = options.samples
    plan: dict[str, list[str | Path]] = {
        "accuracy": [ema, "--samples", few, "--guidance", *options.guidance, "--out", out / "accuracy", *judged],
        "distance": [ema, raw, "--samples", many, "--out", out / "distance", *judged],
        "heldout_loss": [ema, raw, "--test", options.test, "--out", out / "heldout_loss" / "result.json", *common],
    }

    if job.record.evaluation.get("images") != job.record.images:
        job.record.evaluation = {"images": job.record.images}
    shutil.rmtree(out, ignore_errors=True)

    def collect() -> None:
        for name in plan:
            value = read_whole(out / name / "result.json")
            if value is not None and value != job.record.evaluation.get(name):
                job.record.evaluation[name] = value
                job.save()

    for name, arguments in plan.items():
        if job.end - time.time() < 10:
            job.note(f"{name}: no time left")
            continue
        if name == "distance":
            arguments += ["--guidance", *(options.distance_guidance or (LOW_GUIDANCE, best_guidance(job.record)))]
        script = "heldout_loss.py" if name == "heldout_loss" else "evaluate_cifar10.py"
        job.tell(watch(job.script(script, *arguments), out / f"{name}.log", end=job.end - 5, on_tick=collect), name)
        for picture in ("grid.png", "neighbours.png"):
            if (out / name / picture).is_file():
                replace_file(out / name / picture, folders.work / picture)
        folders.publish(job.record)
    return None


def best_guidance(record: Record) -> float:
    """The lowest guidance whose samples reach the wanted class accuracy, or else that of the highest accuracy."""
    rows = record.evaluation.get("accuracy", {}).get("rows", [])
    found = sorted((row["guidance"], row["class_accuracy_of_first_1000"]) for row in rows)
    enough = [guidance for guidance, accuracy in found if accuracy >= WANTED_ACCURACY]
    if enough or not found:
        return enough[0] if enough else float(record.model["sampling"]["guidance"])
    return max(found, key=lambda pair: pair[1])[0]


def read_whole(path: Path) -> Any:
    """The JSON of a file that another process may be writing; None while it is torn or not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def commit() -> str:
    """The commit of the checkout, or "unknown"."""
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
