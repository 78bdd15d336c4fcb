"""``continuar stats DATA OUT.npz``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from continuar.cli.common import Device, NetworkOptions, Split, at_least, local_device, progress_bars
from continuar.errors import require
from continuar.evaluation.networks import sha256_of_file
from continuar.evaluation.reference import REFERENCE_IMAGES, few_images, measure_images, reference_indices, write_statistics
from continuar.evaluation.samples import hxw, open_images


@dataclass(frozen=True)
class Options:
    """Options of `continuar stats`."""

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """A folder of images or of class folders, Parquet or tars, or an .npz file with arr_0."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.npz")]
    """The file to write."""
    features: Annotated[NetworkOptions, tyro.conf.arg(name="")] = field(default_factory=NetworkOptions)
    size: int | None = None
    """Resize every image to this many pixels with ADM's centre crop. Without it, all images must have the same size."""
    split: Split = "train"
    reference_images: int = REFERENCE_IMAGES
    """Number of images whose features are kept; the choice is random but the same every time."""
    keep_images: bool = False
    """Also store those images, as arr_0: for other networks, and for pictures of nearest neighbours."""
    batch_size: int = 64
    """Images measured together."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace an existing file."""


def run(options: Options) -> None:
    """Compute reference statistics of real images, for `continuar evaluate --reference OUT.npz`.

    The file holds mean and covariance of the features of all images, and the features of some for precision, recall, density,
    coverage and the kernel distance. It has the layout of ADM's suite, and the names of its network and data.
    """
    require(options.out.suffix == ".npz", f"OUT is {options.out}; allowed: a name ending in .npz")
    require(options.overwrite or not options.out.exists(), f"{options.out} exists; choose another name or --overwrite")
    require(options.out.parent.is_dir(), f"{options.out.parent} is not a directory; OUT is written into an existing one")
    at_least(1, batch_size=options.batch_size)
    at_least(0, reference_images=options.reference_images)
    images = open_images(options.data, size=options.size, split=options.split)
    network = options.features.load(local_device(options.device))
    with progress_bars() as bar:
        statistics = measure_images(
            images, network, batch_size=options.batch_size, kept=options.reference_images, on_progress=bar("measuring")
        )
    kept = reference_indices(len(images), options.reference_images)
    pixels = images.take(kept.tolist()) if options.keep_images and len(kept) else None
    write_statistics(options.out, statistics, pixels)
    dimensions = len(statistics.moments.mean)
    lines = [
        f"data     {images.name}: {len(images)} images of {hxw(images.size)}",
        f"network  {network.name}, {dimensions} features, weights SHA-256 {network.sha256}",
        f"kept     features of {len(kept)} images" + (", and the images" if pixels is not None else ""),
        *(f"note     {note}" for note in images.notes),
        *(f"note     {note}" for note in few_images(len(images), dimensions)),
        f"written  {options.out}, SHA-256 {sha256_of_file(options.out)}",
    ]
    print("\n".join(lines))
