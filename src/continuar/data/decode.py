"""One file's bytes to one square RGB image."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from continuar.errors import require

MAX_PIXELS = 200_000_000
"""Larger images are not decoded: 0.6 GB of pixels are a mistake or an attack."""
# What Pillow raises for a damaged file depends on the format and the place of the damage; these were found by flipping bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError)
_DAMAGED += (struct.error, zlib.error, MemoryError, AttributeError, ZeroDivisionError, RuntimeError)

# Pillow's warnings (odd tags, sizes beyond its own limit) are harmless, or the image turns out unusable and is reported. They are
# ignored for the whole process: `warnings.catch_warnings` swaps global state, which overlapping reader threads restore wrongly.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


class Unusable(Exception):
    """Raised for an image that must be skipped; the message is the reason in a few words."""


def decode(data: bytes, size: int | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in ``data`` as uint8 [size, size, 3]: upright, transparent parts on white, centre-cropped.

    Args:
        size: pixels; None keeps the image's own height and width.

    Raises:
        Unusable: unreadable, truncated, or of more than ``max_pixels`` pixels (read from the header, before decoding).
    """
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise Unusable(f"{width}x{height} pixels; allowed: {max_pixels:,} pixels")
        upright = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(upright if size is None else centre_crop(upright, size))
    except Unusable:
        raise
    except UnidentifiedImageError as problem:
        raise Unusable("not an image of a known format") from problem
    except Image.DecompressionBombError as problem:
        raise Unusable(f"more than {max_pixels:,} pixels") from problem
    except _DAMAGED as problem:
        raise Unusable(f"unreadable ({problem or type(problem).__name__})") from problem


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; transparent parts on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int, filter: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """ADM's crop (Dhariwal & Nichol 2021): halve by box filter while the short side is at least twice ``size``, then bicubic (or
    another ``filter``) until the short side is ``size``, then the centre. An image of that size already is returned as it is.

    Raises:
        UserError: a size below 1.
    """
    require(size >= 1, f"image size is {size}; allowed: 1 or more")
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), filter)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
