"""Parts of handwritten digits generated anew: holes, halves, surroundings, and one half completed as every digit.

    python examples/inpaint_digits.py [RUN] [--out out/inpaint_digits.png]

RUN is a run of the recipe `digits`; without it one is trained into out/digits, or continued there (2.5 minutes on two
free cores; needs scikit-learn, pip install 'continuar[demo]'). A row shows a real digit, what the model sees of it, ten variants
by seed. The last row shows the upper half of a digit completed as each class. Pixels that were given come back as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import continuar
from continuar.data.loader import load_digits
from continuar.devices import pick_device
from continuar.inpainting import Picture, edit, prepare
from continuar.pictures import grid, save_png
from continuar.recipes.images import digits
from continuar.training.trainer import train

VARIANTS = 10


def holes() -> dict[str, np.ndarray]:
    """What is to be generated, bool [8, 8] by name."""
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
    for (name, hole), label in zip(holes().items(), (3, 8, 5, 2), strict=True):
        canvas = prepare(pipe, Picture(first[label], hole), grow=0)  # pixel tokens see nothing but themselves
        images += [first[label], canvas.picture.masked(), *edit(pipe, canvas, label, range(VARIANTS))]
        captions += [f"a {label}", name, *["variants"] * VARIANTS]
    canvas = prepare(pipe, Picture(first[9], holes()["lower half"]), grow=0)
    images += [first[9], canvas.picture.masked(), *(edit(pipe, canvas, label, [0])[0] for label in range(10))]
    captions += ["a 9", "lower half", *(f"as a {label}" for label in range(10))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(np.stack(images), captions, columns=2 + VARIANTS), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
