"""Mean and standard deviation of a tokenizer's latents, which is where its scale comes from.

1. Latents of every image are those that training will see: draws from the posterior. Their moments are known without drawing:
   E[x] = E[mean], E[x^2] = E[mean^2 + variance].
2. Sums are streamed in float64, per channel.
3. scale = 1 / std of all values together (paper, Section 4: 0.2325 for KL-16 on ImageNet), with or without a shift by the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from continuar.data.blocks import image_blocks
from continuar.data.images import check_skipped
from continuar.data.sources import Source
from continuar.errors import require
from continuar.tokenizers import VAETokenizer
from continuar.tokenizers.diffusers_vae import posterior
from continuar.training.parallel import Single


@dataclass(frozen=True)
class LatentStatistics:
    """Of latents before any scale or shift."""

    images: int
    """How many were measured, mirror images counted."""
    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @property
    def scale(self) -> float:
        """What multiplies latents to unit standard deviation."""
        return 1 / self.std


class LatentSums:
    """Sums of latents per channel, in float64 on the host."""

    def __init__(self, has_variance: bool) -> None:
        self._has_variance = has_variance
        self._images, self._values = 0, 0
        self._sum, self._squares = np.zeros(0), np.zeros(0)

    def add(self, latents: Tensor) -> None:
        """Counts latents [B, C, h, w], or moments [B, 2C, h, w]."""
        if self._has_variance:
            mean, std = posterior(latents)
            first, second = mean.double(), mean.double().square() + std.double().square()
        else:
            first = latents.double()
            second = first.square()
        total, squares = first.sum((0, 2, 3)).cpu().numpy(), second.sum((0, 2, 3)).cpu().numpy()
        self._sum = total if self._values == 0 else self._sum + total
        self._squares = squares if self._values == 0 else self._squares + squares
        self._images += len(latents)
        self._values += first.numel() // first.shape[1]

    def join(self, parallel: Single) -> None:
        """Counts what every process has added; all of them together, each having added something."""
        counts = parallel.total(torch.tensor([self._images, self._values])).tolist()
        self._images, self._values = counts
        sums = np.stack((self._sum, self._squares))
        self._sum, self._squares = parallel.total(torch.from_numpy(sums)).numpy()

    def statistics(self) -> LatentStatistics:
        """Of what was added.

        Raises:
            UserError: nothing was added, or the values do not vary, or are not finite.
        """
        require(self._images > 0, "there are no images to measure")
        mean, square = self._sum / self._values, self._squares / self._values
        std = np.sqrt(np.maximum(square - mean**2, 0))
        whole = float(mean.mean())
        whole_std = float(np.sqrt(max(float(square.mean()) - whole**2, 0.0)))
        require(0 < whole_std < np.inf, f"the latents' standard deviation is {whole_std}; is this the right tokenizer?")
        return LatentStatistics(self._images, whole, whole_std, tuple(map(float, mean)), tuple(map(float, std)))


def measure(latents: Iterable[Tensor], has_variance: bool) -> LatentStatistics:
    """The statistics of a stream of latents."""
    sums = LatentSums(has_variance)
    for block in latents:
        sums.add(block)
    return sums.statistics()


def encoded(
    source: Source,
    tokenizer: VAETokenizer,
    *,
    device: torch.device,
    images: int | None = None,
    batch_size: int = 64,
    max_skipped_share: float = 0.01,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Latents of a source's images, batch by batch.

    Args:
        images: measure this many, evenly spread over the source; None: all.
        max_skipped_share: of images that cannot be used, 0..1.

    Raises:
        UserError: too many images cannot be used.
    """
    count = len(source)
    number = count if images is None else min(images, count)
    chosen = [i * count // number for i in range(number)]
    skipped: list[str] = []
    done = 0
    with torch.no_grad():
        for block in image_blocks(source, chosen, tokenizer.config.image_size, batch_size):
            skipped += block.skipped
            if len(block.images):
                yield tokenizer.encode(to_signed(torch.from_numpy(block.images).to(device)))
            done += block.asked
            if on_progress is not None:
                on_progress(done, number)
    if skipped:
        check_skipped(skipped, number, max_skipped_share)


def to_signed(pixels_BHW3: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> floats [B, 3, H, W] in [-1, 1]."""
    return pixels_BHW3.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
