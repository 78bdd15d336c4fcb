"""Grids of images with captions, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 4
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def grid(images_BHW3: np.ndarray, captions: Sequence[str] | None = None, columns: int = 0, min_side: int = 64) -> Image.Image:
    """Arranges images in rows.

    Args:
        images_BHW3: uint8, at least one.
        captions: a line above each image; a caption equal to its left neighbour's in the row is not repeated.
        columns: images per row; 0 for about a square.
        min_side: small images are enlarged by a whole factor until their longer side reaches this many pixels.
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
    """Writes a PNG so that a reader sees all of it or none."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
