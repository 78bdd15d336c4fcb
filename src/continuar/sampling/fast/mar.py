"""MAR's encoder and decoder in generation, on buffers in the order of generation. Equal to `MAE.predict`.

1. Attention ignores the order of rows, so rows stand in the order in which they become known: the known ones are one slice, the
   ones predicted now are the next, and nothing is gathered.
2. The encoder's input, LayerNorm(token + position), does not depend on other rows. A row is computed once, when its token is
   committed; the condition's rows when a generation begins. Mask tokens with their positions are computed once, too.
3. The decoder's last block computes keys and values of all rows, and everything else only for the rows predicted now.

Shapes depend only on the numbers of known and predicted tokens, and there is no host synchronisation, so a step can be captured.

G is 2 with guidance and 1 without, B images, N tokens, E encoder width, Z decoder width, C condition tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.models.mar import MAE
from continuar.models.transformer import Block
from continuar.sampling.fast.kernels import Kernels
from continuar.sampling.fast.weights import PackedLinear, sliced_linear
from continuar.tensors import batched_gather


class FastMAE:
    """Static buffers and the prediction step for one batch shape.

    Args:
        mae: the backbone, with the engine's weights.
        images: B.
        copies: G.
        condition_tokens: C; the buffers do not depend on it.
        kernels: the fused operations or the plain ones.
    """

    def __init__(self, mae: MAE, images: int, copies: int, condition_tokens: int, kernels: Kernels) -> None:
        self.mae, self.images, self.copies, self.kernels = mae, images, copies, kernels
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

    def prepare(self, cond: Tensor, order_BN: Tensor) -> None:
        """Starts a generation with conditions [G B, C, E] and the order of its positions."""
        mae = self.mae
        self.inputs[:, : mae.buffer] = mae.input_norm(
            mae.fill_buffer(cond.to(self.inputs.dtype)) + mae.encoder_positions[: mae.buffer]
        )
        self.token_positions.copy_(batched_gather(mae.encoder_positions[None, mae.buffer :], order_BN))
        self.decoder_positions[:, : mae.buffer] = mae.decoder_positions[: mae.buffer]
        self.decoder_positions[:, mae.buffer :] = batched_gather(mae.decoder_positions[None, mae.buffer :], order_BN)
        self.masked.copy_(mae.mask_token + self.decoder_positions[:, mae.buffer :])
        self.z_positions.copy_(batched_gather(mae.z_positions[None], order_BN))

    def commit(self, first: int, x_BKE: Tensor) -> None:
        """Writes embedded tokens of the order's places ``first .. first + K``."""
        end = first + x_BKE.shape[1]
        places = slice(self.mae.buffer + first, self.mae.buffer + end)
        rows = self.mae.input_norm(x_BKE.to(self.inputs.dtype) + self.token_positions[:, first:end])
        self.inputs.unflatten(0, (self.copies, self.images))[:, :, places] = rows

    def set_step(self, known: int) -> None:
        """Does nothing: the step is part of the shapes."""

    def key(self, known: int, size: int) -> tuple[int, ...]:
        """The key of a captured `predict`."""
        return known, size

    def predict(self, known: int, size: int) -> Tensor:
        """z [G B, size, Z] float32 of the ``size`` places after the ``known`` ones."""
        mae, given, halves = self.mae, self.mae.buffer + known, (self.copies, self.images)
        _, n = self.kernels.add_norm(*self._blocks(mae.encoder, self.inputs[:, :given]), mae.encoder_norm)
        h = mae.decoder_input(n).unflatten(0, halves) + self.decoder_positions[:, :given]
        masked = self.masked[:, known:].expand(self.copies, -1, -1, -1)
        h, y = self._blocks(mae.decoder[:-1], torch.cat((h, masked), 2).flatten(0, 1))
        _, n = self.kernels.add_norm(*self.last(h, y, given, given + size, self.kernels), mae.decoder_norm)
        return (n.unflatten(0, halves).float() + self.z_positions[:, known : known + size].float()).flatten(0, 1)

    def _blocks(self, blocks: nn.Module, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs blocks and returns (h, y), of which the caller must add y to h."""
        # Each sum is left to the LayerNorm after it, so that one kernel does both.
        y = None
        for block in cast(Iterable[Block], blocks):
            h, n = self.kernels.add_norm(h, y, block.norm1)
            h, n = self.kernels.add_norm(h, block.attention(n), block.norm2)
            y = self.kernels.mlp(block.mlp, n)
        return h, y


class LastBlock:
    """A `Block` in which only the rows ``first .. end`` attend, to all rows."""

    def __init__(self, block: Block) -> None:
        qkv, width = block.attention.qkv, block.norm1.normalized_shape[0]
        parts: list[nn.Module] = [sliced_linear(qkv, slice(0, width)), sliced_linear(qkv, slice(width, None))]
        if isinstance(qkv, PackedLinear):
            # A slice of a packed weight is not packed: oneDNN needs a layout of its own for each part.
            parts = [PackedLinear(part) for part in parts if isinstance(part, nn.Linear)]
        self.block, (self.q, self.kv) = block, parts

    def __call__(self, h_BLE: Tensor, y_BLE: Tensor | None, first: int, end: int, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """The block applied to h + y: (h, y) as in `FastMAE._blocks`, [B, end - first, E]."""
        block, attention = self.block, self.block.attention
        h, n = kernels.add_norm(h_BLE, y_BLE, block.norm1)
        heads = (attention.heads, -1)
        q = self.q(n[:, first:end]).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(n).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        h, n = kernels.add_norm(h[:, first:end], attention.projection(y.transpose(1, 2).flatten(-2)), block.norm2)
        return h, kernels.mlp(block.mlp, n)
