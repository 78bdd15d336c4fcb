"""ViT pre-norm transformer blocks (Dosovitskiy et al. 2021), shared by every backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from continuar.errors import require
from continuar.models.fused_ops import Dropout, draw_seed, hashed_gelu_dropout
from continuar.models.positions import Rotation, apply_rotary

LN_EPS = 1e-6


def check_dropout(attention_dropout: float, dropout: float) -> None:
    """Refuses rates outside [0, 1)."""
    for name, value in (("attention_dropout", attention_dropout), ("dropout", dropout)):
        require(0 <= value < 1, f"backbone.{name} is {value}; allowed: 0 up to below 1")


@dataclass
class KVCache:
    """Keys and values of one block, [B, heads, L, width/heads] each, written in place: no memory is allocated while generating."""

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
        self.dropout = Dropout(dropout)

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
        """Attention within x, triangular if ``causal``; with a cache, also to its first ``at`` slots, behind which x is written.

        A cache holds keys that are turned already. For the seed see `Block`.

        Args:
            last: attention of the last so many rows to all of x, [B, last, E], neither ``causal`` nor with a cache; a rotation has
                as many queries.
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
        return self.dropout(self.projection(y.transpose(1, 2).flatten(2)), seed_2)

    def _split(self, x_BLF: Tensor, parts: int) -> Tensor:
        """[B, L, parts E] -> [parts, B, heads, L, E/heads]."""
        return x_BLF.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MLP(nn.Sequential):
    """Linear, GELU, dropout, Linear, dropout; ratio 4."""

    def __init__(self, width: int, dropout: float) -> None:
        wide = 4 * width
        super().__init__(nn.Linear(width, wide), nn.GELU(), Dropout(dropout), nn.Linear(wide, width), Dropout(dropout))
        self.p = dropout

    def forward(self, input: Tensor, seed_2: Tensor | None = None) -> Tensor:
        """For the seed see `Block`: elements are numbered behind those of the attention's dropout, as many as ``input`` has."""
        if seed_2 is None:
            return super().forward(input)
        up, _, _, down, outer = self
        count = input.numel()
        return outer(down(hashed_gelu_dropout(up(input), self.p, seed_2, 2 * count)), seed_2, count)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); GELU MLP of ratio 4.

    Compiled training draws one seed for its three dropouts (`continuar.models.fused_ops`); torch drops attention's weights.

    Attributes:
        recomputed: where gradients are wanted, keep the block's input alone and compute it again in backward, with the same dropout
            (Chen et al. 2016, arXiv 1604.06174).
    """

    recomputed = False

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attention = Attention(width, heads, attention_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = MLP(width, dropout)

    def forward(
        self, x_BLE: Tensor, *, causal: bool = False, cache: KVCache | None = None, at: int = 0, rotation: Rotation | None = None
    ) -> Tensor:
        """See `Attention.forward`."""
        return self._run(x_BLE, causal=causal, cache=cache, at=at, rotation=rotation)

    def _run(self, x_BLE: Tensor, **given: Any) -> Tensor:
        """`_forward`, computed again in backward if that is wanted; keywords are those of `Attention.forward`."""
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BLE, use_reentrant=False, **given)
        return self._forward(x_BLE, **given)

    def _forward(self, x_BLE: Tensor, *, last: int | None = None, **given: Any) -> Tensor:
        seed = self._seed(x_BLE)
        rows_BLE = x_BLE if last is None else x_BLE[:, -last:]
        rows_BLE = rows_BLE + self.attention(self.norm1(x_BLE), seed, last=last, **given)
        return rows_BLE + self.mlp(self.norm2(rows_BLE), seed)

    def _seed(self, x_BLE: Tensor) -> Tensor | None:
        """Of the dropouts, where hashes decide: in compiled training, but for blocks that are recomputed anyway."""
        hashed = is_compiling() and self.training and self.attention.dropout.p > 0 and not self.recomputed
        numbered = 6 * x_BLE.numel() < 2**31  # one width of attention, four and one of the MLP
        return draw_seed(x_BLE.device) if hashed and numbered else None


class QueryBlock(Block):
    """`Block` at a stack's end, where only the last rows are asked for: they attend to all, and of the others keys and values are
    all that is computed. A class of its own, because torch.compile counts the shapes of a forward."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it stands where no other block does)
        self, x_BLE: Tensor, last: int, *, rotation: Rotation | None = None
    ) -> Tensor:
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
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
        for parameter in child.parameters(recurse=False):
            if not isinstance(child, nn.Linear | nn.LayerNorm | nn.Embedding):
                nn.init.normal_(parameter, std=0.02)
