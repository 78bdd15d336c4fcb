"""Random numbers that belong to an image, not to a batch.

Every draw is a pure function of (image seed, position, purpose, step), by Philox4x32-10 (Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3", SC 2011) written in integer tensor operations. The same seed therefore gives the same image at any batch size,
in any batch order, on any rank and any device.

1. The counter is (position, step + 2^16 round, purpose, block), the key the seed's low and high 32 bits. A block is four words. The
   round counts how often a token was drawn, for orders that draw tokens they may not keep.
2. Words become uniforms in (0, 1], and pairs of uniforms two normals (Box-Muller).
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """The use of a draw. Values are part of the format: changing one changes every seeded image."""

    ORDER = 0  # the permutation of positions
    INITIAL = 1  # x_T of a token
    STEP = 2  # the noise added in one diffusion step
    TOKEN = 3  # a token's other draws: a mixture component, a category
    ROUTE = 4  # which positions come next, where that is decided while generating


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds. Words are int64 tensors holding 0..2^32-1, broadcast together; returns four of them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        if i:
            k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
        # A product of two 32-bit words wraps int64; its low 64 bits are exact, so masking both halves undoes the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        hi0, lo0 = (p0 >> 32) & _MASK, p0 & _MASK
        hi1, lo1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word as float32 in (0, 1]: the half offset excludes 0, which keeps Box-Muller's logarithm finite."""
    return (word.to(torch.float32) + 0.5) * 2.0**-32


class RowNoise(Protocol):
    """The noise of M rows (tokens): what heads and samplers draw from."""

    def normal(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        """Standard normal [M, dim], float32."""
        ...

    def uniform(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        """Uniform in (0, 1] [M, dim], float32."""
        ...


class KeyedNoise:
    """Noise of M rows, each keyed by its image's seed and its position.

    Args:
        seeds: [M] int64, any value; two's complement for negative ones.
        positions: [M] int64, 0..2^32-1.
        round: 0..2^16-1, how often these tokens were drawn before.
    """

    def __init__(self, seeds: Tensor, positions: Tensor, round: int = 0) -> None:
        self.seeds, self.positions, self.round = seeds, positions, round

    def _words(self, purpose: Purpose, step: int | Tensor, blocks: int) -> tuple[Tensor, ...]:
        """Four tensors of words [M, blocks]; [S, M, blocks] for steps [S, 1, 1]."""
        block = torch.arange(blocks, device=self.positions.device)
        like = torch.zeros_like(block)
        counter = self.positions.unsqueeze(-1), like + ((self.round << 16) + step), like + int(purpose), block
        return philox(counter, ((self.seeds & _MASK).unsqueeze(-1), ((self.seeds >> 32) & _MASK).unsqueeze(-1)))

    def words(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        """Random integers 0..2^32-1, int64 [M, dim]."""
        return torch.stack(self._words(purpose, step, -(-dim // 4)), -1).flatten(-2)[..., :dim]

    def uniform(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        return _uniform(self.words(purpose, step, dim))

    def normal(self, purpose: Purpose, step: int | Tensor, dim: int) -> Tensor:
        # The words stay four contiguous tensors: on strided ones a CPU takes other code for log and cos, which rounds differently.
        u0, u1, u2, u3 = (_uniform(word) for word in self._words(purpose, step, -(-dim // 4)))
        r0, r1 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
        a0, a1 = 2 * math.pi * u1, 2 * math.pi * u3
        return torch.stack((r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()), -1).flatten(-2)[..., :dim]

    def normals(self, purpose: Purpose, steps: int, dim: int) -> Tensor:
        """`normal` of steps 0 to ``steps`` - 1, [steps, M, dim]: the same bits in few large operations."""
        return self.normal(purpose, torch.arange(steps, device=self.positions.device).view(-1, 1, 1), dim)


class GeneratorNoise:
    """Noise of M rows from a torch generator, for heads that are used without images and seeds."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator | None = None) -> None:
        self._rows, self._device, self._generator = rows, device, generator

    def normal(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        return torch.randn(self._rows, dim, device=self._device, generator=self._generator)

    def uniform(self, purpose: Purpose, step: int, dim: int) -> Tensor:
        return 1 - torch.rand(self._rows, dim, device=self._device, generator=self._generator)


def keyed_permutation(seeds_B: Tensor, seq_len: int) -> Tensor:
    """A uniformly random permutation of 0..seq_len-1 per image: [B, seq_len] int64, a function of the seed alone."""
    return KeyedNoise(seeds_B, torch.zeros_like(seeds_B)).words(Purpose.ORDER, 0, seq_len).argsort(dim=-1, stable=True)
