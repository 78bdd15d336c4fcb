"""The categorical head: a softmax over V ids, what autoregression over a codebook uses (the paper's baseline, Table 1).

Loss: cross-entropy, optionally with label smoothing (Szegedy et al. 2016; MAGE: 0.1). Drawing, per row:

1. logits = W z + b; guided: l_u + w (l_c - l_u).
2. Divide by the temperature; keep the ``top_k`` largest, then the fewest that reach ``top_p`` together (Holtzman et al. 2020).
3. Invert the cumulative distribution at one uniform number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.errors import check_sizes, require
from continuar.heads.base import Guidance, Head, HeadSample, HeadTraits, Options
from continuar.heads.diffusion import guided
from continuar.noise import Purpose, RowNoise
from continuar.tensors import without_autocast


@dataclass(frozen=True)
class CategoricalOptions(Options):
    """How to draw an id."""

    kind: Literal["categorical"] = "categorical"
    top_k: int = 0
    """Draw from this many most probable ids, 1 to the vocabulary; 0: all."""
    top_p: float = 1.0
    """Draw from the most probable ids that together reach this probability, above 0 to 1."""

    def __post_init__(self) -> None:
        require(self.top_k >= 0, f"top_k is {self.top_k}; allowed: 1 to the vocabulary, or 0 for all")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; allowed: above 0 to 1")

    def check_tokens(self, size: int) -> None:
        require(self.top_k <= size, f"top_k is {self.top_k}; allowed: 1 to {size}, the vocabulary, or 0 for all")


@dataclass(frozen=True)
class CategoricalHeadConfig(HeadTraits):
    """Cross-entropy over ids; needs a tokenizer that gives ids."""

    kind: Literal["categorical"] = "categorical"
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all ids, 0 up to below 1."""
    token_kind: ClassVar[Literal["vector", "id"]] = "id"
    has_log_prob: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = self.label_smoothing
        require(0 <= value < 1, f"head.label_smoothing is {value}; allowed: 0 up to below 1")

    def options(self) -> CategoricalOptions:
        return CategoricalOptions()

    def build(self, token_size: int, cond_dim: int) -> CategoricalHead:
        return CategoricalHead(token_size, cond_dim, label_smoothing=self.label_smoothing)


class CategoricalHead(Head):
    """Cross-entropy and sampling of one id given z.

    Args:
        vocabulary: V.
        cond_dim: Z.
        label_smoothing: 0..1.
    """

    options_type = CategoricalOptions

    def __init__(self, vocabulary: int, cond_dim: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_sizes(vocabulary=vocabulary, cond_dim=cond_dim)
        require(0 <= label_smoothing < 1, f"label_smoothing is {label_smoothing}; allowed: 0 up to below 1")
        self.token_size = self.vocabulary = vocabulary
        self.cond_dim, self.label_smoothing = cond_dim, label_smoothing
        self.logits = nn.Linear(cond_dim, vocabulary)
        nn.init.xavier_uniform_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats, [M], for z [M, Z] and ids [M]."""
        if target.shape != z.shape[:-1] or z.shape[-1] != self.cond_dim or target.is_floating_point():
            given = f"z is {tuple(z.shape)} and ids {tuple(target.shape)} of {target.dtype}"
            raise ValueError(f"{given}; allowed: [M, {self.cond_dim}], [M] integers")
        logits = self.logits(z)
        with without_autocast(z):
            return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")

    def draw(
        self, z: Tensor, *, options: CategoricalOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        with without_autocast(z):
            logits = tempered(self._guided_logits(z.float(), guidance), temperature)
            probabilities, ids = truncate(logits.softmax(-1), options.top_k, options.top_p)
            # Scaling the uniform by the total, instead of dividing every probability by it, leaves no gap at the end.
            cumulative = probabilities.cumsum(-1)
            point = noise.uniform(Purpose.TOKEN, 0, 1) * cumulative[:, -1:]
            rank = torch.searchsorted(cumulative, point).clamp(max=self.vocabulary - 1)
            chosen = ids.gather(1, rank)
            return HeadSample(chosen.squeeze(1), logits.log_softmax(-1).gather(1, chosen).squeeze(1))

    def _guided_logits(self, z: Tensor, guidance: Guidance | None) -> Tensor:
        """[M, V]."""
        logits = self.logits(z)
        return logits if guidance is None else guided(logits, self.logits(guidance.z_uncond.float()), guidance.scale)


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over the temperature; towards 0, the largest keeps 0 and the others go to large negative numbers."""
    return (logits - logits.max(-1, keepdim=True).values) / temperature.clamp(min=1e-6)


def truncate(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order, zero where truncated, and their ids, [M, V] each. The first is always kept."""
    vocabulary = probabilities.shape[-1]
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    if top_k:
        ordered = ordered.masked_fill(torch.arange(vocabulary, device=ordered.device) >= top_k, 0)
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return ordered, ids
