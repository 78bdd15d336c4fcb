"""Learned and rotary positions on handwritten digits, in every backbone and order; several seeds each.

    OMP_NUM_THREADS=1 python benchmarks/positions.py --results benchmarks/results/digits_positions.md

Trains recipes `digits_ROW_flow` (30,000 images, a minute each; finished runs are kept) with both, and scores 500 digits of each as
`benchmarks/comparison.py` does.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comparison import PER_CLASS, DigitScorer, note_of, seconds_of

from continuar.recipes import RECIPES
from continuar.training.trainer import train

ROWS = ("ar_raster", "ar_random", "mar")
GUIDANCE = (1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/positions"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    scorer, labels = DigitScorer(), np.repeat(np.arange(10), PER_CLASS)
    scores = " | ".join(f"accuracy, w={g:g} | distance" for g in GUIDANCE)
    lines = [f"| recipe | positions | seed | training s | last loss | {scores} |", "|---" * (5 + 2 * len(GUIDANCE)) + "|"]
    print("\n".join(lines), flush=True)
    for seed in range(options.seeds):
        for row in ROWS:
            for positions in ("learned", "rotary"):
                run = RECIPES[f"digits_{row}_flow"]()
                run = replace(run, seed=seed, backbone=replace(run.backbone, positions=positions))
                directory = options.out / f"{row}-{positions}-{seed}"
                pipe = train(run, directory, device=torch.device("cpu"), resume=True)
                loss = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
                found = [scorer.score(pipe(labels.tolist(), 0, guidance_scale=g, batch_size=250), labels) for g in GUIDANCE]
                seconds = seconds_of(directory, run.train.batch_size)
                lines.append(f"| {row} | {positions} | {seed} | {seconds:.0f} | {loss:.4f} | {' | '.join(found)} |")
                print(lines[-1], flush=True)
    note = f"{note_of(scorer)}."
    print(note)
    if options.results:
        options.results.write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
