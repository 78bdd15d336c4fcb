"""Slices of the whole job, as a command that is killed and called again; and the fall from engine to engine."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from shipping import slices
from shipping.children import Ended
from shipping.kept import Folders, Record
from shipping.planning import unplanned

from continuar.configs import to_json
from continuar.recipes import find_recipe
from tests.tiny import write_images

ROOT = Path(__file__).parents[2]
TINY = [
    *("data.classes=2", "tokenizer.patch=8", "train.engine=eager", "train.batch_size=4", "train.save_images=40"),
    *("train.log_images=40", "backbone.width=16", "backbone.heads=2", "backbone.encoder_depth=1", "backbone.decoder_depth=1"),
    *("backbone.buffer=1", "head.width=8", "head.depth=1", "sampling.steps=2", "sampling.head.diffusion_steps=2"),
]


def test_a_slice_that_was_killed_goes_on_and_needs_no_command_line_library(tmp_path: Path) -> None:
    data, results = write_images(tmp_path / "data", size=32), tmp_path / "results"
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "tyro.py").write_text("raise ImportError('tyro is not there')")
    path = [str(tmp_path / "blocked"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "ship_cifar10.py"), "slice", "--minutes", "30", "--device", "cpu"]
    command += ["--work", str(tmp_path / "work"), "--results", str(results), "--train", str(data), "--test", str(data)]
    command += ["--squeezenet", str(data / "ant" / "0.png"), "--classifier-options", "--width 8 --epochs 1 --batch-size 8"]
    command += ["--processes", "2"]

    def state() -> Record:
        return Record.load(results / "record.json")

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--set", *TINY], env=environment, stdout=log, stderr=log)
        while not (results / "raw.safetensors").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert state().classifier["result"]["test_images"] == 12
    images = Folders(tmp_path / "work", results).images_of_segment() + 200

    command += ["--set", f"train.images={images}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "classifier: " not in done.stdout  # it was kept
    record = state()
    assert (record.images, record.finished, len(record.slices), len(record.segments)) == (images, True, 2, 1)
    expected = {f"{n}.safetensors" for n in ("ema", "raw", "classifier")} | {"grid.png", "metrics.jsonl", "record.json"}
    assert {p.name for p in results.iterdir()} == expected
    lines = [json.loads(line)["images"] for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
    assert lines[-1] == images
    assert f"images        {images:,} (" in done.stdout


def test_measuring_scripts_import_without_the_command_line_library() -> None:
    script = "import sys; sys.modules['tyro'] = None; import evaluate_cifar10, heldout_loss, cifar10_classifier, shipping.work"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=120)


@pytest.mark.parametrize(
    ("outcomes", "tried", "failed"),
    [
        ({"compile-graphs": ("finished", True)}, ["compile-graphs"], []),
        ({"compile-graphs": ("too slow", False), "graphs": ("finished", True)}, ["compile-graphs", "graphs"], ["compile-graphs"]),
        (
            {"compile-graphs": ("failed", False), "graphs": ("failed", False), "eager": ("failed", False)},
            ["compile-graphs", "graphs", "eager"],
            ["compile-graphs", "graphs"],
        ),
        # One that failed after it had started may be tried again by the next slice.
        ({"compile-graphs": ("failed", True), "graphs": ("finished", True)}, ["compile-graphs", "graphs"], []),
    ],
)
def test_engines_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, tuple], tried: list[str], failed: list[str]
) -> None:
    seen: list[str] = []

    def outcome(job, run, stop) -> tuple[Ended, bool]:
        seen.append(run.train.engine)
        reason, started = outcomes[run.train.engine]
        return Ended(reason, 1.0, ()), started

    monkeypatch.setattr(slices, "train_with", outcome)
    options = Namespace(minutes=10, evaluate=False, later_minutes=None, engine=None, least_seconds=30, processes=1)
    record = Record(run=to_json(unplanned(find_recipe("cifar10")())), segments=[{"origin": "initial weights", "images": 0}])
    job = slices.Job(options, Folders(tmp_path, tmp_path), record, time.time())
    slices.train_model(job)
    assert (seen, record.failed_engines) == (tried, failed)
    seen.clear()
    slices.train_model(job)
    assert seen == [engine for engine in tried if engine not in failed]


def test_the_end_is_planned_from_the_measured_rate_or_not_at_all(tmp_path: Path) -> None:
    run = unplanned(find_recipe("cifar10")())
    record = Record(segments=[{"origin": "initial weights", "images": 0}], slices=[{"startup_seconds": 20.0}])
    options = Namespace(minutes=10, later_minutes=2.0)
    job = slices.Job(options, Folders(tmp_path, tmp_path), record, time.time())
    assert slices.planned(job, run, time.time() + 120) == run
    assert "no rate of training was measured yet" in job.notes[-1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"images": 512, "images_per_second": 1000}\n')
    # 120 s now and 120 s later, each less 20 s of start, at 980 images per second.
    assert slices.planned(job, run, time.time() + 120).train.images == pytest.approx(196_000, rel=0.01)


def test_guidance_is_the_lowest_that_is_accurate_enough() -> None:
    def chosen(**accuracy: float) -> float:
        rows = [{"guidance": float(k[1:]), "class_accuracy_of_first_1000": v} for k, v in accuracy.items()]
        return slices.best_guidance(Record(model={"sampling": {"guidance": 2.5}}, evaluation={"accuracy": {"rows": rows}}))

    assert chosen(g3=0.95, g1=0.5, g2=0.91) == 2
    assert chosen(g1=0.5, g2=0.8, g3=0.7) == 2
    assert chosen() == 2.5
