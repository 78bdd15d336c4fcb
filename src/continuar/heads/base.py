"""Interfaces of heads: `Head` models one token's distribution given its condition vector z; `Options` say how to draw from it.

Each head's file declares its own options and its config, both with a literal ``kind``. The config derives from `HeadTraits`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from continuar.errors import UserError, check_scale, require
from continuar.noise import GeneratorNoise, RowNoise

T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Options:
    """Settings of drawing a token.

    Temperature and guidance are not among them: they are tensors, because a captured CUDA graph would bake in a number.
    """

    def check_temperature(self, temperature: float) -> None:
        """Refuses a temperature >= 0 that the head cannot apply."""

    def check_tokens(self, size: int) -> None:
        """Refuses options that do not fit tokens of ``size`` dimensions, or ids of that many."""


@dataclass(frozen=True)
class HeadTraits:
    """What a head gives to the other parts, so that parts that cannot work together are refused before anything is built."""

    token_kind: ClassVar[Literal["vector", "id"]] = "vector"
    """The kind of tokens it makes."""
    has_log_prob: ClassVar[bool] = False
    """True if it knows the probability of the token it drew."""


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
    """Drawn tokens [M, D] (or ids [M]) and, from heads with ``has_log_prob``, their log-probability (or log-density) [M]."""

    tokens: Tensor
    log_prob: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """Inputs of classifier-free guidance: the unconditional condition vectors [M, Z] and the scale, a 0-d tensor on their device.

    The scale is a tensor because it changes at every step: as a Python float it would be baked into a captured graph.
    """

    z_uncond: Tensor
    scale: Tensor


class LossByTimestep(nn.Module):
    """A module whose loss is taken at random times, and may be logged by time.

    Attributes:
        time_losses: [2, 4] sums and counts of losses by quarter of time (`add_loss_by_quarter`), or None. Training puts a tensor
            here to watch them.
    """

    time_losses: Tensor | None = None


class Head(LossByTimestep, ABC):
    """z -> loss in training, z -> token in generation. Rows M are independent of one another.

    Attributes:
        cond_dim: Z. token_size: D, or V of ids.
        options_type: the class of this head's options.
    """

    cond_dim: int
    token_size: int
    options_type: ClassVar[type[Options]] = Options

    @abstractmethod
    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss, one value per row [M], for z [M, Z] and target [M, D] (or ids [M]); differentiable in z and the head."""

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """`forward` under the name that says what it returns."""
        return self(z, target)

    @abstractmethod
    def draw(
        self, z: Tensor, *, options: Any, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        """Draws one token per row of z [M, Z], a pure function of its arguments.

        Args:
            options: an ``options_type``.
            temperature: 0-d tensor >= 0.
            noise: the rows' randomness.
            guidance: the unconditional vectors and the scale, or None.
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
        """Draws one token, [M, D] or ids [M], for each row of z [M, Z]; for heads used without a model.

        Args:
            temperature: >= 0; lower is less diverse.
            z_uncond, guidance: unconditional vectors [M, Z] and the scale of classifier-free guidance (1: none).
            generator: torch's default generator if None.
            options: this head's options by name; the diffusion head has ``diffusion_steps`` and ``sampler``.

        Raises:
            UserError: a shape, a value or an option that is not allowed.
        """
        require(z.ndim == 2 and z.shape[1] == self.cond_dim, f"z is {tuple(z.shape)}; allowed: [M, {self.cond_dim}]")
        check_scale("guidance", guidance)
        check_scale("temperature", temperature)
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
