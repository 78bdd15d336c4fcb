"""Inpainting of handwritten digits: centres, halves, surroundings, and one half completed as every digit.

    python examples/inpaint_digits.py [RUN] [--out out/inpaint_digits.png]

RUN is a run of the recipe `digits`. Without it, the script trains one in out/digits, or continues it there (2.5 minutes on two free
cores; needs scikit-learn, pip install 'continuar[demo]'). A row shows a real digit, the part that the model sees, and ten samples
with different seeds. The last row shows the upper half of a digit completed as each class. Given pixels come back
unchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import continuar
from continuar.data.loader import load_digits
from continuar.distributed import pick_device
from continuar.inpainting import Picture, edit, tokenize_picture
from continuar.pictures import grid, save_png
from continuar.recipes.images import digits
from continuar.training.trainer import train

NUM_SAMPLES = 10


def masks() -> dict[str, np.ndarray]:
    """Masks by name, bool [8, 8]: True is to be generated."""
    found = {name: np.zeros((8, 8), bool) for name in ("centre", "right half", "lower half")}
    found["centre"][2:6, 2:6] = True
    found["right half"][:, 4:] = True
    found["lower half"][4:] = True
    return found | {"outside": ~found["centre"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("out/inpaint_digits.png"))
    options = parser.parse_args()
    pipe = continuar.load(options.run) if options.run else train(digits(), Path("out/digits"), device=pick_device(), resume=True)
    real = load_digits()
    first = {label: real.images[np.flatnonzero(real.labels == label)[0]] for label in range(10)}

    images: list[np.ndarray] = []
    captions: list[str] = []
    for (name, mask), label in zip(masks().items(), (3, 8, 5, 2), strict=True):
        canvas = tokenize_picture(pipe, Picture(first[label], mask), dilation=0)  # pixel tokens depend only on their own square
        images += [first[label], canvas.picture.masked(), *edit(pipe, canvas, label, range(NUM_SAMPLES))]
        captions += [f"a {label}", name, *["samples"] * NUM_SAMPLES]
    canvas = tokenize_picture(pipe, Picture(first[9], masks()["lower half"]), dilation=0)
    images += [first[9], canvas.picture.masked(), *(edit(pipe, canvas, label, [0])[0] for label in range(10))]
    captions += ["a 9", "lower half", *(f"as a {label}" for label in range(10))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(np.stack(images), captions, columns=2 + NUM_SAMPLES), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
