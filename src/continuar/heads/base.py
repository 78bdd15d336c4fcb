"""What every head's sampling options share. Each head's file declares its own, with a literal ``kind``.

What a head is: the model of one token's distribution given its condition vector z.

A head's config says what it makes (``token_kind``), whether it knows the probability of what it drew (``has_log_prob``), and its
default ``options``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from continuar.errors import UserError, require
from continuar.noise import GeneratorNoise, RowNoise

T = TypeVar("T", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to draw a token, besides temperature and guidance: those are tensors beside it, because a captured graph would bake in
    a number."""

    def check_temperature(self, temperature: float) -> None:
        """Refuses a temperature that the head cannot apply."""
        check_scale("temperature", temperature)

    def check_tokens(self, size: int) -> None:
        """Refuses options that do not fit tokens of ``size`` dimensions, or ids of that many."""


def option_names(kind: type[Options]) -> list[str]:
    """The names of a head's options."""
    return [f.name for f in dataclasses.fields(kind) if f.name != "kind"]


def with_values(options: T, values: dict[str, Any]) -> T:
    """The options with some values replaced.

    Raises:
        UserError: an option this head does not have.
    """
    allowed = option_names(type(options))
    for name, value in values.items():
        if name not in allowed:
            raise UserError(
                f"{name} is {value}, an option that the {getattr(options, 'kind', '')} head does not have; "
                f"allowed: {', '.join(allowed) or 'none'}"
            )
    return dataclasses.replace(options, **values)


@dataclass(frozen=True)
class HeadSample:
    """Drawn tokens [M, D] (or ids [M]) and, from heads that have one, their log-probability (or log-density) [M]."""

    tokens: Tensor
    log_prob: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """What a head needs to guide: the unconditional condition vectors [M, Z] and the scale, a 0-d tensor on their device.

    The scale is a tensor because it changes at every step: as a Python float it would be baked into a captured graph.
    """

    z_uncond: Tensor
    scale: Tensor


def check_scale(name: str, value: float) -> None:
    """Refuses a guidance scale or temperature that is negative, infinite or NaN."""
    require(0 <= value < float("inf"), f"{name} is {value}; allowed: 0 or more, finite")


class LossByTimestep(nn.Module):
    """A module whose loss may be at random times.

    Attributes:
        time_losses: [2, 4] sums and counts of losses by quarter of time, where someone who watches training has put a tensor;
            modules that draw times add to it.
    """

    time_losses: Tensor | None = None

    def record_loss_by_timestep(self, time: Tensor, loss: Tensor) -> None:
        """Adds losses at times in [0, 1), both of one shape, to ``time_losses``; on the device, and none if nobody watches."""
        if self.time_losses is not None:
            quarter = (4 * time).long().view(-1, 1) == torch.arange(4, device=time.device)
            loss = loss.detach().nan_to_num(0, 0, 0).view(-1, 1)
            self.time_losses += torch.stack((torch.where(quarter, loss, 0).sum(0), quarter.sum(0)))


class Head(LossByTimestep, ABC):
    """z -> loss in training, z -> token in generation. Rows M are independent of one another.

    Attributes:
        cond_dim: Z. token_size: D, or V of ids.
        options_type: the class of this head's options.
    """

    cond_dim: int
    token_size: int
    options_type: ClassVar[type[Options]] = Options

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss: what training calls, so that compilation and parallel wrappers can take hold of the head."""
        return self.loss(z, target)

    @abstractmethod
    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """One value per row [M] for z [M, Z] and target [M, D] (or ids [M]); differentiable in z and the head."""

    @abstractmethod
    def draw(
        self, z: Tensor, *, options: Any, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        """Draws one token per row of z [M, Z], a pure function of its arguments.

        Args:
            options: an ``options_type``.
            temperature: 0-d tensor >= 0.
            noise: the rows' randomness.
            guidance: the unconditional vectors [M, Z] and the scale, or None.
        """

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        *,
        temperature: float = 1.0,
        z_uncond: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Draws one token, [M, D] or ids [M], for each row of z [M, Z].

        Args:
            temperature: >= 0; lower is less diverse.
            z_uncond, guidance: unconditional vectors [M, Z] and the scale of classifier-free guidance (1: none).
            generator: torch's default generator if None.
            options: of this head, by name; the diffusion head has ``diffusion_steps`` and ``sampler``.

        Raises:
            UserError: a shape, a value or an option that is not allowed.
        """
        require(z.ndim == 2 and z.shape[1] == self.cond_dim, f"z is {tuple(z.shape)}; allowed: [M, {self.cond_dim}]")
        check_scale("guidance", guidance)
        chosen = with_values(self.options_type(), options)
        chosen.check_temperature(temperature)
        chosen.check_tokens(self.token_size)
        guide = None
        if z_uncond is not None:
            require(z_uncond.shape == z.shape, f"z_uncond is {tuple(z_uncond.shape)}; allowed: {tuple(z.shape)}")
            guide = Guidance(z_uncond, torch.tensor(guidance, device=z.device))
        else:
            require(guidance == 1.0, f"guidance is {guidance} without z_uncond; allowed: 1.0, or give z_uncond")
        return self.draw(
            z,
            options=chosen,
            temperature=torch.tensor(temperature, device=z.device),
            noise=GeneratorNoise(len(z), z.device, generator),
            guidance=guide,
        ).tokens


def check_rows(z: Tensor, target: Tensor, cond_dim: int, token_dim: int) -> None:
    """Refuses z and vector targets whose shapes do not belong together."""
    require(
        target.shape == (*z.shape[:-1], token_dim) and z.shape[-1] == cond_dim,
        f"z is {tuple(z.shape)} and x {tuple(target.shape)}; allowed: [M, {cond_dim}] and [M, {token_dim}]",
    )


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1."""
    for name, value in sizes.items():
        require(value >= 1, f"{name} is {value}; allowed: 1 or more")
