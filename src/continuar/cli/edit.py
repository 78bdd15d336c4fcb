"""``continuar edit MODEL IMAGE --mask MASK``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from continuar.cli.common import Settings, make_writable, progress_bars, write_samples
from continuar.errors import UserError, require
from continuar.inpainting import edit, read_picture, tokenize_picture
from continuar.models.dit import DiTConfig
from continuar.pictures import grid, save_png

_COLUMNS = 6
_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class Options:
    """Options of `continuar edit`."""

    model: tyro.conf.Positional[str]
    """A run directory, a saved model, or a shipped name."""
    image: tyro.conf.Positional[Path]
    """The image, of any size."""
    mask: Path
    """An image of the same size: white is to be generated, black is kept."""
    class_name: Annotated[str, tyro.conf.arg(name="class", metavar="CLASS")] = ""
    """Class name or number of the full picture; no class if not given."""
    num_samples: int = 4
    """Images to make, each with its own seed."""
    seed: int = 0
    """Seed of the first image; each further image takes the next number."""
    dilation: int = 1
    """Rings of tokens around the mask that are generated, too: an autoencoder's tokens there show what was under the mask. Pixel
    tokens do not; for them 0 is best."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    out: Path = Path("edited")
    """The directory to write to: 00000.png ..., grid.png (image, masked image, samples), samples.json."""


def run(options: Options) -> None:
    """Generate the part of an image anew that is white in a mask.

    Image and mask are cropped and scaled to the model's size. Pixels outside the mask come back unchanged. Settings that are not
    given are the model's own.
    """
    require(options.num_samples >= 1, f"--num-samples is {options.num_samples}; allowed: 1 or more")
    require(options.dilation >= 0, f"--dilation is {options.dilation}; allowed: 0 or more rings of tokens")
    pipe = options.settings.load(options.model)
    config = pipe.config.model
    if isinstance(config, DiTConfig):
        raise UserError(f"{options.model} is a DiT, which makes whole images; editing needs a model that keeps known tokens")
    settings = options.settings.options(pipe)
    pipe.engine(options.settings.engine, options.settings.precision)
    seeds = pipe.seeds(options.seed, options.num_samples)
    label = pipe.label(options.class_name) if options.class_name else None
    picture = read_picture(options.image, options.mask, pipe.config.tokenizer.image_size)
    require(bool(picture.mask_HW.any()), f"mask {options.mask} has no white within the picture; allowed: white where to generate")
    canvas = tokenize_picture(pipe, picture, options.dilation)
    known = torch.from_numpy(canvas.known_hw).flatten()
    if config.order.fixed and known[known.argsort(descending=True, stable=True)].ne(known).any():
        _LOG.warning("the model was trained to go row by row, never with known tokens after a mask; a random order suits editing")
    make_writable(options.out)
    with progress_bars() as bar:
        on_progress = bar("generating")
        images = edit(pipe, canvas, label, seeds, on_progress=on_progress, **options.settings.running(), **settings.to_dict())
    generated = int((~canvas.known_hw).sum())
    shared = {
        "label": label,
        "class_name": None if label is None else pipe.classes[label],
        "image": options.image,
        "mask": options.mask,
        "dilation": options.dilation,
        "tokens_generated": generated,
        **settings.to_dict(),
        **options.settings.record(options.model),
    }
    write_samples(options.out, images, [{"seed": seed} for seed in seeds], shared)
    shown = np.concatenate((picture.image_HW3[None], picture.masked()[None], images))
    captions = ["image", "masked", *(f"seed {s}" for s in seeds)]
    save_png(grid(shown, captions, columns=min(_COLUMNS, len(shown))), options.out / "grid.png")
    print(f"{len(images)} samples, {generated} of {canvas.known_hw.size} tokens generated: {options.out / 'grid.png'}")
