"""MAR's backbone: the MAE-style bidirectional encoder and decoder (paper, Sections 3.4 and 4.2; He et al. 2022).

Training hides a random number of tokens (`masked_count_distribution`). Then, in training and in generation alike:

1. Encoder: [buffer filled with the condition, known tokens] + positions -> LayerNorm -> blocks -> LayerNorm.
2. Decoder: [encoded buffer, encoded known tokens, one mask token per unknown position] + positions -> blocks -> LayerNorm.
3. z = decoder output at the masked positions + one more learned position embedding.

Attention has no order of its own, so known and masked rows are kept as two runs instead of being scattered back to their places.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from continuar.errors import check_sizes, require
from continuar.models.base import Backbone, BackboneTraits, check_transformer
from continuar.models.positions import Grid, Positions, Rotary, Rotation, no_position
from continuar.models.transformer import LN_EPS, Block, QueryBlock, init_transformer
from continuar.orders import View
from continuar.tensors import batched_gather, batched_scatter_


def masked_count_distribution(seq_len: int, minimum: float, granularity: int) -> dict[int, float]:
    """The probability of every number of masked tokens, ascending (paper, Section 4).

    The mask ratio r is normal with mean 1 and std 0.25, truncated to [minimum, 1]; ceil(N r) tokens are masked. With F the CDF of
    r, P(ceil(N r) = k) = F(k/N) - F((k-1)/N).

    Args:
        seq_len: N. minimum: 0..1. granularity: counts are rounded to the nearest multiple of this, of 1 multiple at least.
    """
    normal = NormalDist(1.0, 0.25)
    below = normal.cdf(minimum)
    if minimum == 1:
        return {seq_len: 1.0}
    cdf = [(normal.cdf(max(k / seq_len, minimum)) - below) / (0.5 - below) for k in range(seq_len + 1)]
    shares: dict[int, float] = {}
    for k in range(1, seq_len + 1):
        if cdf[k] > cdf[k - 1]:
            rounded = max(granularity, (k + granularity // 2) // granularity * granularity)
            count = min(seq_len, rounded)
            shares[count] = shares.get(count, 0.0) + cdf[k] - cdf[k - 1]
    return shares


@dataclass(frozen=True)
class MAEConfig(BackboneTraits):
    """Bidirectional encoder and decoder. Paper: B 768, 12 + 12, 12 heads; L 1024, 16 + 16, 16; H 1280, 20 + 20, 16."""

    kind: Literal["mae"] = "mae"
    width: int = 768
    """Encoder width."""
    encoder_depth: int = 12
    """Encoder blocks."""
    heads: int = 12
    """Attention heads of the encoder; must divide the width."""
    decoder_width: int = 0
    """Decoder width, which is also z's; 0 is the encoder's."""
    decoder_depth: int = 12
    """Decoder blocks."""
    decoder_heads: int = 0
    """Attention heads of the decoder; 0: the encoder's."""
    buffer: int = 64
    """Number of copies of the condition before the tokens; the encoder computes on them while few tokens are known."""
    positions: Positions = "learned"
    """Positions of tokens in attention: learned embeddings (paper), or rotary, a rotation of queries and keys by row and column.
    The embedding of the position that z is for is learned in both cases."""
    attention_dropout: float = 0.1
    """Dropout on attention weights while training."""
    dropout: float = 0.1
    """Dropout after projections and inside the MLP while training."""
    mask_ratio_min: float = 0.7
    """Smallest masking ratio. Training draws it from a normal with mean 1 and std 0.25, truncated to this value and 1; 0..1."""
    mask_granularity: int = 1
    """Round the number of masked tokens to a multiple of this, so that torch.compile and CUDA graphs meet few shapes."""
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sizes = ("width", "encoder_depth", "heads", "decoder_depth", "buffer")
        check_sizes("backbone.", **{name: getattr(self, name) for name in sizes})
        decoder = self.decoder_width or self.width, self.decoder_heads or self.heads
        encoder = self.width, self.heads
        check_transformer(self.positions, self.attention_dropout, self.dropout, encoder=encoder, decoder=decoder)
        require(0 <= self.mask_ratio_min <= 1, f"mask_ratio_min is {self.mask_ratio_min}; allowed: 0 to 1")
        require(self.mask_granularity >= 1, f"mask_granularity is {self.mask_granularity}; allowed: 1 or more")

    @property
    def max_condition(self) -> int | None:
        return self.buffer

    def build(self, grid: Grid) -> MAE:
        """The backbone over a grid of (h, w) tokens."""
        return MAE(self, grid)


@dataclass
class MAEState:
    """A generation so far: embedded tokens, a mask, and its common row count as a host integer."""

    cond_BCE: Tensor
    x_BNE: Tensor
    known_BN: Tensor
    known: int = 0


