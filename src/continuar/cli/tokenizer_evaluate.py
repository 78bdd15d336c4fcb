"""``continuar tokenizer evaluate TOKENIZER DATA``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from continuar.checkpoints.tokenizers import Changes, load_tokenizer
from continuar.cli.common import Device, Ids, ImageSize, Split, at_least, progress_bars
from continuar.data.loader import check_skipped, image_blocks
from continuar.data.sources import find_source
from continuar.distributed import pick_device
from continuar.evaluation.networks import load_network
from continuar.evaluation.reconstruction import ReconstructionScores
from continuar.io import write_json
from continuar.pictures import grid, save_png
from continuar.tokenizers import VQTokenizer
from continuar.tokenizers.pixel import to_signed, to_uint8
from continuar.training.gan_losses import usage

_SHOWN = 16


@dataclass(frozen=True)
class Options:
    """Options of `continuar tokenizer evaluate`."""

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOKENIZER")]
    """A saved tokenizer, a training run of one, an LDM-layout file, a diffusers directory or hub id."""
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """Images that it was not trained on: folders, Parquet, tars."""
    split: Split = "test"
    images: int | None = None
    """Measure this many images, evenly spread; all if not given."""
    image_size: ImageSize = None
    ids: Ids = False
    squeezenet: Path | None = None
    """SqueezeNet 1.1 features as safetensors, for the Frechet distance; without it there is none."""
    out: Path | None = None
    """A directory to write results.json and reconstructions.png to."""
    batch_size: int = 64
    """Images encoded together."""
    device: Device = "auto"


@dataclass(frozen=True)
class Results:
    """Of reconstructions against their images."""

    images: int
    psnr: float
    """dB, mean over images."""
    ssim: float
    """Mean over images."""
    squeezenet_frechet_distance: float | None
    """Between images and reconstructions; not FID."""
    codes_used: float | None
    """Share of the codebook that occurs."""
    perplexity: float | None
    """Of the ids: exp of their entropy."""


def run(options: Options) -> None:
    """Encode and decode images (from the posterior's mean, without draws), and compare them with the originals.

    PSNR, SSIM, Frechet distance of SqueezeNet features (not FID), use of the codebook.
    """
    at_least(2, images=options.images)
    at_least(1, batch_size=options.batch_size)
    results, pictures = evaluate(options)
    for name, value in asdict(results).items():
        if value is not None:
            print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    if options.out is not None:
        write_json(options.out / "results.json", results)
        save_png(grid(pictures, None, columns=len(pictures) // 2), options.out / "reconstructions.png")
        print(f"{'written':<28} {options.out}")


@torch.no_grad()
def evaluate(options: Options) -> tuple[Results, np.ndarray]:
    """The results, and pictures: some images, then their reconstructions."""
    device = pick_device(options.device)
    tokenizer = load_tokenizer(options.tokenizer, Changes(options.image_size, ids=options.ids or None)).to(device)
    source = find_source(options.data, options.split)
    network = load_network("squeezenet", options.squeezenet, device) if options.squeezenet is not None else None
    count = len(source) if options.images is None else min(options.images, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    scores, skipped, shown = ReconstructionScores(network), [], []
    counts = torch.zeros(tokenizer.spec.vocabulary, dtype=torch.int64)
    with progress_bars() as bar:
        progress = bar("measuring")
        for block in image_blocks(source, chosen, tokenizer.config.image_size, options.batch_size):
            skipped += block.skipped
            if not len(block.images):
                continue
            latents = tokenizer.encode(to_signed(torch.from_numpy(block.images).to(device)))
            made = to_uint8(tokenizer.reconstruct(latents)).cpu().numpy()
            scores.add(block.images, made)
            if isinstance(tokenizer, VQTokenizer):
                counts += torch.bincount(latents.flatten().cpu(), minlength=len(counts))
            shown = shown or [block.images[:_SHOWN], made[:_SHOWN]]
            progress(scores.count, count)
    if skipped:
        check_skipped(skipped, count, 0.01)
    used, perplexity = usage(counts) if isinstance(tokenizer, VQTokenizer) else (None, None)
    found = scores.result()
    return Results(found.count, found.psnr, found.ssim, found.frechet_distance, used, perplexity), np.concatenate(shown)
