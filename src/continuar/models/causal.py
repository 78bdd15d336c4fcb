"""The causal decoder of autoregressive models, in any order (paper, Section 3.4 and Table 1, first two rows).

The slot that predicts position o(i) holds three things: token o(i-1), its position, and the position o(i) it is to predict. The
first slot holds the condition instead of a token; of a condition of several tokens it holds the last, and the others are slots
before it. Raster order is the special case where both positions follow from the slot. With rotary positions a slot's query is
rotated by the position to predict and its key by the token's own, so that scores depend on the distance between the two.

1. Slots -> blocks with triangular attention -> LayerNorm -> z.
2. Generation keeps keys and values in buffers of fixed size: `predict` writes the query's slot, `commit` makes it permanent.
3. Tokens known from the start are prefilled in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from continuar.errors import check_sizes
from continuar.models.base import Backbone, BackboneTraits, check_transformer
from continuar.models.positions import NO_POSITION, Grid, Positions, Rotary, Rotation, no_position
from continuar.models.transformer import LN_EPS, Block, KVCache, init_transformer
from continuar.orders import View
from continuar.tensors import batched_gather


@dataclass(frozen=True)
class CausalConfig(BackboneTraits):
    """Causal decoder with kv-cache. Sizes as of the paper's pairs: B 768, 24 blocks, 12 heads; L 1024, 32, 16; H 1280, 40, 16."""

    kind: Literal["causal"] = "causal"
    width: int = 768
    """Width, which is also z's."""
    depth: int = 24
    """Transformer blocks; the pairs of the paper have as many as encoder and decoder of MAR together."""
    heads: int = 12
    """Attention heads; must divide the width."""
    positions: Positions = "learned"
    """Positions of tokens in attention: learned embeddings, or rotary, a rotation of queries and keys by row and column. The
    embedding of the next position is learned in both cases."""
    attention_dropout: float = 0.1
    """Dropout on attention weights while training."""
    dropout: float = 0.1
    """Dropout after projections and inside the MLP while training."""
    max_group: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        check_sizes("backbone.", width=self.width, depth=self.depth, heads=self.heads)
        check_transformer(self.positions, self.attention_dropout, self.dropout, backbone=(self.width, self.heads))

    def build(self, grid: Grid) -> Causal:
        """The backbone over a grid of (h, w) tokens."""
        return Causal(self, grid)


@dataclass
class CausalState:
    """A generation so far.

    Attributes:
        caches: keys and values of each block.
        waiting_BTE: slots that are not in the caches yet because they lack the position to predict: first the condition, then the
            last token.
        waiting_at_BT: positions of their tokens.
        filled: number of slots in the caches that stay.
        predicted: True if the slots behind ``filled`` hold the last prediction.
    """

    caches: list[KVCache]
    waiting_BTE: Tensor
    waiting_at_BT: Tensor
    filled: int = 0
    predicted: bool = False


class Causal(Backbone[CausalState]):
    """The causal decoder over a grid of (h, w) tokens."""

    def __init__(self, config: CausalConfig, grid: Grid) -> None:
        super().__init__()
        self.width = self.z_dim = config.width
        self.heads, self.seq_len = config.heads, grid[0] * grid[1]
        self.rotary = Rotary(grid, config.width // config.heads) if config.positions == "rotary" else None
        if self.rotary is None:
            self.positions = nn.Parameter(torch.empty(self.seq_len, config.width))
        self.targets = nn.Parameter(torch.empty(self.seq_len, config.width))
        rates = config.attention_dropout, config.dropout
        self.blocks = nn.ModuleList(Block(config.width, config.heads, *rates) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LN_EPS)
        init_transformer(self)

    def forward(self, x_BNE: Tensor, cond_BCE: Tensor, view: View) -> Tensor:
        past, first = view.order_BN[:, :-1], cond_BCE.shape[1] - 1
        h = torch.cat((cond_BCE, self._placed(batched_gather(x_BNE, past), past)), 1)
        h = torch.cat((h[:, :first], h[:, first:] + batched_gather(self.targets[None], view.order_BN)), 1)
        rotation = self._rotation(torch.cat((no_position(past, first + 1), past), 1), view.order_BN)
        for block in self.blocks:
            h = block(h, causal=True, rotation=rotation)
        return self.norm(h[:, first + view.known :])

    def _placed(self, x_BKE: Tensor, index_BK: Tensor) -> Tensor:
        """Embedded tokens plus their learned positions; rotary positions act in attention instead."""
        return x_BKE + batched_gather(self.positions[None], index_BK) if self.rotary is None else x_BKE

    def _rotation(self, at_BT: Tensor, targets_BK: Tensor) -> Rotation | None:
        """Rotary angles of T slots with tokens at these positions, the last K of which predict these targets."""
        if self.rotary is None:
            return None
        before = no_position(targets_BK, at_BT.shape[1] - targets_BK.shape[1])
        return Rotation(query=self.rotary(torch.cat((before, targets_BK), 1)), key=self.rotary(at_BT))

    def sample_num_masked(self) -> int:
        return self.seq_len

    def num_masked_distribution(self) -> dict[int, float]:
        return {self.seq_len: 1.0}

    def position_tables(self) -> dict[str, int]:
        return {"positions": 0, "targets": 0} if self.rotary is None else {"targets": 0}

    def start(self, cond_BCE: Tensor, seq_len: int) -> CausalState:
        batch, count, width = cond_BCE.shape
        shape = batch, self.heads, count + seq_len, width // self.heads
        caches = [KVCache(cond_BCE.new_zeros(shape), cond_BCE.new_zeros(shape)) for _ in self.blocks]
        return CausalState(caches, cond_BCE, torch.full((batch, count), NO_POSITION, device=cond_BCE.device))

    def predict(self, state: CausalState, query_BQ: Tensor) -> Tensor:
        assert query_BQ.shape[1] == 1, f"{query_BQ.shape[1]} positions queried; a causal backbone predicts one"
        state.predicted = True
        return self.norm(self._run(state, state.waiting_BTE, state.waiting_at_BT, query_BQ)[:, -1:])

    def commit(self, state: CausalState, index_BK: Tensor, x_BKE: Tensor) -> None:
        tokens = self._placed(x_BKE, index_BK)
        if not state.predicted:
            # Tokens that were given, not predicted: prefill all slots but the last, which waits for its position to predict.
            slots, at = torch.cat((state.waiting_BTE, tokens[:, :-1]), 1), torch.cat((state.waiting_at_BT, index_BK[:, :-1]), 1)
            self._run(state, slots, at, index_BK)
        state.filled += state.waiting_BTE.shape[1] + index_BK.shape[1] - 1
        state.waiting_BTE, state.waiting_at_BT, state.predicted = tokens[:, -1:], index_BK[:, -1:], False

    def _run(self, state: CausalState, slots_BTE: Tensor, at_BT: Tensor, targets_BK: Tensor) -> Tensor:
        """Runs slots with tokens at these positions through the blocks, behind the cached slots; the last K predict the targets."""
        first = slots_BTE.shape[1] - targets_BK.shape[1]
        h = torch.cat((slots_BTE[:, :first], slots_BTE[:, first:] + batched_gather(self.targets[None], targets_BK)), 1)
        rotation = self._rotation(at_BT, targets_BK)
        for block, cache in zip(self.blocks, state.caches, strict=True):
            h = block(h, cache=cache, at=state.filled, rotation=rotation)
        return h
