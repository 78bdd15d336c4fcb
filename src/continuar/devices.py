"""One argument for where to compute."""

from __future__ import annotations

import os
from typing import Literal

import torch

from continuar.errors import UserError, require

GIB = 2**30
"""Bytes of a GiB, in which memory is given."""

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def expandable_segments() -> None:
    """Lets torch's allocator on CUDA grow its segments rather than keep one per size, unless the user's environment says otherwise;
    before the first tensor there. Graphs of several masked counts that share one pool hold an eighth to a fifth less
    (docs/scaling.md).
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name means; "auto" is CUDA, else MPS, else the CPU. "cuda:1" works too.

    Raises:
        UserError: no such device, or it is not there.
    """
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UserError(f"device is '{name}'; allowed: auto, cpu, cuda, cuda:N, mps") from problem
    require(device.type in ("cpu", "cuda", "mps"), f"device is '{name}'; allowed: auto, cpu, cuda, cuda:N, mps")
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    require(here[device.type], f"device is '{name}', which this machine does not have; try 'auto'")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        require(
            device.index < count,
            f"device is '{name}'; this machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}",
        )
    return device
