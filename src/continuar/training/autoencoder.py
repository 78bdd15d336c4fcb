"""Training of a tokenizer: an autoencoder whose latents are regularised by a KL term or a codebook (LDM, Rombach et al. 2022;
VQGAN, Esser et al. 2021).

One step (`TokenizerStep`):

1. Images go through encoder, posterior or codebook, and decoder.
2. Reconstruction: L1 of pixels and a perceptual distance. Regularisation: KL, or commitment to codes.
3. From ``discriminator.start_images`` on the decoder also learns to deceive a discriminator, with the adaptive weight. Then the
   discriminator takes a step of its own on the same images.
4. Codes move.

A step whose loss or gradient norm is not finite changes nothing, and nothing is read back to the host. Several processes each take
a part of the batch: gradients and losses are averaged over them before norms are taken, so all processes decide alike.

`train_tokenizer` runs these steps in the loop of `training.trainer`. At the end it measures the scale of a KL tokenizer's latents
and saves the tokenizer in ``tokenizer/``.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from continuar.checkpoints.store import TOKENIZER, load_state
from continuar.checkpoints.tokenizers import TOKENIZER_CONFIG, TokenizerFile, save_tokenizer
from continuar.cuda_graphs import GraphPool, Graphs
from continuar.data.cache_build import add_latents, latent_statistics
from continuar.data.loader import ImageSet, check_skipped, decode_block, load_images
from continuar.data.sources import Source, find_source
from continuar.distributed import GIB, SingleProcess, raise_on_all_ranks
from continuar.errors import require
from continuar.io import atomic_directory, read_tensors, write_json, write_tensors
from continuar.pictures import grid
from continuar.pipeline import to_uint8
from continuar.statistics import MomentAccumulator
from continuar.tokenizers import VAETokenizer, VQTokenizer
from continuar.training.checkpoint import drop_old, load_newest, load_optimizer, optimizer_tensors, write_state
from continuar.training.config import DataConfig, ImagesConfig, TokenizerLoopConfig, TokenizerRun
from continuar.training.data import IndexStream, augment
from continuar.training.gan_losses import (
    CodebookLearner,
    PatchDiscriminator,
    Perceptual,
    Quantised,
    adaptive_weight,
    build_perceptual,
    hinge,
)
from continuar.training.step import (
    Averages,
    Meter,
    all_finite,
    learning_rate,
    seed_draws,
    set_learning_rate,
    update_weights,
    uses_bf16,
)
from continuar.training.trainer import Objective, Report, Trainer, begin_directory, check_directory

_LOG = logging.getLogger("continuar")
WARMUP_STEPS = 3
"""Steps of the run before a capture, in which libraries choose their algorithms and optimizers make their moments."""
SHOWN_IMAGES = 16
"""Images in a picture of reconstructions."""


class ImageBatches(ABC):
    """Batches of images [B, 3, H, W] in [-1, 1] on a device, without labels; a function of (seed, step).

    Args:
        batch_size: images of all processes together.
        part: the images of every batch that this process gets; all if not given.
    """

    def __init__(self, count: int, batch_size: int, seed: int, flip: bool, device: torch.device, part: range | None = None) -> None:
        self._index, self._part = IndexStream(count, batch_size, seed), part or range(batch_size)
        self._augmentation, self._device = DataConfig(flip=flip), device

    @abstractmethod
    def pixels(self, step: int) -> Tensor:
        """uint8 [B, 3, H, W] of the part of batch ``step``, on the device."""

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The first images of the data, in [-1, 1], for pictures."""

    @property
    def count(self) -> int:
        """Images in all."""
        return self._index.count

    def rows(self, step: int) -> np.ndarray:
        """Indices into the data of the part of batch ``step``, int64 [B]."""
        return self._index.batch(step)[self._part.start : self._part.stop]

    def plain(self, step: int) -> Tensor:
        """The part of batch ``step`` without mirror images."""
        return _signed(self.pixels(step))

    def batch(self, step: int) -> Tensor:
        """The part of batch ``step``; mirror images draw from torch's default generator of the device."""
        return _signed(augment(self.pixels(step), self._augmentation))


