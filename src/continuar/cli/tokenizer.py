"""``continuar tokenizer list``, ``save``, ``stats``, ``train`` and ``evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from continuar.checkpoints.tokenizers import TOKENIZER_CONFIG, Changes, find_saved, load_tokenizer, save_tokenizer, set_scale
from continuar.cli.common import Device, Ids, ImageSize, Split, TrainingOptions, at_least, local_device, progress_bars, tokens_text
from continuar.config import to_json
from continuar.data.cache_build import encode_pixels, encoded, measure
from continuar.data.latent_cache import LatentCache, is_cache
from continuar.data.loader import check_skipped, image_blocks
from continuar.data.sources import find_source
from continuar.distributed import joined
from continuar.errors import UserError, require
from continuar.evaluation.networks import load_network
from continuar.evaluation.reconstruction import ReconstructionScores
from continuar.io import write_json
from continuar.pictures import grid, save_png
from continuar.recipes import TOKENIZER_RECIPES
from continuar.tokenizers import VAETokenizer, VQTokenizer, fingerprint
from continuar.tokenizers.pixel import to_uint8
from continuar.tokenizers.vae import NAMED
from continuar.training.autoencoder import train_tokenizer
from continuar.training.config import TokenizerRun
from continuar.training.gan_losses import usage
from continuar.training.trainer import Report

BatchSize = Annotated[int, tyro.conf.arg(help="Images encoded together.")]
Images = Annotated[
    int | None, tyro.conf.arg(help="Number of images, spread evenly over the data.", help_behavior_hint="(default: all)")
]


@dataclass(frozen=True)
class ListOptions:
    """`continuar tokenizer list` has no options."""


def list_named(options: ListOptions) -> None:
    """List the tokenizers of the paper's Table 2."""
    print(f"{'name':<12} {'network':<22} {'stride':>6} {'channels':>8} {'patch':>5}  tokens at 256")
    for name, config in NAMED.items():
        network, spec = config.network, config.spec
        tokens = f"{spec.grid[0]} x {spec.grid[1]} of dim {spec.dim}"
        print(f"{name:<12} {network.class_name:<22} {network.stride:>6} {network.channels:>8} {config.patch:>5}  {tokens}")


@dataclass(frozen=True)
class SaveOptions:
    """Options of `continuar tokenizer save`."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A diffusers directory or hub id, an LDM-layout file, a saved tokenizer, or a training run of one."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """A new directory, or a saved tokenizer to replace."""
    image_size: int | None = None
    """Side of the images in pixels; 256 if the source does not say."""
    patch: int | None = None
    """Side of the square of latents that makes one token."""
    scale: float | None = None
    """1/std of the latents, if it is known."""
    ids: Ids = False


def save(options: SaveOptions) -> None:
    """Keep an autoencoder as a saved tokenizer: tokenizer.json and tokenizer.safetensors."""
    changes = Changes(options.image_size, options.patch, options.scale, options.ids or None)
    tokenizer = load_tokenizer(options.src, changes)
    save_tokenizer(tokenizer.config, tokenizer.state_dict(), options.dst)
    print(f"written  {options.dst}  ({tokenizer.spec})")


@dataclass(frozen=True)
class StatsOptions:
    """Options of `continuar tokenizer stats`."""

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOKENIZER")]
    """A saved tokenizer or a training run of one; or a diffusers directory or hub id, or an LDM-layout file, with --out."""
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """Training images (folders, Parquet, tars), or a cache of this tokenizer's latents."""
    split: Split = "train"
    images: Images = None
    image_size: ImageSize = None
    shift: bool = False
    """Also subtract the mean, as some autoencoders of 16 channels do; the paper does not."""
    dry_run: bool = False
    """Measure and print only."""
    out: Path | None = None
    """Write the tokenizer with its scale here, instead of changing it in place."""
    batch_size: BatchSize = 64
    device: Device = "auto"


def stats(options: StatsOptions) -> None:
    """Measure mean and standard deviation of a tokenizer's latents, and keep scale = 1/std with the tokenizer."""
    at_least(1, images=options.images, batch_size=options.batch_size)
    home = find_saved(Path(options.tokenizer))
    writable = options.dry_run or options.out is not None or home is not None
    require(writable, f"{options.tokenizer} is not a saved tokenizer, which could keep its scale; give --out DIR")
    tokenizer = load_tokenizer(options.tokenizer, Changes(options.image_size))
    if not isinstance(tokenizer, VAETokenizer):
        raise UserError(f"{options.tokenizer} is a tokenizer of kind '{tokenizer.config.kind}', which needs no scale; allowed: vae")
    tokenizer.to(local_device(options.device))
    with progress_bars() as bar:
        found = measure(_latents(options, tokenizer, bar("measuring")), tokenizer.config.network.has_variance)
    scale, shift, before = found.scale, found.mean if options.shift else 0.0, tokenizer.config.scale
    print(f"images    {found.images}\nmean      {found.mean:.6g}\nstd       {found.std:.6g}")
    for channel, (mean, std) in enumerate(zip(found.channel_mean, found.channel_std, strict=True)):
        print(f"channel {channel:<2} mean {mean:.6g}, std {std:.6g}")
    print(f"scale     {scale:.6g}{f' (was {before:.6g})' if before else ''}\nshift     {shift:.6g}")
    if options.dry_run:
        return
    if options.out is not None:
        save_tokenizer(replace(tokenizer.config, scale=scale, shift=shift), tokenizer.state_dict(), options.out)
    else:
        assert home is not None
        set_scale(home, scale, shift)
    print(f"written   {(options.out or home or Path()) / TOKENIZER_CONFIG}")


