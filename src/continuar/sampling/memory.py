"""The GPU memory that a batch needs in generation, estimated before anything is allocated.

All parts grow with the number of images: the transformer's rows and their activations, the head's rows with the modulations of one
step, and the noise of all diffusion steps.
"""

from __future__ import annotations

import torch

from continuar.distributed import GIB
from continuar.errors import UserError
from continuar.heads.base import Options
from continuar.heads.diffusion import DiffusionHead, DiffusionOptions
from continuar.models.autoregressive import Model
from continuar.models.causal import Causal
from continuar.models.mar import MAE
from continuar.sampling.generate import PlanStep

USABLE = 0.92
"""The share of the free memory that is used; the rest is left for fragmentation and libraries."""
FIXED = 512 * 2**20
"""Bytes of workspaces and modulations, which do not grow with the batch."""
ACTIVATIONS = 14
"""Values held together per row and unit of width in a block: stream, norm, q, k, v, attention, and the MLP's two times four."""


def bytes_per_image(model: Model, plan: tuple[PlanStep, ...], options: Options, copies: int, dtype: torch.dtype) -> int:
    """Bytes that one more image of a batch takes.

    Args:
        copies: 2 with guidance, 1 without.
        dtype: the dtype of the engine's weights.
    """
    item, seq_len, backbone = dtype.itemsize, model.order.seq_len, model.backbone
    rows = max((step.size for step in plan), default=0)
    if isinstance(backbone, Causal):
        slots = seq_len + 8
        transformer = item * copies * backbone.width * (2 * slots * len(backbone.blocks) + ACTIVATIONS)
    else:
        assert isinstance(backbone, MAE)
        width = max(backbone.width, backbone.z_dim)
        # Four more per row: the buffers of `FastMAE`.
        transformer = item * copies * (seq_len + backbone.buffer) * width * (ACTIVATIONS + 4)
    head = 4 * rows * copies * (backbone.z_dim + 4 * model.head.token_size)
    if isinstance(model.head, DiffusionHead):
        assert isinstance(options, DiffusionOptions)
        net = model.head.net
        head += rows * copies * net.width * (item * (3 * net.depth + 2 + 6) + 4 * 4)
        # Philox computes with several 64-bit words per value.
        head += rows * options.diffusion_steps * (3 * 4 * net.token_dim + 10 * 8 * -(-net.token_dim // 4))
    return transformer + head


def fitting_images(per_image: int, free: int) -> int:
    """The largest batch that fits into ``free`` bytes by the estimate."""
    return max((int(USABLE * free) - FIXED) // per_image, 0)


def check_fits(images: int, per_image: int, free: int) -> None:
    """Refuses a batch that does not fit by the estimate.

    Raises:
        UserError: names the largest batch that fits.
    """
    most = fitting_images(per_image, free)
    if images > most:
        allowed = f"allowed: 1 to {most}" if most else "not even one image fits"
        needs = (images * per_image + FIXED) / GIB
        raise UserError(f"a batch of {images} images needs about {needs:.1f} GiB, and {free / GIB:.1f} GiB are free; {allowed}")


def free_bytes(device: torch.device) -> int:
    """Free bytes of the device, after PyTorch has returned its unused blocks; memory of live graphs is not free."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
