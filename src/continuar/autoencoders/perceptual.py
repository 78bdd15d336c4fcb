"""Perceptual distances: how far the features of two images lie apart in a network trained on images.

Features of each layer are scaled to unit length per position; their squared differences are weighted per channel, summed over
channels, averaged over positions and summed over layers (Zhang et al. 2018, Equation 1). Weights are the user's to supply by path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.autoencoders.config import LossConfig
from continuar.checkpoints.store import load_state, read_tensors
from continuar.checkpoints.torch_files import load_torch_file
from continuar.errors import UserError, require
from continuar.evaluation.features import SqueezeNet

_SMALLEST = 64
"""Smaller images are enlarged: the networks' deep layers would see nothing of them."""
_MEANS_BGR = (103.939, 116.779, 123.68)
_PREFIX = "loss.perceptual_loss."
"""Where an LDM autoencoder's file keeps its LPIPS."""


class Perceptual(nn.Module, ABC):
    """Images [B, 3, H, W] in [-1, 1], twice -> distances [B]; the second are the targets and get no gradient."""

    @abstractmethod
    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] of several layers."""

    def channel_weights(self) -> list[Tensor] | None:
        """[C] per layer; None: all 1."""
        return None

    def forward(self, images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
        found = self.features(_enlarged(images_B3HW))
        with torch.no_grad():
            wanted = self.features(_enlarged(targets_B3HW))
        weights = self.channel_weights() or [torch.ones((), device=images_B3HW.device)] * len(found)
        distance = torch.zeros(len(images_B3HW), device=images_B3HW.device)
        for a, b, w in zip(found, wanted, weights, strict=True):
            squared = (F.normalize(a.float(), dim=1, eps=1e-10) - F.normalize(b.float(), dim=1, eps=1e-10)).square()
            distance = distance + (squared * w.view(-1, 1, 1)).sum(1).mean((1, 2))
        return distance


class SqueezeNetPerceptual(Perceptual):
    """Four maps of SqueezeNet 1.1, unweighted, averaged over layers: weights that can be shipped with, for want of LPIPS."""

    _TAKEN = (1, 4, 7, 12)
    means: Tensor

    def __init__(self, network: SqueezeNet) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("means", torch.tensor(_MEANS_BGR).view(1, 3, 1, 1), persistent=False)

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        x = (images_B3HW.flip(1) + 1) * 127.5 - self.means
        maps = []
        for number, layer in enumerate(self.network.layers):
            x = layer(x)
            if number in self._TAKEN:
                maps.append(x)
        return maps

    def channel_weights(self) -> list[Tensor] | None:
        return [torch.full((), 1 / len(self._TAKEN), device=self.means.device)] * len(self._TAKEN)


class LPIPS(Perceptual):
    """Five maps of VGG-16, weighted as learned from human judgements (Zhang et al. 2018).

    Keys are those of the published module: ``net.sliceK.I.*``, ``linK.model.1.weight``.
    """

    # The layers of each slice by their index in VGG-16: (index, inputs, outputs) of a convolution, or a pooling at None.
    _SLICES: tuple[tuple[tuple[int, int, int] | None, ...], ...] = (
        ((0, 3, 64), (2, 64, 64)),
        (None, (5, 64, 128), (7, 128, 128)),
        (None, (10, 128, 256), (12, 256, 256), (14, 256, 256)),
        (None, (17, 256, 512), (19, 512, 512), (21, 512, 512)),
        (None, (24, 512, 512), (26, 512, 512), (28, 512, 512)),
    )

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict()
        for number, layers in enumerate(self._SLICES, 1):
            convolutions = {str(layer[0]): nn.Conv2d(layer[1], layer[2], 3, padding=1) for layer in layers if layer}
            self.net[f"slice{number}"] = nn.ModuleDict(convolutions)
            last = next(layer for layer in reversed(layers) if layer)[2]
            self.register_parameter(f"lin{number - 1}", nn.Parameter(torch.ones(last)))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        x = (images_B3HW - self.shift) / self.scale
        maps = []
        for number, layers in enumerate(self._SLICES, 1):
            for layer in layers:
                x = F.max_pool2d(x, 2) if layer is None else F.relu(self.net[f"slice{number}"][str(layer[0])](x))  # type: ignore[index]
            maps.append(x)
        return maps

    def channel_weights(self) -> list[Tensor] | None:
        return [getattr(self, f"lin{i}") for i in range(len(self._SLICES))]

    @classmethod
    def from_file(cls, path: Path) -> LPIPS:
        """With the weights of a safetensors or torch file: an LPIPS module's state, or an autoencoder's of LDM that holds one.

        Raises:
            UserError: missing, unreadable, or other keys or shapes.
        """
        state = _state(path)
        state = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)} or state
        # `scaling_layer` holds the constants above; `lins` are the same weights a second time.
        kept = {k: v for k, v in state.items() if not k.startswith(("scaling_layer.", "lins."))}
        lin = {f"lin{i}.model.1.weight": f"lin{i}" for i in range(len(cls._SLICES))}
        ours = {lin.get(k, k): v.flatten() if k in lin else v for k, v in kept.items()}
        network = cls()
        load_state(network, ours, str(path))
        return network


def build_perceptual(config: LossConfig, device: torch.device) -> Perceptual | None:
    """The frozen network that a run asks for, or None.

    Raises:
        UserError: weights are not given, or do not fit.
    """
    if config.perceptual == "off" or config.perceptual_weight == 0:
        return None
    require(
        bool(config.perceptual_weights),
        f"loss.perceptual is '{config.perceptual}', whose weights you supply: --loss.perceptual-weights FILE, "
        "or --loss.perceptual off",
    )
    path = Path(config.perceptual_weights)
    network = SqueezeNetPerceptual(SqueezeNet.from_file(path)) if config.perceptual == "squeezenet" else LPIPS.from_file(path)
    return network.eval().requires_grad_(False).to(device)


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    content = load_torch_file(path, "a file of LPIPS weights")
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} does not hold weights alone; allowed: a state dict of LPIPS")
    return content


def _enlarged(images_B3HW: Tensor) -> Tensor:
    side = min(images_B3HW.shape[-2:])
    if side >= _SMALLEST:
        return images_B3HW
    return F.interpolate(images_B3HW, scale_factor=-(-_SMALLEST // side), mode="bilinear", align_corners=False)
