"""Batches of images without labels, as a pure function of (seed, step): from memory, or decoded when they are needed.

A whole training step as one CUDA graph: networks this small leave a GPU waiting for the thousands of launches of a step.

Everything of a step is on the device (`TokenizerStep`), so all of it can be captured, optimizers included. Of each kind of step
(before and after the discriminator joins) the first few run as they are: libraries choose their algorithms, optimizers make their
moments. They are steps of the run like any other. The next one is captured, and from then on replayed.

One training step of a tokenizer (LDM, Rombach et al. 2022; VQGAN, Esser et al. 2021).

1. Images through encoder, posterior or codebook, and decoder.
2. Errors: L1 of pixels and a perceptual distance. Regularisation: KL, or commitment to codes.
3. From ``discriminator.start_images`` on, the decoder also learns to pass for real, with the adaptive weight; then the
   discriminator takes a step of its own on the same images.
4. Codes move.

A step whose loss or gradient norm is not finite changes nothing, and nothing is read back to the host.

Several processes each take a part of the batch. Losses are means over images, so means over processes of gradients (2, 3: before
norms are taken of them) and of losses are those of the whole batch, and all processes decide alike.

Checkpoints of a tokenizer's run: a saved tokenizer with what its training needs beside it, checksummed.

The training loop of a tokenizer.

1. Open the images; build the networks, or restore the newest intact checkpoint of the run.
2. For each step: seed, batch, step. Now and then: metrics, reconstructions, a checkpoint.
3. At the end: measure the latents of a KL tokenizer, and keep the tokenizer with its scale in ``tokenizer/``.

Every step is a function of (seed, step) and of the number of processes, so a resumed run continues the same stream exactly. Several
processes do all of this together (`training.parallel`), each with its part of every batch; the first writes the files.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from continuar.caching import LatentSums
from continuar.checkpoints.store import TOKENIZER, load_state
from continuar.checkpoints.tokenizers import TOKENIZER_CONFIG, TokenizerFile, save_tokenizer
from continuar.config import differences, to_json
from continuar.data.loader import ImageSet, check_skipped, decode_block, load_images
from continuar.data.sources import Source, find_source
from continuar.devices import GIB
from continuar.distributed import SingleProcess, raise_on_all_ranks
from continuar.errors import RemoteRankError, UserError, require
from continuar.io import atomic_directory, checksum, read_config, read_json, read_tensors, write_json, write_tensors
from continuar.pictures import grid, save_png
from continuar.pipeline import to_uint8
from continuar.tokenizers import VAETokenizer, VQTokenizer
from continuar.training.checkpoint import load_optimizer, optimizer_tensors
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
from continuar.training.metrics import RunLog
from continuar.training.step import learning_rate
from continuar.training.trainer import Interrupted, Report, Signals, Stop, begin_directory, noted_signals

_LOG = logging.getLogger("continuar")


class ImageBatches(ABC):
    """Images [B, 3, H, W] in [-1, 1] on a device.

    Args:
        batch_size: of all processes together.
        part: which images of every batch are asked for; all if not given.
    """

    def __init__(self, count: int, batch_size: int, seed: int, flip: bool, device: torch.device, part: range | None = None) -> None:
        self._index, self._part = IndexStream(count, batch_size, seed), part or range(batch_size)
        self._augmentation, self._device = DataConfig(flip=flip), device

    @abstractmethod
    def pixels(self, step: int) -> Tensor:
        """uint8 [B, 3, H, W] of the part of batch ``step``, on the device."""

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The first images of the data, in [-1, 1]: to look at."""

    @property
    def count(self) -> int:
        """Images in all."""
        return self._index.count

    def rows(self, step: int) -> np.ndarray:
        """Where the images of the part of batch ``step`` stand in the data, int64 [B]."""
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
    """Images decoded when they are needed, one batch ahead; one that cannot be used gives its place to the next that can."""

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
        found = future.result() if future is not None else None  # also waits for a batch that nobody wants: one reader at a time
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
    """The run's images; in memory if they fit.

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


Result = TypeVar("Result")
WARMUP_STEPS = 3


class Captured(Generic[Result]):
    """Calls a function of (images, kind) whose draws come from the default generator of a CUDA device, replayed or not.

    What the function reads and writes must keep its place from a kind's first capture on; a checkpoint is loaded before it.

    Args:
        device: where everything happens.
    """

    def __init__(self, device: torch.device) -> None:
        # One stream for all: what its allocations leave is used again, by the next step that warms up.
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._kind: bool | None = None
        self._begin()

    def _begin(self) -> None:
        """Forgets the graph: kinds of steps do not come again."""
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images: Tensor | None = None
        self._result: Result | None = None

    def __call__(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> Result:
        """The function's result, which the next call overwrites.

        Args:
            function: the same at every call, without host synchronisation.
            images: of the same shape at every call.
        """
        if kind != self._kind:
            self._kind = kind
            self._begin()
        if self._runs < WARMUP_STEPS:
            self._runs += 1
            return self._on_stream(function, images, kind)
        if self._images is None:
            self._images = torch.empty_like(images)
        self._images.copy_(images)
        if self._graph is None:
            self._graph = self._capture(function, self._images, kind)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _on_stream(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> Result:
        """As captures want what runs before them."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function(images, kind)
        current.wait_stream(self._stream)
        return result

    def _capture(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> torch.cuda.CUDAGraph:
        state = torch.cuda.get_rng_state(self._device)  # a capture computes nothing, but moves the generator on
        graph = torch.cuda.CUDAGraph()
        # Left to itself torch captures on a stream of the current device, which need not be this one.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=self._stream):
            self._result = function(images, kind)
        torch.cuda.set_rng_state(state, self._device)
        return graph


@dataclass(frozen=True)
class Decoded:
    """A batch that went through the autoencoder, with the terms that do not look at its images."""

    images_B3HW: Tensor
    regularisation: Tensor
    """KL per image, or the commitment (and codebook) loss."""
    penalty: Tensor
    """The same, weighted."""
    quantised: Quantised | None


@dataclass(frozen=True)
class Errors:
    """How far decoded images are from the real ones; scalars."""

    l1: Tensor
    perceptual: Tensor
    """Weighted."""
    squared: Tensor
    """Mean squared error of pixels in [-1, 1]."""


class Meter:
    """Sums of named scalars on the device; read on the host only when metrics are written.

    Args:
        parallel: the processes that train together.
    """

    def __init__(self, device: torch.device, parallel: SingleProcess) -> None:
        self._device, self._parallel = device, parallel
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._streak = torch.zeros((), device=device)
        self._longest = torch.zeros((), device=device)
        self._bad = torch.zeros((), device=device)

    def add(self, bad: Tensor, **values: Tensor) -> None:
        """Counts one step; the values of a bad one are left out."""
        for name, value in values.items():
            zero = torch.zeros((), device=self._device)
            self._sums[name] = self._sums.get(name, zero) + value.detach().float().masked_fill(bad, 0)
            self._counts[name] = self._counts.get(name, zero) + ~bad
        self._streak = (self._streak + 1) * bad
        self._longest = torch.maximum(self._longest, self._streak)
        self._bad = self._bad + bad

    def read(self) -> tuple[dict[str, float], int, int]:
        """(means, steps skipped, longest streak of skipped steps) since the last read; synchronises, all processes together."""
        names = list(self._sums)
        tensors = [*self._sums.values(), *self._counts.values(), self._bad, self._longest]
        *values, bad, longest = self._parallel.mean(torch.stack(tensors)).tolist()  # counts are the same in all
        sums, counts = values[: len(names)], values[len(names) :]
        means = {n: s / c if c else float("nan") for n, s, c in zip(names, sums, counts, strict=True)}
        self._sums, self._counts = {}, {}
        self._bad, self._longest = torch.zeros_like(self._bad), self._streak
        return means, int(bad), int(longest)


class TokenizerStep:
    """Owns the networks that train and their optimizers.

    Args:
        tokenizer: on its device; trained from here on.
        run: the run's config.
        perceptual: the frozen network of the perceptual term, or None.
        parallel: the processes that train together, from the first one's weights; one if not given.

    Raises:
        UserError: an engine that is not to be had here.
    """

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
        engine = pick_engine(run.train.engine, self.device, self.parallel)
        graphs = engine.endswith("graphs")
        self.codebook = None
        if isinstance(tokenizer, VQTokenizer):
            self.codebook = CodebookLearner(self.network.quantize.embedding.weight, run.codebook, self.parallel)
        self.optimizer = self._adamw(tokenizer, graphs)
        self.discriminator = PatchDiscriminator(run.discriminator).to(self.device) if run.discriminator.weight > 0 else None
        self.discriminator_optimizer = None if self.discriminator is None else self._adamw(self.discriminator, graphs)
        for module in (tokenizer, self.discriminator, self.codebook):
            self.parallel.share(list(module.state_dict().values()) if module is not None else [])
        self.meter = Meter(self.device, self.parallel)
        self._bf16 = run.train.precision == "bfloat16" or (run.train.precision == "auto" and self.device.type == "cuda")
        if engine.startswith("compile"):
            for part in self._compiled_parts():
                part.compile(dynamic=False)
        self._captured: Captured[tuple[Tensor, dict[str, Tensor]]] | None = Captured(self.device) if graphs else None

    def _adamw(self, module: nn.Module, graphs: bool) -> torch.optim.AdamW:
        optim = self.run.optim
        trained = [p for p in module.parameters() if p.requires_grad]
        lr = torch.tensor(optim.lr, device=self.device) if graphs else optim.lr  # what a graph reads has a place on the device
        # Fused: it can skip a step on the device, without a host read.
        return torch.optim.AdamW(trained, lr=lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True, capturable=graphs)

    def seed(self, step: int) -> None:
        """Makes every draw of a step (mirror images, posterior, revival) a function of (seed, step), and of the process."""
        name = f"{self.run.seed}/{step}" + (f"/{self.parallel.rank}" if self.parallel.world > 1 else "")
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def __call__(self, step: int, images_B3HW: Tensor) -> None:
        """Step ``step`` on this process's part of a batch, in [-1, 1]; call `seed` before it is drawn.

        What judges images is differentiated by the images first, each judge once; the sum of these gradients then goes through
        the autoencoder. So the adaptive weight costs two gradients of one layer, and none of the judges.
        """
        self._set_rate(step)
        judged, captured = self._judged(step), self._captured
        bad, values = self._step(images_B3HW, judged) if captured is None else captured(self._step, images_B3HW, judged)
        self.meter.add(bad, **values)

    def _step(self, images_B3HW: Tensor, judged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """All that happens on the device: (whether something was not finite, what is measured)."""
        judge = self._judge() if judged else None
        with self._autocast():
            decoded = self.autoencode(images_B3HW)
            images = decoded.images_B3HW.detach().requires_grad_()
            errors = self.compare(images, images_B3HW)
            adversarial = errors.l1.new_zeros(()) if judge is None else -judge(images).mean()
        (gradient,) = torch.autograd.grad(errors.l1 + errors.perceptual, images)
        loss, weight = errors.l1 + errors.perceptual + decoded.penalty, errors.l1.new_zeros(())
        if judge is not None:
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
        if judge is not None:
            values |= {"adaptive_weight": weight, "adversarial": adversarial}
            values["discriminator"], worse = self._train_discriminator(judge, images_B3HW, images.detach())
            bad = bad | worse
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
        # Per value of an image, as the errors are means over values.
        return Decoded(made, regularisation, self.run.loss.kl_weight * regularisation / images_B3HW[0].numel(), None)

    def compare(self, made_B3HW: Tensor, images_B3HW: Tensor) -> Errors:
        """What decoded images are held to, but for the discriminator."""
        difference = made_B3HW.float() - images_B3HW
        l1, squared = difference.abs().mean(), difference.detach().square().mean()
        perceptual = l1.new_zeros(())
        if self.perceptual is not None:
            perceptual = self.run.loss.perceptual_weight * self.perceptual(made_B3HW, images_B3HW).mean()
        return Errors(l1, perceptual, squared)

    def _compiled_parts(self) -> Iterator[nn.Module]:
        """Whatever repeats and holds the time. The decoder's last layer, which is differentiated alone, stays apart, and so does
        enlarging: Inductor of torch 2.13 gets its gradient wrong between convolutions (layout optimisation, on a CPU)."""
        encoder, decoder = self.network.encoder, self.network.decoder
        yield from (*encoder.down_blocks, encoder.mid_block, decoder.mid_block)
        yield from (resnet for block in decoder.up_blocks for resnet in block.resnets)
        yield from (part for part in (self.perceptual, self.discriminator) if part is not None)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def _judged(self, step: int) -> bool:
        """Whether the discriminator has joined."""
        return self.discriminator is not None and step * self.run.train.batch_size >= self.run.discriminator.start_images

    def _judge(self) -> PatchDiscriminator:
        """The discriminator, whose parameters get no gradient from the autoencoder's loss."""
        assert self.discriminator is not None
        return self.discriminator.requires_grad_(False)

    def _train_discriminator(self, judge: PatchDiscriminator, real_B3HW: Tensor, made_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Its own step; returns its loss, and whether that was not finite."""
        assert self.discriminator_optimizer is not None
        judge.requires_grad_(True)
        with self._autocast():
            loss = hinge(judge(real_B3HW).float(), judge(made_B3HW).float())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss, self._update(self.discriminator_optimizer, loss)

    def _update(self, optimizer: torch.optim.AdamW, loss: Tensor) -> Tensor:
        """Clips and steps, unless something is not finite in any process; returns whether it was not, as a tensor."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss = loss.detach().clone()
        self.parallel.average_all([loss, *(p.grad for p in parameters if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip or float("inf"), foreach=True)
        bad = ~(loss + norm).isfinite()
        # The fused kernel reads this flag as gradient scaling does, and leaves weights and moments alone if it is 1.
        setattr(optimizer, "found_inf", bad.float())  # noqa: B010 (an attribute AdamW reads but does not declare)
        optimizer.step()
        return bad

    def _set_rate(self, step: int) -> None:
        loop = self.run.train
        lr = learning_rate(self.run.optim, step * loop.batch_size, loop.steps * loop.batch_size)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups if optimizer is not None else ():
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr


def pick_engine(chosen: str, device: torch.device, parallel: SingleProcess) -> str:
    """Which ``train.engine`` "auto" is here; any other is itself.

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


STATE = "state.json"
_LOG = logging.getLogger("continuar")


def newest_checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run directory, newest first."""
    return sorted((p.parent for p in run_directory.glob(f"checkpoints/step-*/{STATE}")), reverse=True)


def save_checkpoint(run_directory: Path, trainer: TokenizerStep, step: int, keep: int) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN`` (``step`` optimizer steps are done) and drops all but the newest ``keep``.

    The first process does it, and the others wait.
    """
    destination = run_directory / "checkpoints" / f"step-{step:08d}"
    with raise_on_all_ranks(trainer.parallel):
        if trainer.parallel.first:
            _write(destination, trainer, step)
            for old in newest_checkpoints(run_directory)[keep:]:
                shutil.rmtree(old)
    return destination


def load_newest(run_directory: Path, trainer: TokenizerStep) -> int:
    """Restores the newest intact checkpoint and returns its step; a damaged one is said loudly and passed over, by all processes.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found = newest_checkpoints(run_directory)
    for checkpoint in found:
        try:
            with raise_on_all_ranks(trainer.parallel):
                step = _load(checkpoint, trainer)
        except RemoteRankError:
            continue
        except (UserError, OSError) as problem:
            _LOG.error("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
        else:
            return step
    with raise_on_all_ranks(trainer.parallel):
        require(not found, f"every checkpoint in {run_directory / 'checkpoints'} is damaged")
    return 0


def _write(destination: Path, trainer: TokenizerStep, step: int) -> None:
    with atomic_directory(destination) as temporary:
        for name, tensors in _files(trainer).items():
            write_tensors(temporary / name, tensors)
        # The config is not part of the sums: a scale measured later is kept in it.
        sums = {p.name: checksum(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / TOKENIZER_CONFIG, TokenizerFile(trainer.tokenizer.config))
        write_json(temporary / STATE, {"step": step, "checksums": sums})


def _modules(trainer: TokenizerStep) -> dict[str, nn.Module]:
    modules = {
        TOKENIZER: trainer.tokenizer,
        "discriminator.safetensors": trainer.discriminator,
        "codebook.safetensors": trainer.codebook,
    }
    return {name: module for name, module in modules.items() if module is not None}


def _files(trainer: TokenizerStep) -> dict[str, dict[str, Tensor]]:
    files = {name: module.state_dict() for name, module in _modules(trainer).items()}
    return files | {name: optimizer_tensors(optimizer) for name, optimizer in _optimizers(trainer).items()}


def _optimizers(trainer: TokenizerStep) -> dict:
    optimizers = {
        "optimizer.safetensors": trainer.optimizer,
        "discriminator_optimizer.safetensors": trainer.discriminator_optimizer,
    }
    return {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}


def _load(checkpoint: Path, trainer: TokenizerStep) -> int:
    state = read_json(checkpoint / STATE)
    require(isinstance(state, dict) and {"step", "checksums"} <= set(state), f"{checkpoint / STATE} lacks its entries")
    for name, expected in state["checksums"].items():
        path = checkpoint / name
        require(path.is_file() and checksum(path) == expected, f"{path} is missing or its checksum differs")
    for name, module in _modules(trainer).items():
        load_state(module, read_tensors(checkpoint / name), str(checkpoint / name))
    for name, optimizer in _optimizers(trainer).items():
        load_optimizer(optimizer, read_tensors(checkpoint / name))
    return int(state["step"])


_SHOWN = 16
"""Images in a picture of reconstructions."""


def train_tokenizer(
    run: TokenizerRun,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    parallel: SingleProcess | None = None,
) -> VAETokenizer | VQTokenizer:
    """Trains a tokenizer in ``directory``; see the module's docstring.

    Args:
        resume: continue the run in ``directory``; a directory without one starts from the beginning.
        force: resume although the config differs.
        on_report: called after every step.
        on_read: called with (images read, images in all) while the data is read.
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
        perceptual = build_perceptual(run.loss, device)
        images = open_images(
            run.data,
            run.tokenizer.image_size,
            batch_size=loop.batch_size,
            seed=run.seed,
            device=device,
            part=part,
            on_read=on_read,
        )
    torch.manual_seed(run.seed)
    with raise_on_all_ranks(parallel):
        trainer = TokenizerStep(run.tokenizer.build().to(device), run, perceptual, parallel)
    first = load_newest(directory, trainer) if resume else 0
    begin_directory(directory, run, parallel)
    _Loop(run, directory, trainer, images, on_report, first).steps_from(first)
    tokenizer = trainer.tokenizer.eval().requires_grad_(False)
    config = tokenizer.config
    if isinstance(tokenizer, VAETokenizer):
        config = replace(config, scale=_scale(tokenizer, images, loop, parallel))
    with raise_on_all_ranks(parallel):
        if parallel.first:
            save_tokenizer(config, tokenizer.state_dict(), directory / "tokenizer")
    finished = config.build().to(device)
    finished.load_state_dict(tokenizer.state_dict())
    return finished


def check_directory(run: TokenizerRun, directory: Path, resume: bool, force: bool) -> None:
    """Refuses to mix runs: another run's directory, or a resumed run whose config changed."""
    require(not directory.exists() or directory.is_dir(), f"{directory} is a file; allowed: a directory for the run")
    config = directory / "config.json"
    if not config.exists():
        return
    require(resume, f"{directory} already holds a run; --resume continues it, or choose another --out")
    changed = differences(to_json(read_config(TokenizerRun, config)), to_json(run))
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


class _Loop:
    """Steps, with what is written in between."""

    def __init__(
        self,
        run: TokenizerRun,
        directory: Path,
        trainer: TokenizerStep,
        images: ImageBatches,
        on_report: Callable[[Report], None] | None,
        first: int,
    ) -> None:
        self.run, self.directory, self.trainer, self.images, self.on_report = run, directory, trainer, images, on_report
        self.parallel = trainer.parallel
        self.log = RunLog(directory, first) if self.parallel.first else None
        self._since, self._since_step = time.monotonic(), first

    def steps_from(self, first: int) -> None:
        """Runs steps ``first`` to the last; Ctrl-C or SIGTERM ends it after a checkpoint."""
        loop, stop = self.run.train, Stop.NO
        checkpoint = self.directory
        with noted_signals() as signals:
            for step in range(first, loop.steps):
                self.trainer.seed(step)
                self.trainer(step, self.images.batch(step))
                done = step + 1
                metrics = self._write_metrics(done) if self._due(done, loop.log_images) else {}
                if self.log is not None and loop.sample_images and self._due(done, loop.sample_images):
                    self._draw(done, self.log)
                stop = self._stop(signals) if done < loop.steps else Stop.NO
                if stop or done == loop.steps or (loop.save_images and self._due(done, loop.save_images)):
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
                if stop:
                    break
        if self.log is not None:
            self.log.close()
        if stop:
            raise Interrupted(checkpoint)

    def _stop(self, signals: Signals) -> Stop:
        """What all processes agree on."""
        return Stop(self.parallel.most(signals.stop))

    def _due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``, or the last step."""
        batch = self.run.train.batch_size
        return done == self.run.train.steps or done * batch // every_images > (done - 1) * batch // every_images

    def _write_metrics(self, done: int) -> dict[str, float | int]:
        means, skipped, streak = self.trainer.meter.read()
        limit = self.run.train.max_bad_steps
        if streak >= limit:
            kept = newest_checkpoints(self.directory)
            with raise_on_all_ranks(self.parallel):
                raise UserError(
                    f"{streak} steps in a row had a non-finite loss or gradient (train.max_bad_steps is {limit}); try a lower "
                    "--optim.lr or --train.precision float32, and look at the data; "
                    + (f"the last checkpoint is {kept[0]}" if kept else "there is no checkpoint yet")
                )
        now, batch = time.monotonic(), self.run.train.batch_size
        elapsed = max(now - self._since, 1e-9)
        metrics: dict[str, float | int] = {"images": done * batch, "loss": means["l1"] + means.get("perceptual", 0.0), **means}
        # Values run from -1 to 1, so the peak is 2.
        metrics["psnr"] = 10 * math.log10(4 / means["mse"]) if means["mse"] > 0 else float("nan")
        if self.trainer.codebook is not None:
            metrics["codes_used"], metrics["perplexity"] = self.trainer.codebook.read_usage()
        metrics["lr"] = learning_rate(self.run.optim, (done - 1) * batch, self.run.train.steps * batch)
        metrics |= {"skipped_steps": skipped, "images_per_second": (done - self._since_step) * batch / elapsed}
        if self.log is not None:
            self.log.write(done, metrics)
        self._since, self._since_step = now, done
        return metrics

    @torch.no_grad()
    def _draw(self, done: int, log: RunLog) -> None:
        """Images above their reconstructions."""
        began = time.monotonic()
        tokenizer = self.trainer.tokenizer.eval()
        images = self.images.first(_SHOWN)
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one picture
            both = torch.cat((images, tokenizer.reconstruct(tokenizer.encode(images))))
        tokenizer.train()
        picture = grid(to_uint8(both).cpu().numpy(), None, columns=len(images))
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        save_png(picture, folder / f"step-{done:08d}.png")
        log.picture(done, "reconstructions", picture)
        # Drawing is not training: keep it out of images per second.
        self._since += time.monotonic() - began

    def _save(self, done: int) -> Path:
        began = time.monotonic()
        checkpoint = save_checkpoint(self.directory, self.trainer, done, self.run.train.keep)
        self._since += time.monotonic() - began
        return checkpoint


@torch.no_grad()
def _scale(tokenizer: VAETokenizer, images: ImageBatches, loop: TokenizerLoopConfig, parallel: SingleProcess) -> float:
    """What brings latents to unit deviation, on about ``measure_images`` training images, each once at most: a shuffled pass."""
    sums = LatentSums(tokenizer.config.network.has_variance)
    with raise_on_all_ranks(parallel), torch.compiler.set_stance("force_eager"):
        for step in range(max(1, min(loop.measure_images, images.count) // loop.batch_size)):
            sums.add(tokenizer.encode(images.plain(step)))
    sums.join(parallel)
    with raise_on_all_ranks(parallel):
        found = sums.statistics()
    return found.scale
