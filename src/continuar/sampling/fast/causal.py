"""The causal backbone in generation: one decode step of fixed shapes, equal to `Causal.predict`.

1. Tokens known beforehand, and all but the last of several condition tokens, are prefilled by the backbone itself.
2. A step writes its slot's keys and values at its index in the cache and attends to all slots; a mask hides the slots behind it.
   The index is a number on the device, so one captured graph serves every token.

G is 2 with guidance and 1 without, B images, N tokens, E width, Z condition width, C condition tokens, L slots: C + N, rounded up
to a multiple of 8.
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
    """Static caches and the decode step for one batch shape.

    Args:
        causal: the backbone, with the engine's weights.
        images: B.
        copies: G.
        condition_tokens: C.
        kernels: the fused operations or the plain ones.
    """

    def __init__(self, causal: Causal, images: int, copies: int, condition_tokens: int, kernels: Kernels) -> None:
        self.causal, self.copies, self.kernels = causal, copies, kernels
        parameter, width, batch = causal.positions, causal.width, copies * images
        self.slots = -(-(condition_tokens + causal.seq_len) // 8) * 8
        shape = batch, causal.heads, self.slots, width // causal.heads
        like = {"dtype": parameter.dtype, "device": parameter.device}
        # Zeros, not `empty`: attention multiplies a masked slot by 0, which gives NaN if the memory holds NaN or infinity.
        self.caches = [KVCache(torch.zeros(shape, **like), torch.zeros(shape, **like)) for _ in causal.blocks]
        self.slot = torch.empty(batch, 1, width, **like)
        self.target = torch.empty(batch, 1, dtype=torch.int64, device=parameter.device)
        self.at = torch.empty(1, dtype=torch.int64, device=parameter.device)
        self.places = torch.arange(self.slots, device=parameter.device)

    def prepare(self, cond: Tensor, order_BN: Tensor) -> None:
        """Starts a generation with conditions [G B, C, E] and the order of its positions."""
        self.order = order_BN
        cond = cond.to(self.slot.dtype)
        self.state = CausalState(self.caches, cond, order_BN.new_full(cond.shape[:2], NO_POSITION))
        if cond.shape[1] > 1:
            # The last slot waits for the position that it will predict.
            h = cond[:, :-1]
            for block, cache in zip(self.causal.blocks, self.caches, strict=True):
                h = block(h, cache=cache, at=0)
            self.state.filled, self.state.waiting_BTE = cond.shape[1] - 1, cond[:, -1:]
            self.state.waiting_at_BT = self.state.waiting_at_BT[:, -1:]

    def commit(self, first: int, x_BKE: Tensor) -> None:
        """Writes embedded tokens of the order's places ``first .. first + K``."""
        index = self.order[:, first : first + x_BKE.shape[1]].repeat(self.copies, 1)
        self.causal.commit(self.state, index, x_BKE.to(self.slot.dtype).repeat(self.copies, 1, 1))

    def set_step(self, known: int) -> None:
        """Writes the next step's slot, target and index to where `predict` reads them."""
        self.slot.copy_(self.state.waiting_BTE)
        self.target.copy_(self.order[:, known : known + 1].repeat(self.copies, 1))
        self.at.fill_(self.state.filled)
        self.state.predicted = True

    def key(self, known: int, size: int) -> tuple[int, ...]:
        """The key of a captured `predict`."""
        return ()

    def predict(self, known: int, size: int) -> Tensor:
        """z [G B, 1, Z] float32 of the position given to `set_step`."""
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
