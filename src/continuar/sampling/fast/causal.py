"""The causal backbone in generation: one decode step of fixed shapes, whose place is a number on the device. Equal to
`Causal.predict`, and the same for every token: one capture serves all.

1. Tokens known from the start, and several condition tokens, are prefilled by the backbone itself into the same caches.
2. A step writes its slot's keys and values at its place and attends to all slots of the cache, those behind it masked.

G is 2 with guidance and 1 without, B images, N tokens, E width, L slots: N and the condition tokens, rounded up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.models.causal import Causal, CausalState
from continuar.models.positions import NO_POSITION
from continuar.models.transformer import Block, KVCache
from continuar.sampling.fast.kernels import Kernels
from continuar.tensors import batched_gather


class FastCausal:
    """See the module's docstring.

    Args:
        causal: with the weights to compute with. images: B. copies: G.
        kernels: fused operations or their plain twins.
    """

    def __init__(self, causal: Causal, images: int, copies: int, condition_tokens: int, kernels: Kernels) -> None:
        self.causal, self.copies, self.kernels = causal, copies, kernels
        parameter, width, batch = causal.positions, causal.width, copies * images
        self.slots = -(-(condition_tokens + causal.count) // 8) * 8
        shape = batch, causal.heads, self.slots, width // causal.heads
        like = {"dtype": parameter.dtype, "device": parameter.device}
        # Zeros, for a slot not yet written is masked but still multiplied by its weight of zero.
        self.caches = [KVCache(torch.zeros(shape, **like), torch.zeros(shape, **like)) for _ in causal.blocks]
        self.slot = torch.empty(batch, 1, width, **like)
        self.target = torch.empty(batch, 1, dtype=torch.int64, device=parameter.device)
        self.at = torch.empty(1, dtype=torch.int64, device=parameter.device)
        self.places = torch.arange(self.slots, device=parameter.device)

    def prepare(self, cond: Tensor, order_BN: Tensor) -> None:
        """A new generation: conditions [G B, C, E] and the order of its positions."""
        self.order = order_BN
        cond = cond.to(self.slot.dtype)
        self.state = CausalState(self.caches, cond, order_BN.new_full(cond.shape[:2], NO_POSITION))
        if cond.shape[1] > 1:
            # All but the last slot, which waits for a position to predict.
            h = cond[:, :-1]
            for block, cache in zip(self.causal.blocks, self.caches, strict=True):
                h = block(h, cache=cache, at=0)
            self.state.filled, self.state.waiting_BTE = cond.shape[1] - 1, cond[:, -1:]
            self.state.waiting_at_BT = self.state.waiting_at_BT[:, -1:]

    def commit(self, first: int, x_BKE: Tensor) -> None:
        """Embedded tokens of places ``first`` on of the order."""
        index = self.order[:, first : first + x_BKE.shape[1]].repeat(self.copies, 1)
        self.causal.commit(self.state, index, x_BKE.to(self.slot.dtype).repeat(self.copies, 1, 1))

    def aim(self, known: int) -> None:
        """Puts the next step's slot, target and place where `predict` reads them."""
        self.slot.copy_(self.state.waiting_BTE)
        self.target.copy_(self.order[:, known : known + 1].repeat(self.copies, 1))
        self.at.fill_(self.state.filled)
        self.state.predicted = True

    def key(self, known: int, size: int) -> tuple[int, ...]:
        """What a captured `predict` depends on."""
        return ()

    def predict(self, known: int, size: int) -> Tensor:
        """z [G B, 1, Z] float32 of what `aim` aimed at."""
        causal, batch = self.causal, len(self.slot)
        h, y, add_norm = self.slot + batched_gather(causal.targets[None], self.target), None, self.kernels.add_norm
        seen, blocks = self.places <= self.at, cast(Iterable[Block], causal.blocks)
        for block, cache in zip(blocks, self.caches, strict=True):
            attention = block.attention
            h, n = add_norm(h, y, block.norm1)
            q, k, v = attention.qkv(n).view(batch, 1, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
            cache.k.index_copy_(2, self.at, k)
            cache.v.index_copy_(2, self.at, v)
            y = F.scaled_dot_product_attention(q, cache.k, cache.v, attn_mask=seen[None])
            h, n = add_norm(h, attention.projection(y.transpose(1, 2).flatten(-2)), block.norm2)
            y = self.kernels.mlp(block.mlp, n)
        return add_norm(h, y, causal.norm)[1].float()
