"""The endless stream of training batches, as a pure function of (seed, step): resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from continuar.data.images import ImageSet
from continuar.errors import require
from continuar.tokenizers import Tokenizer
from continuar.training.config import DataConfig


class IndexStream:
    """Permutations of 0..count-1 laid end to end; batch s is the stretch [s B, (s + 1) B)."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        require(count >= 1, "the data set is empty")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._permutation

    def batch(self, step: int) -> np.ndarray:
        """Indices of batch ``step``, int64 [B]."""
        start, parts, left = step * self.batch_size, [], self.batch_size
        while left:
            epoch, offset = divmod(start, self.count)
            part = self._epoch_order(epoch)[offset : offset + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return np.concatenate(parts)


class ImageStream:
    """Micro-batches of (tokens [B, N, D], labels [B]) on a device, from images that stay there as uint8.

    Args:
        batch_size: images per step.
        micro_batch: images per micro-batch, a divisor of the batch size; the whole batch if not given.
    """

    def __init__(
        self,
        images: ImageSet,
        tokenizer: Tokenizer,
        data: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        micro_batch: int | None = None,
    ) -> None:
        self._index = IndexStream(len(images), batch_size, seed)
        self._micro_batch = micro_batch or batch_size
        self._images = torch.from_numpy(images.images).to(device).permute(0, 3, 1, 2)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._tokenizer, self._data, self._device = tokenizer, data, device

    def batch(self, step: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Micro-batch ``slot`` of batch ``step``; augmentation draws from torch's default generator of the device."""
        first = slot * self._micro_batch
        index = torch.from_numpy(self._index.batch(step)[first : first + self._micro_batch])
        if self._device.type == "cuda":
            index = index.pin_memory()
        index = index.to(self._device, non_blocking=True)
        pixels = augment(self._images[index], self._data)
        images = pixels.float().div_(127.5).sub_(1)
        return self._tokenizer.tokenize(self._tokenizer.encode(images)), self._labels[index]


def augment(pixels_B3HW: Tensor, data: DataConfig) -> Tensor:
    """Random mirror images and shifts, as the config asks, each drawn per image."""
    batch, _, height, width = pixels_B3HW.shape
    device, pad = pixels_B3HW.device, data.crop_padding
    if not (data.flip or pad):
        return pixels_B3HW
    x = torch.arange(width, device=device).expand(batch, width)
    y = torch.arange(height, device=device).expand(batch, height)
    if data.flip:
        mirrored = torch.rand(batch, 1, device=device) < 0.5
        x = torch.where(mirrored, width - 1 - x, x)
    if pad:
        shift = torch.randint(-pad, pad + 1, (2, batch, 1), device=device)
        x, y = (x + shift[0]).clamp(0, width - 1), (y + shift[1]).clamp(0, height - 1)
    rows = torch.arange(batch, device=device)[:, None, None]
    return pixels_B3HW.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def measure_std(images: ImageSet, encode: Callable[[Tensor], Tensor], block: int = 1024) -> tuple[float, float]:
    """(mean, std) of the encoded training images' values, streamed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, len(images), block):
        pixels = torch.from_numpy(images.images[first : first + block]).permute(0, 3, 1, 2)
        values = encode(pixels.float().div_(127.5).sub_(1)).double()
        count, total = count + values.numel(), total + values.sum().item()
        squares += values.square().sum().item()
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5
