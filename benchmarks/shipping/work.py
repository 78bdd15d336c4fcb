"""What runs in processes of its own: training until a moment, drawing a grid; and the way from results to the shipped model."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import time

import numpy as np
import torch

import continuar
from continuar.checkpoints.store import ModelFile, load_state, read_json, read_tensors, read_tokenizer, write_json
from continuar.configs import from_json
from continuar.devices import pick_device
from continuar.errors import require
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline
from continuar.training.config import Run
from continuar.training.loop import Report, train
from continuar.training.parallel import Single, joined, local_device, processes
from shipping.children import dying_with_parent
from shipping.kept import RECORD, Folders, Record
from shipping.planning import override

MAX_MODEL_BYTES = 16_000_000
"""What the package may hold of one model."""
HEARTBEAT_SECONDS = 0.5


def hardware(device: torch.device) -> str:
    """What computes, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def start_others(count: int) -> None:
    """Makes this process the first of ``count`` that train together on this machine, and starts the others with its own arguments.

    torchrun would put them out of reach of whoever ends this process with its process group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in reversed(range(count)):
        os.environ.update({name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()})
        if rank:
            subprocess.Popen(dying_with_parent([sys.executable, *sys.argv]))


def train_child(options: argparse.Namespace) -> None:
    """Trains ``WORK/run.json`` in ``WORK/run`` until the run or the time ends, and says now and then how far it is."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    # Kept beside the run, so that the next slice on this machine compiles from the cache.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((options.work / "inductor").absolute()))
    device = pick_device(options.device)
    if options.processes > 1 and not processes():
        start_others(options.processes)
    device = local_device(device) if processes() else device
    with joined("ddp", device) as parallel:
        train_in_group(options, device, parallel)


def train_in_group(options: argparse.Namespace, device: torch.device, parallel: Single) -> None:
    """What each of the processes does that train together; the first one says how far they are."""
    run = from_json(Run, read_json(options.work / "run.json"), "run")
    facts = {"hardware": f"{parallel.world} x {hardware(device)}", "torch": torch.__version__}
    done, last_report, said = 0, Report(0, run.train.steps, {}), 0.0

    def beat(report: Report) -> None:
        nonlocal done, last_report, said
        done, last_report = done + 1, report
        if parallel.first and time.time() - said > HEARTBEAT_SECONDS:
            said = time.time()
            write_json(options.work / "heartbeat.json", {"done": done, **facts})

    train(
        run,
        options.work / "run",
        device=device,
        parallel=parallel,
        resume=True,
        force=True,  # what differs from the slice before was asked for, and said
        on_report=beat,
        should_stop=lambda: time.time() >= options.stop_at,
    )
    if parallel.first:
        write_json(options.work / "heartbeat.json", {"done": done, **facts})
        print(f"{done:,} steps, now at step {last_report.step:,} of {last_report.steps:,}")


def draw_child(options: argparse.Namespace) -> None:
    """``WORK/grid.png``: a row per class, six images of the averaged weights, then two of the raw ones."""
    folders, device = Folders(options.work, options.work), pick_device(options.device)
    parts, captions = [], []
    for kind, columns in (("ema", 6), ("raw", 2)):
        pipe = continuar.load(folders.model(kind), device=device)
        classes = pipe.classes
        labels = [i for i in range(len(classes)) for _ in range(columns)]
        images = pipe(labels, 0, batch_size=len(labels))
        parts.append(images.reshape(len(classes), columns, *images.shape[1:]))
        captions.append([[f"{name}{' (raw)' if kind == 'raw' else ''}"] * columns for name in classes])
    rows = np.concatenate(parts, axis=1)
    names = [caption for row in zip(*captions, strict=True) for part in row for caption in part]
    save_png(grid(rows.reshape(-1, *rows.shape[2:]), names, columns=rows.shape[1]), options.work / "grid.png")
    print(f"{len(names)} images on {hardware(device)}")


def export(options: argparse.Namespace) -> None:
    """Writes the saved model that ships, with its sampling defaults, and generates an image with it.

    Raises:
        UserError: no weights, weights that do not fit or are too large, or a default that is not allowed.
    """
    record = Record.load(options.results / RECORD)
    require(bool(record.model), f"{options.results} has no model yet")
    file = override(from_json(ModelFile, record.model, "model"), options.set)
    weights = options.results / f"{options.weights}.safetensors"
    with torch.device("meta"):
        model = file.model.build()
    model.to_empty(device="cpu")
    load_state(model, read_tensors(weights), str(weights))
    size = 2 * sum(p.numel() for p in model.parameters()) + 2**16
    require(size <= MAX_MODEL_BYTES, f"the model takes {size / 1e6:.1f} MB in bfloat16; allowed: {MAX_MODEL_BYTES / 1e6:.0f}")
    Pipeline(file, model.float(), read_tokenizer(options.results, file.tokenizer)).save_pretrained(options.to, torch.bfloat16)
    image = continuar.load(options.to, device="cpu")([0], 0)
    written = sum(p.stat().st_size for p in options.to.iterdir())
    print(f"{options.to}: {written / 1e6:.2f} MB, {record.images:,} images, {options.weights} weights, image {image.shape[1:]}")
