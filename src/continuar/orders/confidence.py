"""On-the-fly order: at every step the positions whose drawn tokens are most probable become known.

MaskGIT (Chang et al. 2022), MAGE (Li et al. 2023); the paper's Table 5:

1. A token is drawn at every unknown position.
2. confidence = log p(token) + choice_temperature (1 - progress) g, with g ~ Gumbel(0, 1): annealed, so that early steps explore.
3. The most confident positions, as many as the step's group (sizes as in `mar`), keep their tokens; the others are drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from continuar.errors import require
from continuar.noise import Purpose, RowNoise
from continuar.orders.mar import MAROrder


@dataclass(frozen=True)
class ConfidenceOrderConfig:
    """The most probable tokens first, in groups that grow by a cosine; needs a head with probabilities."""

    kind: Literal["confidence"] = "confidence"
    choice_temperature: float = 4.5
    """Scale of the Gumbel noise on the confidence before the first step; it falls linearly to 0. MaskGIT: 4.5, MAGE: 6."""
    max_group: ClassVar[int | None] = None
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = self.choice_temperature
        require(0 <= value < float("inf"), f"order.choice_temperature is {value}; allowed: 0 or more, finite")

    def build(self, positions: int) -> ConfidenceOrder:
        """The order over ``positions`` tokens."""
        return ConfidenceOrder(positions, self.choice_temperature)


class ConfidenceOrder(MAROrder):
    """See the module's docstring. Training is that of `mar`: random positions are unknown."""

    chooses = True

    def __init__(self, positions: int, choice_temperature: float = 4.5) -> None:
        super().__init__(positions)
        self.choice_temperature = choice_temperature

    def choose(self, size: int, progress: float, log_prob_BQ: Tensor, noise: RowNoise) -> Tensor:
        uniform = noise.uniform(Purpose.ROUTE, 0, 1).view_as(log_prob_BQ)
        # float32's largest value below 1 keeps the outer logarithm finite.
        gumbel = -(-uniform.clamp(max=1 - 2.0**-24).log()).log()
        confidence = log_prob_BQ + self.choice_temperature * (1 - progress) * gumbel
        return confidence.topk(size, dim=1).indices
