"""Fine-tuning at twice the image size (`--init`) against training there from random weights, on handwritten digits.

    OMP_NUM_THREADS=1 python benchmarks/larger_grid.py --results benchmarks/results/larger_grid.md

1. Digits as PNGs of 16 x 16 pixels (bicubic) in class folders.
2. Recipe `digits` on them at 8 x 8 pixels: 4 x 4 tokens.
3. Recipe `digits` at 16 x 16: 8 x 8 tokens, a quarter of the images, once from those weights and once from random ones.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from continuar.data.loader import load_digits
from continuar.recipes import RECIPES
from continuar.training.config import Run
from continuar.training.trainer import train

IMAGES = 20_000


def write_digits(root: Path) -> Path:
    """Class folders of 16 x 16 PNGs."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/larger_grid"))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    data = options.out / "digits16"
    if not data.exists():
        write_digits(data)
    base = RECIPES["digits"]()
    base = replace(base, data=replace(base.data, path=str(data)), train=replace(base.train, sample_images=0))
    train(base, options.out / "eight", device=torch.device("cpu"), resume=True)
    larger: Run = replace(
        base,
        tokenizer=replace(base.tokenizer, image_size=16),
        optim=replace(base.optim, decay_images=15_000),
        train=replace(base.train, images=IMAGES, log_images=4_000),
    )
    curves = {}
    for name, init in (("from 8 x 8", str(options.out / "eight")), ("from random weights", "")):
        directory = options.out / name.replace(" ", "_")
        train(replace(larger, init=init), directory, device=torch.device("cpu"), resume=True)
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        curves[name] = {line["images"]: line["loss"] for line in lines}
    lines = ["| images | " + " | ".join(curves) + " |", "|---" * (1 + len(curves)) + "|"]
    for images in next(iter(curves.values())):
        lines.append(f"| {images:,} | " + " | ".join(f"{curve[images]:.4f}" for curve in curves.values()) + " |")
    note = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}."
    print("\n".join([*lines, "", note]))
    if options.results:
        options.results.write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
