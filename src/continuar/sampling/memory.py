"""What a batch of a generation needs on a GPU, estimated before anything is allocated.

Everything grows with the number of images: the transformer's rows and their activations, the head's rows with one step's
modulations, and the noise of all diffusion steps.
"""

from __future__ import annotations

import torch

from continuar.devices import GIB
from continuar.errors import UserError
from continuar.heads.base import Options
from continuar.heads.diffusion import DiffusionHead, DiffusionOptions
from continuar.models.autoregressive import Model
from continuar.models.causal import Causal
from continuar.models.mar import MAE
from continuar.sampling.generate import PlanStep

HEADROOM = 0.92
"""The share of the free memory that is planned with: the rest is fragmentation and the libraries'."""
FIXED = 512 * 2**20
"""Workspaces and modulations that do not grow with the batch."""
ACTIVATIONS = 14
"""Values held at once per row and unit of width in a block: stream, norm, q, k, v, attention, and the MLP's two times four."""


def bytes_per_image(model: Model, plan: tuple[PlanStep, ...], options: Options, copies: int, dtype: torch.dtype) -> int:
    """Bytes that one more image of a batch takes.

    Args:
        copies: 2 with guidance, 1 without.
        dtype: of the engine's weights.
    """
    item, positions, backbone = torch.finfo(dtype).bits // 8, model.order.seq_len, model.backbone
    rows = max((step.size for step in plan), default=0)
    if isinstance(backbone, Causal):
        slots = positions + 8
        transformer = item * copies * backbone.width * (2 * slots * len(backbone.blocks) + ACTIVATIONS)
    else:
        assert isinstance(backbone, MAE)
        width = max(backbone.width, backbone.z_dim)
        transformer = item * copies * (positions + backbone.buffer) * width * (ACTIVATIONS + 4)
    head = 4 * rows * copies * (backbone.z_dim + 4 * model.head.token_size)
    if isinstance(model.head, DiffusionHead):
        assert isinstance(options, DiffusionOptions)
        net = model.head.net
        head += rows * copies * net.width * (item * (3 * net.depth + 2 + 6) + 4 * 4)
        # Drawing goes over 64-bit words, several at once.
        head += rows * options.diffusion_steps * (3 * 4 * net.token_dim + 10 * 8 * -(-net.token_dim // 4))
    return transformer + head


def fits(images: int, per_image: int, free: int) -> bool:
    """Whether a batch fits by the estimate."""
    return images * per_image <= _room(free)


def _room(free: int) -> int:
    return int(HEADROOM * free) - FIXED


def check_fits(images: int, per_image: int, free: int) -> None:
    """Refuses a batch that the estimate says does not fit.

    Raises:
        UserError: with the batch that would.
    """
    if fits(images, per_image, free):
        return
    most = max(_room(free) // per_image, 0)
    allowed = f"allowed: 1 to {most}" if most else "not even one image fits"
    needs = (images * per_image + FIXED) / GIB
    raise UserError(f"a batch of {images} images needs about {needs:.1f} GiB, and {free / GIB:.1f} GiB are free; {allowed}")


def free_bytes(device: torch.device) -> int:
    """What the device has left. What PyTorch keeps without need is given back first; what graphs keep is theirs."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