class MemoryBatches(ImageBatches):
    """Images that stay on the device as uint8."""

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int, flip: bool, device: torch.device, part: range | None = None
    ) -> None:
        super().__init__(len(images), batch_size, seed, flip, device, part)
        self._images = torch.from_numpy(images.images).to(device).permute(0, 3, 1, 2)

    def pixels(self, step: int) -> Tensor:
        return self._images[torch.from_numpy(self.rows(step)).to(self._device)]

    def first(self, count: int) -> Tensor:
        return _signed(self._images[:count])


class DecodedBatches(ImageBatches):
    """Images decoded one batch ahead of use. An image that cannot be used is replaced by the next one that can."""

    def __init__(
        self,
        source: Source,
        size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        max_skipped_share: float,
        device: torch.device,
        part: range | None = None,
    ) -> None:
        super().__init__(len(source), batch_size, seed, flip, device, part)
        self._source, self._size, self._max_skipped_share = source, size, max_skipped_share
        self._skipped: dict[str, None] = {}
        self._pool, self._reader = ThreadPoolExecutor(), ThreadPoolExecutor(1, "images")
        self._ahead: tuple[int, Future[np.ndarray]] | None = None

    def pixels(self, step: int) -> Tensor:
        expected, future = self._ahead or (None, None)
        found = future.result() if future is not None else None  # wait even for an unwanted batch: there is one reader at a time
        images = found if found is not None and expected == step else self._read(step)
        self._ahead = step + 1, self._reader.submit(self._read, step + 1)
        return torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)

    def first(self, count: int) -> Tensor:
        images = self._decode(np.arange(min(count, len(self._source))))
        return _signed(torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2))

    def _read(self, step: int) -> np.ndarray:
        return self._decode(self.rows(step))

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3]"""
        images = np.empty((len(rows), self._size, self._size, 3), np.uint8)
        wanted, places = rows, np.arange(len(rows))
        while len(places):
            block = decode_block(self._source, wanted.tolist(), self._size, self._pool)
            self._note(block.skipped)
            good = np.isin(wanted, block.index)
            images[places[good]] = block.images
            wanted, places = (wanted[~good] + 1) % len(self._source), places[~good]
        return images

    def _note(self, skipped: tuple[str, ...]) -> None:
        for line in skipped:
            if line not in self._skipped:
                _LOG.warning("skipped: %s", line)
                self._skipped[line] = None
        if skipped:
            check_skipped(list(self._skipped), len(self._source), self._max_skipped_share)


def open_images(
    config: ImagesConfig,
    size: int,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    part: range | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> ImageBatches:
    """The run's images, in memory if they fit.

    Args:
        batch_size, part: see `ImageBatches`.
        on_read: called with (images read, images in all) while they are read into memory.

    Raises:
        UserError: no such data, or too many unusable images.
    """
    require(bool(config.path), "data.path is empty; give a folder, Parquet files or tars (--data.path)")
    share = config.max_skipped_share
    if config.path != "digits":
        source = find_source(Path(config.path), config.split)
        if len(source) * size * size * 3 > config.max_memory_gib * GIB:
            return DecodedBatches(source, size, batch_size, seed, config.flip, share, device, part)
    images = load_images(config.path, size=size, split=config.split, max_skipped_share=share, progress=on_read)
    for line in images.skipped[:5]:
        _LOG.warning("skipped: %s", line)
    return MemoryBatches(images, batch_size, seed, config.flip, device, part)


def _signed(pixels_B3HW: Tensor) -> Tensor:
    return pixels_B3HW.float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Decoded:
    """A batch that went through the autoencoder, with the terms that do not depend on its images."""

    images_B3HW: Tensor
    regularisation: Tensor
    """KL per image, or the commitment (and codebook) loss."""
    penalty: Tensor
    """The same, weighted."""
    quantised: Quantised | None


@dataclass(frozen=True)
class Errors:
    """Scalar distances of decoded images to the real ones."""

    l1: Tensor
    perceptual: Tensor
    """Weighted."""
    squared: Tensor
    """Mean squared error of pixels in [-1, 1]."""


class TokenizerStep:
    """A tokenizer and its discriminator with their optimizers.

    Args:
        tokenizer: on its device; trained from here on.
        run: the run's config.
        perceptual: the frozen network of the perceptual term, or None.
        parallel: the processes that train together, all beginning with the first one's weights; one if not given.

    Attributes:
        rollbacks: how often the run went back to a checkpoint; each time all draws become others.

    Raises:
        UserError: ``train.engine`` cannot work here.
    """

    rollbacks = 0

    def __init__(
        self,
        tokenizer: VAETokenizer | VQTokenizer,
        run: TokenizerRun,
        perceptual: Perceptual | None,
        parallel: SingleProcess | None = None,
    ) -> None:
        self.tokenizer, self.run, self.perceptual = tokenizer.train().requires_grad_(True), run, perceptual
        self.parallel = parallel or SingleProcess()
        self.network: Any = tokenizer.network
        self.device = next(tokenizer.parameters()).device
        self._total_images = run.train.steps * run.train.batch_size
        engine = pick_engine(run.train.engine, self.device, self.parallel)
        graphs = engine.endswith("graphs")
        self.codebook = None
        if isinstance(tokenizer, VQTokenizer):
            self.codebook = CodebookLearner(self.network.quantize.embedding.weight, run.codebook, self.parallel)
        self.optimizer = self._build_optimizer(tokenizer, graphs)
        self.discriminator = PatchDiscriminator(run.discriminator).to(self.device) if run.discriminator.weight > 0 else None
        self.discriminator_optimizer = None
        if self.discriminator is not None:
            self.discriminator_optimizer = self._build_optimizer(self.discriminator, graphs)
        for module in self.modules().values():
            self.parallel.share(list(module.state_dict().values()))
        self.meter = Meter(self.device, self.parallel)
        self._bf16 = uses_bf16(run.train.precision, self.device)
        if engine.startswith("compile"):
            for part in self._compiled_parts():
                part.compile(dynamic=False)
        trained = [p for module in self.modules().values() for p in module.parameters()]
        self._graphs = Graphs(GraphPool(self.device) if graphs else None, warm_up=WARMUP_STEPS, parameters=trained)
        self._images: Tensor | None = None  # what graphs read
        self._captured_joined = False

    def _build_optimizer(self, module: nn.Module, graphs: bool) -> torch.optim.AdamW:
        optim = self.run.optim
        trained = [p for p in module.parameters() if p.requires_grad]
        lr = torch.tensor(optim.lr, device=self.device) if graphs else optim.lr  # a graph reads it from the device
        # Only the fused kernel can skip a step by a flag on the device.
        return torch.optim.AdamW(trained, lr=lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True, capturable=graphs)

    def modules(self) -> dict[str, nn.Module]:
        """The networks and buffers that a checkpoint holds, by file."""
        found = {
            TOKENIZER: self.tokenizer,
            "discriminator.safetensors": self.discriminator,
            "codebook.safetensors": self.codebook,
        }
        return {name: module for name, module in found.items() if module is not None}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers, by file of a checkpoint."""
        found = {
            "optimizer.safetensors": self.optimizer,
            "discriminator_optimizer.safetensors": self.discriminator_optimizer,
        }
        return {name: optimizer for name, optimizer in found.items() if optimizer is not None}

    def seed(self, step: int) -> None:
        """Makes every draw of a step (mirror images, posterior, revival) a function of (seed, step, rank, rollbacks)."""
        seed_draws(self.run.seed, step, self.parallel.rank if self.parallel.world > 1 else None, self.rollbacks)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.run.optim, step * self.run.train.batch_size, self._total_images)

    def __call__(self, step: int, images_B3HW: Tensor) -> None:
        """Takes step ``step`` on this process's part of a batch, in [-1, 1]; call `seed` before drawing the batch."""
        for optimizer in self.optimizers().values():
            set_learning_rate(optimizer, self.rate(step))
        joined = self.discriminator is not None and step * self.run.train.batch_size >= self.run.discriminator.start_images
        if self._images is None:
            self._images = images_B3HW.clone()
        elif joined != self._captured_joined:
            self._graphs.clear()  # the step without a discriminator does not come again
        self._captured_joined = joined
        self._images.copy_(images_B3HW)
        self.meter.add(*self._graphs.run((joined,), partial(self._step, self._images, joined)))

    def _step(self, images_B3HW: Tensor, joined: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Does all of a step on the device: (bad, measured values)."""
        discriminator = self.discriminator if joined else None
        if discriminator is not None:
            discriminator.requires_grad_(False)  # the autoencoder's loss does not train it
        # Each loss is differentiated by the decoded images first, and the sum of these gradients goes through the autoencoder once.
        # So the adaptive weight costs two more gradients of one layer, and none of the discriminator or the perceptual network.
        with self._autocast():
            decoded = self.autoencode(images_B3HW)
            images = decoded.images_B3HW.detach().requires_grad_()
            errors = self.compare(images, images_B3HW)
            adversarial = errors.l1.new_zeros(()) if discriminator is None else -discriminator(images).mean()
        (gradient,) = torch.autograd.grad(errors.l1 + errors.perceptual, images)
        loss, weight = errors.l1 + errors.perceptual + decoded.penalty, errors.l1.new_zeros(())
        if discriminator is not None:
            (pull,) = torch.autograd.grad(adversarial, images)
            last_layer = self.network.decoder.conv_out.weight
            weight = adaptive_weight(decoded.images_B3HW, gradient, pull, last_layer, self.parallel)
            gradient = gradient + self.run.discriminator.weight * weight * pull
            loss = loss + self.run.discriminator.weight * weight * adversarial
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((decoded.images_B3HW, decoded.penalty), (gradient.to(decoded.images_B3HW.dtype), None))
        bad = self._update(self.optimizer, loss)
        values = {"l1": errors.l1, "mse": errors.squared, "regularisation": decoded.regularisation}
        if self.perceptual is not None:
            values["perceptual"] = errors.perceptual
        if self.codebook is not None and decoded.quantised is not None:
            self.codebook.update(decoded.quantised, ~bad, self.optimizer)
        if discriminator is not None:
            values |= {"adaptive_weight": weight, "adversarial": adversarial}
            values["discriminator"], discriminator_bad = self._train_discriminator(images_B3HW, images.detach())
            bad = bad | discriminator_bad
        # Detached, because a graph that is kept alive would tie the next step to this one's stream.
        return bad, {name: value.detach() for name, value in values.items()}

    def autoencode(self, images_B3HW: Tensor) -> Decoded:
        """Images through encoder, posterior or codebook, and decoder."""
        network = self.tokenizer.config.network
        encoded = network.encode(self.network, images_B3HW)
        if self.codebook is not None:
            quantised = self.codebook(encoded)
            made = network.decode_codes(self.network, quantised.codes_BCHW)
            return Decoded(made, quantised.loss, quantised.loss, quantised)
        mean, log_variance = encoded.float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        made = network.decode(self.network, mean + (log_variance / 2).exp() * torch.randn_like(mean))
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
        regularisation = divergence.mean()
        # Divided by an image's values, because the errors are means over values.
        return Decoded(made, regularisation, self.run.loss.kl_weight * regularisation / images_B3HW[0].numel(), None)

    def compare(self, made_B3HW: Tensor, images_B3HW: Tensor) -> Errors:
        """The distances that training minimises, without the discriminator's."""
        difference = made_B3HW.float() - images_B3HW
        l1, squared = difference.abs().mean(), difference.detach().square().mean()
        perceptual = l1.new_zeros(())
        if self.perceptual is not None:
            perceptual = self.run.loss.perceptual_weight * self.perceptual(made_B3HW, images_B3HW).mean()
        return Errors(l1, perceptual, squared)

    def finite(self) -> bool:
        """True if the weights are finite in all processes; waits for the device."""
        return all_finite([p.detach() for module in self.modules().values() for p in module.parameters()], self.parallel)

    def load(self, checkpoint: Path) -> None:
        """Restores networks and optimizers."""
        for name, module in self.modules().items():
            load_state(module, read_tensors(checkpoint / name), str(checkpoint / name))
        for name, optimizer in self.optimizers().items():
            load_optimizer(optimizer, read_tensors(checkpoint / name))
        self._graphs.clear()  # loading has replaced the moments that they update

    def _train_discriminator(self, real_B3HW: Tensor, made_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's own step; (loss, bad)."""
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        discriminator = self.discriminator.requires_grad_(True)
        with self._autocast():
            loss = hinge(discriminator(real_B3HW).float(), discriminator(made_B3HW).float())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss, self._update(self.discriminator_optimizer, loss)

    def _update(self, optimizer: torch.optim.AdamW, loss: Tensor) -> Tensor:
        """Averages loss and gradients over the processes, and steps unless something is not finite; returns whether it was not."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss = loss.detach().clone()
        self.parallel.average_all([loss, *(p.grad for p in parameters if p.grad is not None)])
        return update_weights(optimizer, parameters, loss, self.run.optim.clip)[1]

    def _compiled_parts(self) -> Iterator[nn.Module]:
        """The blocks that repeat and take the time."""
        encoder, decoder = self.network.encoder, self.network.decoder
        # Not the decoder's last layer, which is differentiated separately. Not its upsampling: Inductor of torch 2.13 gets the
        # gradient between convolutions wrong (layout optimisation, on a CPU).
        yield from (*encoder.down_blocks, encoder.mid_block, decoder.mid_block)
        yield from (resnet for block in decoder.up_blocks for resnet in block.resnets)
        yield from (part for part in (self.perceptual, self.discriminator) if part is not None)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()


def pick_engine(chosen: str, device: torch.device, parallel: SingleProcess) -> str:
    """The engine that ``train.engine`` "auto" means here; any other is itself.

    Raises:
        UserError: graphs without a CUDA device, or of several processes.
    """
    cuda, together = device.type == "cuda", parallel.world > 1
    if chosen == "auto":
        return "eager" if not cuda else "compile" if together else "compile-graphs"
    graphs = f"train.engine is '{chosen}', CUDA graphs, which "
    require(cuda or not chosen.endswith("graphs"), f"{graphs}a {device.type} device does not have; allowed: eager, compile")
    require(
        not (together and chosen.endswith("graphs")),
        f"{graphs}do not hold what {parallel.world} processes send one another; allowed: auto, eager, compile",
    )
    return chosen


class TokenizerObjective(Objective):
    """A tokenizer that learns to reconstruct images.

    Args:
        images: the batches.
    """

    def __init__(self, trainer: TokenizerStep, directory: Path, images: ImageBatches) -> None:
        self.trainer, self.directory, self.images = trainer, directory, images

    def step(self, step: int) -> None:
        self.trainer.seed(step)
        self.trainer(step, self.images.batch(step))

    def metrics(self, averages: Averages) -> dict[str, float]:
        means = averages.means
        # Values run from -1 to 1, so the peak is 2.
        psnr = 10 * math.log10(4 / means["mse"]) if means["mse"] > 0 else math.nan
        found = {"loss": means["l1"] + means.get("perceptual", 0.0), **means, "psnr": psnr}
        if self.trainer.codebook is not None:
            found["codes_used"], found["perplexity"] = self.trainer.codebook.read_usage()
        return found

    @torch.no_grad()
    def pictures(self, done: int) -> dict[str, Image.Image]:
        """Images above their reconstructions."""
        if not self.trainer.parallel.first:
            return {}
        tokenizer = self.trainer.tokenizer.eval()
        images = self.images.first(SHOWN_IMAGES)
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one picture
            both = torch.cat((images, tokenizer.reconstruct(tokenizer.encode(images))))
        tokenizer.train()
        return {"reconstructions": grid(to_uint8(both).cpu().numpy(), None, columns=len(images))}

    def save(self, done: int) -> Path:
        """Writes a saved tokenizer with the training state beside it; the first process does it, and the others wait."""
        trainer, destination = self.trainer, self.directory / "checkpoints" / f"step-{done:08d}"
        with raise_on_all_ranks(trainer.parallel):
            if trainer.parallel.first:
                with atomic_directory(destination) as temporary:
                    for name, module in trainer.modules().items():
                        write_tensors(temporary / name, module.state_dict())
                    for name, optimizer in trainer.optimizers().items():
                        write_tensors(temporary / name, optimizer_tensors(optimizer))
                    write_state(temporary, done, trainer.rollbacks, trainer.parallel.world)
                    # Without a checksum, because a scale measured later is written into it.
                    write_json(temporary / TOKENIZER_CONFIG, TokenizerFile(trainer.tokenizer.config))
                drop_old(self.directory, trainer.run.train)
        return destination

    def load(self, skip: int = 0) -> int:
        return load_newest(self.directory, self.trainer, skip, lambda checkpoint, trainer: trainer.load(checkpoint))


def train_tokenizer(
    run: TokenizerRun,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    parallel: SingleProcess | None = None,
) -> VAETokenizer | VQTokenizer:
    """Trains a tokenizer in ``directory`` and returns it; without its scale if the run was stopped before its end.

    Args:
        resume: continue the run in ``directory``; a directory without one starts from the beginning.
        force: resume although the config differs.
        on_report: called after every step.
        on_read: called with (images read, images in all) while the data is read.
        should_stop: asked after every step; if true, the run ends there, after a checkpoint.
        parallel: the processes that train together (`joined`); one if not given.

    Raises:
        UserError: bad data, a directory that holds another run, processes that cannot share a batch evenly, too many non-finite
            steps in a row.
        Interrupted: Ctrl-C; a checkpoint was kept.
    """
    parallel, loop = parallel or SingleProcess(), run.train
    with raise_on_all_ranks(parallel):
        check_directory(run, directory, resume, force)
        part = parallel.part(loop.batch_size)
        pick_engine(loop.engine, device, parallel)  # refuses before the images are read
        perceptual = build_perceptual(run.loss, device)
        options = {"batch_size": loop.batch_size, "seed": run.seed, "device": device, "part": part, "on_read": on_read}
        images = open_images(run.data, run.tokenizer.image_size, **options)
    torch.manual_seed(run.seed)
    objective = TokenizerObjective(TokenizerStep(run.tokenizer.build().to(device), run, perceptual, parallel), directory, images)
    first = objective.load() if resume else 0
    begin_directory(directory, run, parallel)
    complete = Trainer(objective, run, directory, on_report, should_stop).run_from(first)
    tokenizer = objective.trainer.tokenizer.eval().requires_grad_(False)
    config = tokenizer.config
    if not complete:
        return tokenizer
    if isinstance(tokenizer, VAETokenizer):
        config = replace(config, scale=measure_scale(tokenizer, images, loop, parallel))
    with raise_on_all_ranks(parallel):
        if parallel.first:
            save_tokenizer(config, tokenizer.state_dict(), directory / "tokenizer")
    finished = config.build().to(device)
    finished.load_state_dict(tokenizer.state_dict())
    return finished


@torch.no_grad()
def measure_scale(tokenizer: VAETokenizer, images: ImageBatches, loop: TokenizerLoopConfig, parallel: SingleProcess) -> float:
    """The factor that brings latents to unit deviation, from about ``measure_images`` training images, each used at most once."""
    moments, steps = MomentAccumulator(covariance=False), max(1, min(loop.measure_images, images.count) // loop.batch_size)
    with raise_on_all_ranks(parallel), torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            add_latents(moments, tokenizer.encode(images.plain(step)), tokenizer.config.network.has_variance)
    moments.all_reduce(parallel.total)
    with raise_on_all_ranks(parallel):
        found = latent_statistics(moments, steps * loop.batch_size)
    return found.scale
