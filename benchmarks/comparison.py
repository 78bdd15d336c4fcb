"""The paper's comparison at the size of handwritten digits: every order and backbone with every head that can serve it.

    python benchmarks/comparison.py --results benchmarks/results/digits_comparison.md --picture docs/images/digits_comparison.png

Trains each `digits_ROW_HEAD` recipe, and the baseline DiT on as many images (finished runs are kept), generates 500 digits with and
without guidance, and writes one row for each:

* accuracy: the share that a support vector machine trained on all real digits recognises as the class that was asked for. It says
  nothing about diversity: one perfect example per class would score 1.
* distance: Frechet distance of the 64 pixel values (in units of their overall std) to all 1,797 real digits. It measures both.
  Half of the real digits against the other half give the scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

from continuar.data.loader import load_digits
from continuar.evaluation.metrics import frechet_distance
from continuar.pictures import grid, save_png
from continuar.recipes import RECIPES
from continuar.statistics import Moments, moments
from continuar.training.config import BaseRun
from continuar.training.trainer import train

GUIDANCE = (1.0, 2.0)
PER_CLASS = 50


def flat(images: np.ndarray) -> np.ndarray:
    return images[..., 0].reshape(len(images), -1).astype(float)


class DigitScorer:
    """Scores generated digits against the real ones."""

    def __init__(self) -> None:
        real = load_digits()
        pixels = flat(real.images)
        self.std = pixels.std()
        self.reader = SVC(gamma="scale").fit(pixels, real.labels)
        self.reference: Moments = moments(pixels / self.std)
        shuffled = np.random.default_rng(0).permutation(len(pixels))
        halves = [moments(pixels[part] / self.std) for part in np.array_split(shuffled, 2)]
        self.between_halves = frechet_distance(*halves)

    def score(self, images: np.ndarray, labels: np.ndarray) -> str:
        x = flat(images)
        accuracy = (self.reader.predict(x) == labels).mean()
        return f"{accuracy:.3f} | {frechet_distance(moments(x / self.std), self.reference):.2f}"


def runs() -> dict[str, BaseRun]:
    """Returns every run of the comparison, by name."""
    found = {name: recipe() for name, recipe in RECIPES.items() if name.startswith("digits_")}
    like = found["digits_mar_diffusion"]
    return found | {"digits_dit": dataclasses.replace(RECIPES["dit_digits"](), train=like.train, optim=like.optim)}


def seconds_of(run: Path, batch_size: int) -> float:
    """Returns the training time by the run's own log, without drawing and saving."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    previous = [0, *(line["step"] for line in lines)]
    return sum(
        (line["step"] - before) * batch_size / line["images_per_second"] for line, before in zip(lines, previous, strict=False)
    )


def note_of(scorer: DigitScorer) -> str:
    """Returns the scale of the scores, and the machine they were measured on."""
    halves = f"Distance between two halves of the real digits: {scorer.between_halves:.2f}"
    return f"{halves}. torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/comparison"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--picture", type=Path, help="one digit of each class from every model, a line each")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    options = parser.parse_args()
    scorer, labels = DigitScorer(), np.repeat(np.arange(10), PER_CLASS)
    head = (
        "| recipe | M parameters | training s | ms/image | " + " | ".join(f"accuracy, w={g:g} | distance" for g in GUIDANCE) + " |"
    )
    lines = [head, "|---" * (4 + 2 * len(GUIDANCE)) + "|"]
    print("\n".join(lines), flush=True)
    shown: dict[str, np.ndarray] = {}
    for name, run in ((name, run) for name, run in runs().items() if options.only in name):
        directory = options.out / name
        pipe = train(run, directory, device=torch.device("cpu"), resume=True)
        scores, seconds = [], 0.0
        for guidance in GUIDANCE:
            began = time.perf_counter()
            images = pipe(labels.tolist(), 0, guidance_scale=guidance, batch_size=250)
            seconds = time.perf_counter() - began
            scores.append(scorer.score(images, labels))
        shown[name] = pipe(list(range(10)), 100)
        parameters = sum(p.numel() for p in pipe.model.parameters()) / 1e6
        trained = seconds_of(directory, run.train.batch_size)
        lines.append(f"| {name} | {parameters:.2f} | {trained:.0f} | {1e3 * seconds / len(labels):.1f} | {' | '.join(scores)} |")
        print(lines[-1], flush=True)
    note = f"{note_of(scorer)}; ms/image at w={GUIDANCE[-1]:g}."
    print(note)
    if options.picture:
        captions = [c for name in shown for c in [name.removeprefix("digits_"), *[""] * 9]]
        save_png(grid(np.concatenate(list(shown.values())), captions, columns=10, min_side=32), options.picture)
    if options.results:
        options.results.write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
