"""ViT pre-norm transformer blocks (Dosovitskiy et al. 2021), shared by every backbone: attention, kv-cache, MLP, block.

What makes them fast under torch.compile is in `fused_ops`, rotary positions in `positions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from continuar.models.fused_ops import block_seed, hashed_dropout, hashed_mlp
from continuar.models.positions import Rotation, apply_rotary

LN_EPS = 1e-6


@dataclass
class KVCache:
    """Keys and values of one block, [B, heads, L, width/heads] each, written in place: generation allocates no memory."""

    k: Tensor
    v: Tensor

    def write(self, k_BHTD: Tensor, v_BHTD: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Writes T slots from slot ``at`` on; returns keys and values of all slots up to the last written."""
        end = at + k_BHTD.shape[2]
        self.k[:, :, at:end] = k_BHTD
        self.v[:, :, at:end] = v_BHTD
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection; rows of its weight are q, then k, then v."""

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLE: Tensor,
        seed_2: Tensor | None = None,
        *,
        causal: bool = False,
        cache: KVCache | None = None,
        at: int = 0,
        rotation: Rotation | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Attention within x, [B, L, E] -> [B, L, E].

        Args:
            seed_2: seed of a hashed dropout, in compiled training.
            causal: each row attends to itself and the rows before it.
            cache: x also attends to the first ``at`` slots, and its own keys and values are written behind them, causally. The
                cache holds keys that are already rotated.
            rotation: rotary positions of queries and keys.
            last: compute only the last so many rows, which attend to all of x; [B, last, E]. Neither ``causal`` nor with a cache.
        """
        length, width = x_BLE.shape[1:]
        if last is None:
            q, k, v = self._split(self.qkv(x_BLE), 3)
        else:
            assert not causal
            assert cache is None
            weights, biases = (parameter.split((width, 2 * width)) for parameter in (self.qkv.weight, self.qkv.bias))
            (q,) = self._split(F.linear(x_BLE[:, -last:], weights[0], biases[0]), 1)
            k, v = self._split(F.linear(x_BLE, weights[1], biases[1]), 2)
        if rotation is not None:
            q, k = apply_rotary(q, rotation.query), apply_rotary(k, rotation.key)
        mask = None
        if cache is not None:
            k, v = cache.write(k, v, at)
            # A single slot sees all that was written; several must not see one another's future.
            mask = torch.ones(length, at + length, dtype=torch.bool, device=x_BLE.device).tril(at) if length > 1 else None
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        y = self.projection(y.transpose(1, 2).flatten(2))
        return self.dropout(y) if seed_2 is None else hashed_dropout(y, self.dropout.p, seed_2, 0)

    def _split(self, x_BLF: Tensor, parts: int) -> Tensor:
        """[B, L, parts E] -> [parts, B, heads, L, E/heads]."""
        return x_BLF.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MLP(nn.Sequential):
    """Linear, GELU, dropout, Linear, dropout; ratio 4."""

    def __init__(self, width: int, dropout: float) -> None:
        wide = 4 * width
        super().__init__(nn.Linear(width, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, width), nn.Dropout(dropout))
        self.p = dropout

    def forward(self, input: Tensor, seed_2: Tensor | None = None) -> Tensor:
        return super().forward(input) if seed_2 is None else hashed_mlp(self, self.p, input, seed_2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        activation_checkpointing: keep only the block's input for backward and compute the rest again, with the same dropout (Chen
            et al. 2016, arXiv 1604.06174).
    """

    activation_checkpointing = False

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attention = Attention(width, heads, attention_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = MLP(width, dropout)

    def forward(self, x_BLE: Tensor, **attention: Any) -> Tensor:
        """[B, L, E] -> [B, L, E]; keywords are those of `Attention.forward`, without ``last``."""
        return self._run(x_BLE, **attention)

    def _run(self, x_BLE: Tensor, **attention: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._compute, x_BLE, use_reentrant=False, **attention)
        return self._compute(x_BLE, **attention)

    def _compute(self, x_BLE: Tensor, *, last: int | None = None, **attention: Any) -> Tensor:
        # Compiled training hashes its dropout masks. Checkpointed blocks keep torch's dropout, whose state is restored for
        # backward.
        hashed = is_compiling() and self.training and not self.activation_checkpointing
        seed = block_seed(x_BLE, self.mlp.p) if hashed else None
        rows_BLE = x_BLE if last is None else x_BLE[:, -last:]
        rows_BLE = rows_BLE + self.attention(self.norm1(x_BLE), seed, last=last, **attention)
        return rows_BLE + self.mlp(self.norm2(rows_BLE), seed)


class QueryBlock(Block):
    """`Block` at the end of a stack that computes only the last rows, those whose output is used. They attend to all rows."""

    # A forward of its own, because torch.compile keeps a limited number of shapes per forward.
    def forward(self, x_BLE: Tensor, last: int, *, rotation: Rotation | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, L, E] -> the last rows [B, last, E]."""
        if rotation is not None:
            rotation = rotation._replace(query=rotation.query[..., -last:, :])
        return self._run(x_BLE, last=last, rotation=rotation)


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform Linears (qkv as one matrix) with zero biases, and N(0, 0.02) for every bare parameter and embedding."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif not isinstance(child, nn.LayerNorm):
            for parameter in child.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
