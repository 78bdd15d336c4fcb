"""Editing: some part of a picture generated anew, the rest kept to the bit.

1. `read_picture`: image and mask from files, cropped and scaled alike to the model's size. White is to be generated.
2. `prepare`: the image as tokens. Those that hold a pixel of the hole are unknown, and with them ``grow`` rings around: the tokens
   of an autoencoder see their neighbours' pixels, so that those beside a hole tell what was in it.
3. `edit`: the unknown tokens are generated, one variant per seed; outside the hole, pixels are the image's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from continuar.data.decode import Unusable, centre_crop, decode
from continuar.errors import UserError, require
from continuar.pipeline import Pipeline
from continuar.sampling.known_tokens import GREY


@dataclass(frozen=True)
class Picture:
    """What is to be edited, at a model's size.

    Attributes:
        image_HW3: uint8.
        hole_HW: bool, True where it is to be generated.
    """

    image_HW3: np.ndarray
    hole_HW: np.ndarray

    def __post_init__(self) -> None:
        shape, dtype = self.image_HW3.shape, self.image_HW3.dtype
        fits = len(shape) == 3 and shape[-1] == 3 and dtype == np.uint8
        require(fits, f"image is {shape} of {dtype}; allowed: [H, W, 3] of uint8")
        require(
            self.hole_HW.shape == shape[:2] and self.hole_HW.dtype == bool,
            f"hole is {self.hole_HW.shape} of {self.hole_HW.dtype}; allowed: {shape[:2]} of bool",
        )

    def masked(self) -> np.ndarray:
        """The image with a grey hole, uint8 [H, W, 3]."""
        return np.where(self.hole_HW[..., None], np.uint8(GREY), self.image_HW3)


def read_picture(image: Path, mask: Path, size: int) -> Picture:
    """Reads an image and its mask, and crops and scales both alike by ADM's centre crop.

    Args:
        image: any format that Pillow reads.
        mask: as large as the image; white (or transparent) is to be generated, black is kept.
        size: of the model's images. A pixel of this size is in the hole if any of the mask's white reaches into it.

    Raises:
        UserError: a file that is not an image, or a mask of another size.
        OSError: a file that is not there.
    """
    pixels, white = _read("image", image), _read("mask", mask).mean(-1) >= 127.5
    (height, width), (mask_height, mask_width) = pixels.shape[:2], white.shape
    require(
        (height, width) == (mask_height, mask_width),
        f"mask {mask} is {mask_width}x{mask_height} pixels; allowed: {width}x{height}, the size of {image}",
    )
    # What the white covers, in floats: in 8 bits a small hole in a large image would round to nothing. And as far as it shows in
    # the scaled image, whose bicubic filter reaches further.
    covered = centre_crop(Image.fromarray(white.astype(np.float32)), size, Image.Resampling.BOX)
    visible = centre_crop(Image.fromarray(np.where(white, 255, 0).astype(np.uint8)), size)
    hole = (np.asarray(covered) > 0) | (np.asarray(visible) > 0)
    return Picture(np.array(centre_crop(Image.fromarray(pixels), size)), hole)


def _read(what: str, path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes(), None)
    except Unusable as problem:
        raise UserError(f"{what} {path} cannot be used: {problem}") from problem


def unknown_tokens(hole_HW: np.ndarray, grid: tuple[int, int], grow: int) -> np.ndarray:
    """bool [h, w]: the tokens whose square holds a pixel of the hole, and ``grow`` rings of eight neighbours around them.

    Raises:
        UserError: a negative number of rings.
    """
    require(grow >= 0, f"grow is {grow}; allowed: 0 or more rings of tokens")
    (h, w), (height, width) = grid, hole_HW.shape
    touched = hole_HW.reshape(h, height // h, w, width // w).any(axis=(1, 3))
    rings = min(grow, max(grid))
    grown = F.max_pool2d(torch.from_numpy(touched)[None].float(), 2 * rings + 1, stride=1, padding=rings)
    return grown[0].bool().numpy()


@dataclass(frozen=True)
class Canvas:
    """A picture as a model sees it.

    Attributes:
        picture: at the model's size.
        tokens: [1, N, D] or ids [1, N].
        known_hw: bool.
    """

    picture: Picture
    tokens: Tensor
    known_hw: np.ndarray


@torch.no_grad()
def prepare(pipe: Pipeline, picture: Picture, grow: int = 1) -> Canvas:
    """Tokens of a picture, and which of them stay.

    Args:
        grow: rings of tokens around the hole that are generated with it. 0 suits pixel tokens, which see nothing but themselves.

    Raises:
        UserError: a picture of another size, a negative ``grow``, or a tokenizer that cannot encode.
    """
    size, grid = pipe.file.tokenizer.image_size, pipe.model.config.tokens.grid
    require(picture.hole_HW.shape == (size, size), f"the picture is {picture.hole_HW.shape} pixels; allowed: {(size, size)}")
    unknown = unknown_tokens(picture.hole_HW, grid, grow)
    images_1HW3 = torch.from_numpy(picture.image_HW3)[None].to(pipe.device)
    # A tokenizer may draw from torch's generators: the same picture always gives the same tokens.
    with torch.random.fork_rng(devices=[pipe.device] if pipe.device.type == "cuda" else []):
        torch.manual_seed(0)
        tokens = pipe.tokenizer.tokenize(pipe.tokenizer.encode(images_1HW3.permute(0, 3, 1, 2).float() / 127.5 - 1))
    return Canvas(picture, tokens, ~unknown)


def edit(
    pipe: Pipeline,
    canvas: Canvas,
    label: int | str | None,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> np.ndarray:
    """Variants of a picture, one per seed.

    Args:
        label: what the whole picture shows, a class number or name; None for no class.
        settings: of the generation, as of `Pipeline.__call__`.

    Returns:
        uint8 [variants, H, W, 3]; outside the hole, the picture's own pixels.

    Raises:
        UserError: as of `Pipeline.__call__`.
    """
    images_VHW3 = pipe(
        None if label is None else [label] * len(seeds),
        seeds,
        known_tokens=canvas.tokens,
        known_mask=canvas.known_hw,
        batch_size=batch_size,
        on_progress=on_progress,
        **settings,
    )
    return np.where(canvas.picture.hole_HW[..., None], images_VHW3, canvas.picture.image_HW3)
