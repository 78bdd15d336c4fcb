"""Inpainting: part of an image is generated anew; all other pixels stay as they are.

1. `read_picture` reads an image and a mask and crops and scales both alike to the model's size. White is to be generated.
2. `tokenize_picture` encodes the image. A token is unknown if its square holds a masked pixel, or lies within ``dilation`` rings of
   such a token: an autoencoder's token depends on pixels around its square, so tokens beside the mask show what was under it.
3. `edit` generates the unknown tokens, once per seed, and puts the image's own pixels back outside the mask.
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
    """An image and its mask, at a model's size.

    Attributes:
        image_HW3: uint8.
        mask_HW: bool, True where pixels are to be generated.
    """

    image_HW3: np.ndarray
    mask_HW: np.ndarray

    def __post_init__(self) -> None:
        shape, dtype = self.image_HW3.shape, self.image_HW3.dtype
        fits = len(shape) == 3 and shape[-1] == 3 and dtype == np.uint8
        require(fits, f"image is {shape} of {dtype}; allowed: [H, W, 3] of uint8")
        require(
            self.mask_HW.shape == shape[:2] and self.mask_HW.dtype == bool,
            f"mask is {self.mask_HW.shape} of {self.mask_HW.dtype}; allowed: {shape[:2]} of bool",
        )

    def masked(self) -> np.ndarray:
        """The image with its mask in grey, uint8 [H, W, 3]."""
        return np.where(self.mask_HW[..., None], np.uint8(GREY), self.image_HW3)


def read_picture(image: Path, mask: Path, size: int) -> Picture:
    """Reads an image and its mask, and crops and scales both alike by ADM's centre crop.

    Args:
        image: in any format that Pillow reads.
        mask: as large as the image; white (or transparent) is to be generated, black is kept.
        size: side of the model's images. A scaled pixel is masked if any white of the mask reaches into it.

    Raises:
        UserError: a file that is not an image, or a mask of another size.
        OSError: a missing file.
    """
    pixels, white = _read("image", image), _read("mask", mask).mean(-1) >= 127.5
    (height, width), (mask_height, mask_width) = pixels.shape[:2], white.shape
    require(
        (height, width) == (mask_height, mask_width),
        f"mask {mask} is {mask_width}x{mask_height} pixels; allowed: {width}x{height}, the size of {image}",
    )
    # The area that white covers is scaled in floats: in 8 bits a small mask in a large image would round to nothing. The bicubic
    # filter of the image reaches further than this area, so the pixels that it colours are masked, too.
    covered = centre_crop(Image.fromarray(white.astype(np.float32)), size, Image.Resampling.BOX)
    visible = centre_crop(Image.fromarray(np.where(white, 255, 0).astype(np.uint8)), size)
    masked = (np.asarray(covered) > 0) | (np.asarray(visible) > 0)
    return Picture(np.array(centre_crop(Image.fromarray(pixels), size)), masked)


def _read(what: str, path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes(), None)
    except Unusable as problem:
        raise UserError(f"{what} {path} cannot be used: {problem}") from problem


def unknown_tokens(mask_HW: np.ndarray, grid: tuple[int, int], dilation: int) -> np.ndarray:
    """bool [h, w]: the tokens whose square holds a masked pixel, and ``dilation`` rings of eight neighbours around them.

    Raises:
        UserError: a negative number of rings.
    """
    require(dilation >= 0, f"dilation is {dilation}; allowed: 0 or more rings of tokens")
    (h, w), (height, width) = grid, mask_HW.shape
    touched = mask_HW.reshape(h, height // h, w, width // w).any(axis=(1, 3))
    rings = min(dilation, max(grid))
    dilated = F.max_pool2d(torch.from_numpy(touched)[None].float(), 2 * rings + 1, stride=1, padding=rings)
    return dilated[0].bool().numpy()


@dataclass(frozen=True)
class Canvas:
    """A picture as tokens, with those to keep.

    Attributes:
        picture: at the model's size.
        tokens: [1, N, D] or ids [1, N].
        known_hw: bool.
    """

    picture: Picture
    tokens: Tensor
    known_hw: np.ndarray


@torch.no_grad()
def tokenize_picture(pipe: Pipeline, picture: Picture, dilation: int = 1) -> Canvas:
    """Encodes a picture and decides which of its tokens stay.

    Args:
        dilation: rings of tokens around the mask that are generated, too. 0 is right for pixel tokens, which depend only on their
            own square.

    Raises:
        UserError: a picture of another size, a negative dilation, or a tokenizer that cannot encode.
    """
    size, grid = pipe.config.tokenizer.image_size, pipe.model.config.tokens.grid
    require(picture.mask_HW.shape == (size, size), f"the picture is {picture.mask_HW.shape} pixels; allowed: {(size, size)}")
    unknown = unknown_tokens(picture.mask_HW, grid, dilation)
    images_1HW3 = torch.from_numpy(picture.image_HW3)[None].to(pipe.device)
    # An autoencoder draws tokens from its posterior; with a fixed seed a picture always has the same tokens.
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
    """Generates the unknown tokens of a canvas, once per seed.

    Args:
        label: the class number or name of the full picture; None for no class.
        settings: sampling settings by name, as in `Pipeline.__call__`.

    Returns:
        uint8 [seeds, H, W, 3]; outside the mask, the picture's own pixels.

    Raises:
        UserError: as in `Pipeline.__call__`.
    """
    images_BHW3 = pipe(
        None if label is None else [label] * len(seeds),
        seeds,
        known_tokens=canvas.tokens,
        known_mask=canvas.known_hw,
        batch_size=batch_size,
        on_progress=on_progress,
        **settings,
    )
    return np.where(canvas.picture.mask_HW[..., None], images_BHW3, canvas.picture.image_HW3)