def _latents(options: StatsOptions, tokenizer: VAETokenizer, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """Latents of images, or of a cache made by this tokenizer."""
    if not is_cache(options.data):
        source = find_source(options.data, options.split)
        yield from encoded(source, tokenizer, images=options.images, batch_size=options.batch_size, on_progress=progress)
        return
    require(options.images is None, f"--images is {options.images}; a cache is measured completely")
    cache = LatentCache(options.data)
    cache.check_fingerprint(fingerprint(tokenizer))
    done = 0
    for block in cache.blocks():
        yield block
        done += len(block)
        progress(done, len(cache) * cache.info.views)


@dataclass(frozen=True)
class TrainOptions(TrainingOptions):
    """Options of `continuar tokenizer train` besides the recipe's own fields."""

    recipes = TOKENIZER_RECIPES


def train(options: TrainOptions) -> None:
    """Train a tokenizer, a KL or VQ autoencoder, by a recipe.

    continuar tokenizer train RECIPE [options]
    torchrun --nproc-per-node N -m continuar tokenizer train RECIPE [options]     on N GPUs or processes
    continuar tokenizer train --list          recipes, one line each
    continuar tokenizer train RECIPE --help   every field of the recipe, with its value there
    continuar tokenizer train RECIPE --dry-run
    """
    if options.dry_run:
        print(dry_run(options.run), end="")
        return
    device = options.process_device()
    done = steps = 0
    with joined("ddp", device) as parallel, progress_bars(parallel.first) as bar:
        on_step = bar("training")

        def on_report(report: Report) -> None:
            nonlocal done, steps
            done, steps = report.step, report.steps
            on_step(done, steps)

        train_tokenizer(
            options.run,
            options.directory,
            device=device,
            resume=options.resume,
            force=options.force,
            on_report=on_report,
            on_read=bar("reading images"),
            parallel=parallel,
        )
    kept = options.directory / "tokenizer"
    if parallel.first and done < steps:
        print(f"stopped on request at step {done:,} of {steps:,}: {options.directory}  (--resume continues it)")
    elif parallel.first:
        print(f"trained: {kept}  (continuar tokenizer evaluate {kept} DATA; continuar cache DATA {kept} DST)")


def dry_run(run: TokenizerRun) -> str:
    """The resolved config and its sizes, as text; nothing is allocated."""
    with torch.device("meta"):
        network = run.tokenizer.network.build()
    lines = [
        json.dumps(to_json(run), indent=2),
        f"parameters        {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M",
        f"tokens per image  {tokens_text(run.tokenizer.spec)}",
        f"training          {run.train.steps:,} steps of {run.train.batch_size} images",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `continuar tokenizer evaluate`."""

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOKENIZER")]
    """A saved tokenizer, a training run of one, an LDM-layout file, a diffusers directory or hub id."""
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """Images that it was not trained on: folders, Parquet, tars."""
    split: Split = "test"
    images: Images = None
    image_size: ImageSize = None
    ids: Ids = False
    squeezenet: Path | None = None
    """SqueezeNet 1.1 features as safetensors, for the Frechet distance; without it there is none."""
    out: Path | None = None
    """A directory to write results.json and reconstructions.png to."""
    batch_size: BatchSize = 64
    device: Device = "auto"


@dataclass(frozen=True)
class Results:
    """Scores of reconstructions against their images."""

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
    """exp of the entropy of the ids."""


def evaluate(options: EvaluateOptions) -> None:
    """Encode and decode images (from the posterior's mean, without draws), and compare them with the originals.

    PSNR, SSIM, Frechet distance of SqueezeNet features (not FID), use of the codebook.
    """
    at_least(2, images=options.images)
    at_least(1, batch_size=options.batch_size)
    results, pictures = reconstruct_and_score(options)
    for name, value in asdict(results).items():
        if value is not None:
            print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    if options.out is not None:
        write_json(options.out / "results.json", results)
        save_png(grid(pictures, None, columns=len(pictures) // 2), options.out / "reconstructions.png")
        print(f"{'written':<28} {options.out}")


@torch.no_grad()
def reconstruct_and_score(options: EvaluateOptions, shown: int = 16) -> tuple[Results, np.ndarray]:
    """The results, and pictures: some images, then their reconstructions."""
    device = local_device(options.device)
    tokenizer = load_tokenizer(options.tokenizer, Changes(options.image_size, ids=options.ids or None)).to(device)
    source = find_source(options.data, options.split)
    network = load_network("squeezenet", options.squeezenet, device) if options.squeezenet is not None else None
    count = len(source) if options.images is None else min(options.images, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    scores, skipped, pictures = ReconstructionScores(network), [], []
    counts = torch.zeros(tokenizer.spec.vocabulary, dtype=torch.int64)
    with progress_bars() as bar:
        progress = bar("measuring")
        for block in image_blocks(source, chosen, tokenizer.config.image_size, options.batch_size):
            skipped += block.skipped
            if not len(block.images):
                continue
            latents = encode_pixels(tokenizer, block.images)
            made = to_uint8(tokenizer.reconstruct(latents)).cpu().numpy()
            scores.add(block.images, made)
            if isinstance(tokenizer, VQTokenizer):
                counts += torch.bincount(latents.flatten().cpu(), minlength=len(counts))
            pictures = pictures or [block.images[:shown], made[:shown]]
            progress(scores.count, count)
    check_skipped(skipped, count, 0.01)
    used, perplexity = usage(counts) if isinstance(tokenizer, VQTokenizer) else (None, None)
    found = scores.result()
    results = Results(found.count, found.psnr, found.ssim, found.frechet_distance, used, perplexity)
    return results, np.concatenate(pictures)
