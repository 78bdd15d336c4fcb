"""Image features of SqueezeNet 1.1 (Iandola et al. 2016), written out in torch so that torchvision is not needed.

The weights are the user's to supply by path: a safetensors file with the keys of torchvision's ``squeezenet1_1``, trained on
ImageNet in Caffe's convention (BGR, means subtracted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.checkpoints.store import load_state, read_tensors
from continuar.devices import pick_device
from continuar.errors import require

FEATURES = 512
_SIZE = 224
_MEANS_BGR = (103.939, 116.779, 123.68)


class _Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """uint8 images [B, H, W, 3] of any size -> features [B, 512] float32, the global average of the last feature map."""

    def __init__(self) -> None:
        super().__init__()
        fires = [_Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2)]
        fires += [_Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2)]
        fires += [_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)]
        # The list's indices are the keys of torchvision's layout.
        self.layers = nn.ModuleList([nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2), *fires])

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> SqueezeNet:
        """The network with weights from a safetensors file.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        network = cls()
        tensors = read_tensors(Path(path))
        # A whole network's file has its classifier beside the features, under a prefix.
        layers = {f"layers.{k.removeprefix('features.')}": v for k, v in tensors.items() if not k.startswith("classifier.")}
        load_state(network, layers, str(path))
        return network.eval().to(device)

    def forward(self, images_BHW3: Tensor) -> Tensor:
        x = images_BHW3.permute(0, 3, 1, 2).flip(1).float()
        if x.shape[-2:] != (_SIZE, _SIZE):
            x = F.interpolate(x, (_SIZE, _SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        x = x - torch.tensor(_MEANS_BGR, device=x.device).view(1, 3, 1, 1)
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


@contextmanager
def exact_float32() -> Iterator[None]:
    """No gradients, and float32 products in float32: no TF32 inside the block."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def extract(
    network: Callable[[Tensor], Tensor],
    images_BHW3: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features [n, D] float32 of uint8 images [n, H, W, 3], batch by batch, in float32 (no autocast, no TF32)."""
    require(images_BHW3.ndim == 4 and images_BHW3.shape[-1] == 3, f"images are {images_BHW3.shape}; allowed: [n, H, W, 3]")
    parts = []
    with exact_float32():
        for first in range(0, len(images_BHW3), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images_BHW3[first : first + batch_size])).to(device)
            parts.append(network(batch).float().cpu().numpy())
            if on_progress is not None:
                on_progress(min(first + batch_size, len(images_BHW3)), len(images_BHW3))
    return np.concatenate(parts)


def check_same_dimensions(a_MD: np.ndarray, b_ND: np.ndarray) -> None:
    """Refuses two sets that are not features of one network."""
    require(a_MD.ndim == b_ND.ndim == 2, f"features are {a_MD.shape} and {b_ND.shape}; allowed: [images, dimensions]")
    require(a_MD.shape[1] == b_ND.shape[1], f"features of {a_MD.shape[1]} and {b_ND.shape[1]} dimensions cannot be compared")


def float64_device(device: torch.device | str) -> torch.device:
    """The device, or the CPU instead of one that has no float64."""
    found = pick_device(device)
    return torch.device("cpu") if found.type == "mps" else found
