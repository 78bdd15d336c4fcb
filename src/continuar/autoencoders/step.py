"""One training step of a tokenizer (LDM, Rombach et al. 2022; VQGAN, Esser et al. 2021).

1. Images through encoder, posterior or codebook, and decoder.
2. Errors: L1 of pixels and a perceptual distance. Regularisation: KL, or commitment to codes.
3. From ``discriminator.start_images`` on, the decoder also learns to pass for real, with the adaptive weight; then the
   discriminator takes a step of its own on the same images.
4. Codes move.

A step whose loss or gradient norm is not finite changes nothing, and nothing is read back to the host.

Several processes each take a part of the batch. Losses are means over images, so means over processes of gradients (2, 3: before
norms are taken of them) and of losses are those of the whole batch, and all processes decide alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continuar.autoencoders.captured import Captured
from continuar.autoencoders.codebook import CodebookLearner, Quantised
from continuar.autoencoders.config import TokenizerRun
from continuar.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, hinge
from continuar.autoencoders.perceptual import Perceptual
from continuar.errors import require
from continuar.tokenizers import VAETokenizer, VQTokenizer
from continuar.training.optim import learning_rate
from continuar.training.parallel import Single


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

    def __init__(self, device: torch.device, parallel: Single) -> None:
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
        parallel: Single | None = None,
    ) -> None:
        self.tokenizer, self.run, self.perceptual = tokenizer.train().requires_grad_(True), run, perceptual
        self.parallel = parallel or Single()
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


def pick_engine(chosen: str, device: torch.device, parallel: Single) -> str:
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