class MAE(Backbone[MAEState]):
    """The encoder and decoder of the module's docstring, over a grid of (h, w) tokens."""

    def __init__(self, config: MAEConfig, grid: Grid) -> None:
        super().__init__()
        seq_len = grid[0] * grid[1]
        width, z_dim = config.width, config.decoder_width or config.width
        heads, rates = config.decoder_heads or config.heads, (config.attention_dropout, config.dropout)
        self.width, self.z_dim, self.buffer = width, z_dim, config.buffer
        self.learned = config.positions == "learned"
        rows = config.buffer + (seq_len if self.learned else 0)
        self._num_masked = masked_count_distribution(seq_len, config.mask_ratio_min, config.mask_granularity)
        self.encoder_positions = nn.Parameter(torch.empty(rows, width))
        self.input_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.encoder = nn.ModuleList(Block(width, config.heads, *rates) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.decoder_input = nn.Linear(width, z_dim)
        self.mask_token = nn.Parameter(torch.empty(1, z_dim))
        self.decoder_positions = nn.Parameter(torch.empty(rows, z_dim))
        self.encoder_rotary, self.decoder_rotary = Rotary(grid, width // config.heads), Rotary(grid, z_dim // heads)
        self.decoder = nn.ModuleList(Block(z_dim, heads, *rates) for _ in range(config.decoder_depth - 1))
        # Only masked rows are used behind the last block, so it computes only those.
        self.decoder.append(QueryBlock(z_dim, heads, *rates))
        self.decoder_norm = nn.LayerNorm(z_dim, eps=LN_EPS)
        self.z_positions = nn.Parameter(torch.empty(seq_len, z_dim))
        init_transformer(self)

    def encode(self, x_BKE: Tensor, known_BK: Tensor, cond_BCE: Tensor) -> Tensor:
        """Embedded known tokens at their positions -> [B, buffer + K, E], buffer first."""
        buffer = self.fill_buffer(cond_BCE) + self.encoder_positions[: self.buffer]
        tokens = x_BKE + batched_gather(self.encoder_positions[None, self.buffer :], known_BK) if self.learned else x_BKE
        h = self.input_norm(torch.cat((buffer, tokens), 1))
        rotation = self._rotation(self.encoder_rotary, known_BK)
        for block in self.encoder:
            h = block(h, rotation=rotation)
        return self.encoder_norm(h)

    def fill_buffer(self, cond_BCE: Tensor) -> Tensor:
        """Condition tokens [B, C, E] -> [B, buffer, E]; slot i holds token i mod C. In the paper C is 1."""
        # Repeating keeps shapes independent of C and every slot filled: with little known, the encoder computes on them.
        assert cond_BCE.shape[1] <= self.buffer, cond_BCE.shape
        copies = -(-self.buffer // cond_BCE.shape[1])
        return cond_BCE.repeat(1, copies, 1)[:, : self.buffer]

    def decode(self, encoded_BLE: Tensor, view: View, count: int) -> Tensor:
        """Encoder output -> z [B, count, Z] of the last ``count`` positions, 1..N, of the view's order; the masked come last."""
        index = view.order_BN
        h = torch.cat((self.decoder_input(encoded_BLE), self.mask_token.expand(*view.query_BQ.shape, -1)), 1)
        buffer = self.decoder_positions[: self.buffer].expand(len(h), -1, -1)
        if self.learned:
            h = h + torch.cat((buffer, batched_gather(self.decoder_positions[None, self.buffer :], index)), 1)
        else:
            h = torch.cat((h[:, : self.buffer] + buffer, h[:, self.buffer :]), 1)
        rotation = self._rotation(self.decoder_rotary, index)
        *blocks, last = self.decoder
        for block in blocks:
            h = block(h, rotation=rotation)
        h = last(h, count, rotation=rotation)
        return self.decoder_norm(h) + batched_gather(self.z_positions[None], index[:, -count:])

    def _rotation(self, rotary: Rotary, index_BL: Tensor) -> Rotation | None:
        """Rotary angles of the buffer, which has no position, and of the tokens at these positions behind it."""
        if self.learned:
            return None
        angles = rotary(torch.cat((no_position(index_BL, self.buffer), index_BL), 1))
        return Rotation(angles, angles)

    def forward(self, x_BNE: Tensor, cond_BCE: Tensor, view: View) -> Tensor:
        encoded = self.encode(batched_gather(x_BNE, view.known_BK), view.known_BK, cond_BCE)
        return self.decode(encoded, view, view.query_BQ.shape[1])

    def sample_num_masked(self) -> int:
        uniform = torch.rand((), dtype=torch.float64).item()
        counts, shares = zip(*self._num_masked.items(), strict=True)
        return counts[bisect(list(accumulate(shares))[:-1], uniform)]

    def num_masked_distribution(self) -> dict[int, float]:
        return self._num_masked

    def position_tables(self) -> dict[str, int]:
        before_blocks = {"encoder_positions": self.buffer, "decoder_positions": self.buffer}
        return {**(before_blocks if self.learned else {}), "z_positions": 0}

    def start(self, cond_BCE: Tensor, seq_len: int) -> MAEState:
        batch = len(cond_BCE)
        x = cond_BCE.new_zeros(batch, seq_len, self.width)
        return MAEState(cond_BCE, x, torch.zeros(batch, seq_len, dtype=torch.bool, device=x.device))

    def predict(self, state: MAEState, query_BQ: Tensor) -> Tensor:
        # Known positions first, each run ascending: a canonical order, so that rounding does not depend on the path taken.
        order = (~state.known_BN).to(torch.int8).argsort(dim=1, stable=True)
        z = self(state.x_BNE, state.cond_BCE, View(order, state.known))
        return batched_gather(z, order.argsort(dim=1).gather(1, query_BQ) - state.known)

    def commit(self, state: MAEState, index_BK: Tensor, x_BKE: Tensor) -> None:
        batched_scatter_(state.x_BNE, index_BK, x_BKE)
        state.known_BN.scatter_(1, index_BK, True)
        state.known += index_BK.shape[1]
