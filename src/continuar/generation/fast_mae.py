"""The bidirectional backbone in generation, on buffers in the order of generation. Equal to `MAE.predict`.

G is 2 with guidance and 1 without, B images, N tokens, E encoder width, Z decoder width.

1. Attention has no order of its own, so rows stand in the order in which they become known: what is known is a slice, what is
   predicted now is the slice behind it, and nothing is gathered.
2. What enters the encoder is LayerNorm(token + position), row by row: a row is computed once, when its token is committed, and the
   buffer's rows when a generation begins. Mask tokens with their positions are made once too.
3. In the decoder's last block only rows predicted now are asked for: keys and values of all rows, the rest of those alone.

Shapes depend on (known, predicted now) alone, and there is no host synchronisation: such a step can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.backbones.blocks import Block
from continuar.backbones.mae import MAE
from continuar.generation.packed import PackedLinear
from continuar.generation.weights import sliced_linear
from continuar.rows import take


class FastMAE:
    """See the module's docstring.

    Args:
        mae: with the weights to compute with. images: B. copies: G.
    """

    def __init__(self, mae: MAE, images: int, copies: int, condition_tokens: int) -> None:
        self.mae, self.images, self.copies = mae, images, copies
        parameter = mae.encoder_positions
        positions = len(mae.z_positions)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)

        self.inputs = empty(copies * images, mae.buffer + positions, mae.width)
        self.token_positions = empty(images, positions, mae.width)
        self.decoder_positions = empty(images, mae.buffer + positions, mae.z_dim)
        self.masked = empty(images, positions, mae.z_dim)
        self.z_positions = empty(images, positions, mae.z_dim)
        last = mae.decoder[-1]
        assert isinstance(last, Block)
        self.last = LastBlock(last)

    def begin(self, cond: Tensor, order_BN: Tensor) -> None:
        """A new generation: conditions [G B, C, E] and the order of its positions."""
        mae = self.mae
        self.inputs[:, : mae.buffer] = mae.input_norm(mae._fill(cond.to(self.inputs.dtype)) + mae.encoder_positions[: mae.buffer])
        self.token_positions.copy_(take(mae.encoder_positions[None, mae.buffer :], order_BN))
        self.decoder_positions[:, : mae.buffer] = mae.decoder_positions[: mae.buffer]
        self.decoder_positions[:, mae.buffer :] = take(mae.decoder_positions[None, mae.buffer :], order_BN)
        self.masked.copy_(mae.mask_token + self.decoder_positions[:, mae.buffer :])
        self.z_positions.copy_(take(mae.z_positions[None], order_BN))

    def commit(self, first: int, x_BKE: Tensor) -> None:
        """Embedded tokens of places ``first`` on of the order."""
        end = first + x_BKE.shape[1]
        places = slice(self.mae.buffer + first, self.mae.buffer + end)
        rows = self.mae.input_norm(x_BKE.to(self.inputs.dtype) + self.token_positions[:, first:end])
        self.inputs.unflatten(0, (self.copies, self.images))[:, :, places] = rows

    def aim(self, known: int) -> None:
        """Nothing to prepare: places are part of the shapes."""

    def key(self, known: int, size: int) -> tuple[int, ...]:
        """What a captured `predict` depends on."""
        return known, size

    def predict(self, known: int, size: int) -> Tensor:
        """z [G B, size, Z] float32 of the ``size`` places behind the ``known`` ones."""
        mae, given = self.mae, self.mae.buffer + known
        h = self.inputs[:, :given]
        for block in mae.encoder:
            h = block(h)
        h = mae.decoder_input(mae.encoder_norm(h)).unflatten(0, (self.copies, self.images)) + self.decoder_positions[:, :given]
        masked = self.masked[:, known:].expand(self.copies, -1, -1, -1)
        h = torch.cat((h, masked), 2).flatten(0, 1)
        for block in mae.decoder[:-1]:
            h = block(h)
        h = mae.decoder_norm(self.last(h, given, given + size)).unflatten(0, (self.copies, self.images))
        return (h.float() + self.z_positions[:, known : known + size].float()).flatten(0, 1)


class LastBlock:
    """`Block` for some rows: those from ``first`` to below ``end`` attend to all."""

    def __init__(self, block: Block) -> None:
        qkv, width = block.attention.qkv, block.norm1.normalized_shape[0]
        parts: list[nn.Module] = [sliced_linear(qkv, slice(0, width)), sliced_linear(qkv, slice(width, None))]
        if isinstance(qkv, PackedLinear):
            parts = [PackedLinear(part) for part in parts if isinstance(part, nn.Linear)]
        self.block, (self.q, self.kv) = block, parts

    def __call__(self, x_BLE: Tensor, first: int, end: int) -> Tensor:
        block, attention = self.block, self.block.attention
        n, x = block.norm1(x_BLE), x_BLE[:, first:end]
        heads = (attention.heads, -1)
        q = self.q(n[:, first:end]).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(n).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.projection(y.transpose(1, 2).flatten(-2))
        return x + block.mlp(block.norm2(x))
