"""Grids of images with captions, as PNG, and animations of them, as GIF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from continuar.io import atomic_file

T = TypeVar("T")

_MARGIN = 4
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
MAX_FRAMES = 48
"""Most frames of an animation: enough to see it move, few enough for a small file."""


def grid(images_BHW3: np.ndarray, captions: Sequence[str] | None = None, columns: int = 0, min_side: int = 64) -> Image.Image:
    """Arranges images in rows.

    Args:
        images_BHW3: uint8, at least one.
        captions: one line above each image; a caption equal to its left neighbour's is not repeated.
        columns: images per row; 0 for about a square.
        min_side: small images are enlarged by an integer factor until their longer side has this many pixels.
    """
    count, height, width = images_BHW3.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, math.ceil(min_side / max(height, width)))
    h, w = height * factor, width * factor
    font = ImageFont.load_default(size=12)
    line = 16 if captions else 0
    rows = math.ceil(count / columns)
    page = Image.new("RGB", (columns * (w + _MARGIN) + _MARGIN, rows * (h + line + _MARGIN) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, pixels in enumerate(images_BHW3):
        x, y = _MARGIN + i % columns * (w + _MARGIN), _MARGIN + i // columns * (h + line + _MARGIN)
        if captions and (i % columns == 0 or captions[i] != captions[i - 1]):
            draw.text((x, y), captions[i], fill=_INK, font=font)
        page.paste(Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST), (x, y + line))
    return page


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    """Writes a PNG atomically: a reader sees the complete file or none."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most this many items, evenly spaced; the last one is always kept."""
    count = min(most, len(items))
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def save_gif(frames: Sequence[Image.Image], path: Path, seconds: float = 4.0, last_seconds: float = 2.0) -> None:
    """Writes an endless animation atomically.

    Args:
        frames: at least one, all of one size.
        seconds: duration of all frames but the last; each is shown for 0.04 to 0.4 seconds.
        last_seconds: duration of the last frame.
    """
    each = min(0.4, max(0.04, seconds / len(frames)))
    milliseconds = [round(1000 * each)] * (len(frames) - 1) + [round(1000 * last_seconds)]
    # All frames share one palette, made of the first and the last: separate palettes would make unchanged parts flicker.
    ends = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    ends.paste(frames[0], (0, 0))
    ends.paste(frames[-1], (0, frames[0].height))
    palette = ends.quantize(256)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
