"""The adversarial term: a discriminator of patches, hinge losses and their adaptive weight.

Discriminator: Isola et al. 2017 (pix2pix); hinge loss: Lim & Ye 2017; adaptive weight: Esser et al. 2021 (VQGAN), Equation 7.

Perceptual distances: how far the features of two images lie apart in a network trained on images.

Features of each layer are scaled to unit length per position; their squared differences are weighted per channel, summed over
channels, averaged over positions and summed over layers (Zhang et al. 2018, Equation 1). Weights are the user's to supply by path.

How a codebook learns (van den Oord et al. 2017).

1. Each vector of the encoder becomes its nearest code; gradients pass straight through to the vector.
2. Codes follow: as moving averages of the vectors that chose them (its Appendix A.1), or pulled by a loss.
3. A commitment loss keeps vectors near their codes.
4. A code that is hardly used is moved onto a random vector of the batch (Lancucki et al. 2020); at the first step most of them are.

Several processes count together, and revive by vectors of the first one: their codes stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.checkpoints.store import load_state
from continuar.distributed import SingleProcess
from continuar.errors import UserError, require
from continuar.evaluation.networks import SqueezeNet
from continuar.io import load_torch_file, read_tensors
from continuar.tokenizers.vq import nearest_codes
from continuar.training.config import CodebookLearning, DiscriminatorConfig, LossConfig

_MAX_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] -> one number per patch [B, 1, h, w], high for real ones.

    Group norms, not batch norms: a patch is judged without looking at other images.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            wider = config.width * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layers(images_B3HW)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real patches above 1, made ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    images_B3HW: Tensor, others_B3HW: Tensor, adversarial_B3HW: Tensor, last_layer: Tensor, parallel: SingleProcess | None = None
) -> Tensor:
    """The weight with which the adversarial term pulls the decoder's last layer as hard as the others: a ratio of gradient norms.

    Args:
        images_B3HW: what the decoder made, with its graph.
        others_B3HW, adversarial_B3HW: gradients of the terms by these images.
        last_layer: the weight of the layer that made them.
        parallel: the processes whose images are one batch; one if not given.
    """
    (a,) = torch.autograd.grad(images_B3HW, last_layer, others_B3HW, retain_graph=True)
    (b,) = torch.autograd.grad(images_B3HW, last_layer, adversarial_B3HW, retain_graph=True)
    (parallel or SingleProcess()).average_all([a, b])
    return (a.float().norm() / (b.float().norm() + 1e-4)).clamp(0, _MAX_WEIGHT).detach()


_SMALLEST = 64
"""Smaller images are enlarged: the networks' deep layers would see nothing of them."""
_MEANS_BGR = (103.939, 116.779, 123.68)
_PREFIX = "loss.perceptual_loss."
"""Prefix of the LPIPS weights in the file of an LDM autoencoder."""


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


@dataclass(frozen=True)
class Quantised:
    """Vectors and the codes they became."""

    codes_BCHW: Tensor
    """Codes, with the gradient of the vectors."""
    loss: Tensor
    """Commitment and, where codes learn by gradient, the codebook's loss."""
    vectors_MC: Tensor
    ids_M: Tensor


class CodebookLearner(nn.Module):
    """Quantises and moves codes; its buffers belong into a checkpoint.

    Args:
        codebook_VC: the parameter that holds the codes.
        config: how they learn.
        parallel: the processes that train together; one if not given.
    """

    uses_V: Tensor
    sums_VC: Tensor
    seen_V: Tensor

    def __init__(self, codebook_VC: nn.Parameter, config: CodebookLearning, parallel: SingleProcess | None = None) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel or SingleProcess()
        # In a tuple, so that it is not registered here a second time.
        self._codebook = (codebook_VC,)
        codebook_VC.requires_grad_(config.update == "gradient")
        self.register_buffer("uses_V", torch.zeros(len(codebook_VC)))
        self.register_buffer("sums_VC", torch.zeros_like(codebook_VC, dtype=torch.float32))
        self.register_buffer("seen_V", torch.zeros(len(codebook_VC)))
        self.to(codebook_VC.device)

    def forward(self, vectors_BCHW: Tensor) -> Quantised:
        """Vectors [B, C, h, w] to codes, in float32."""
        x_BCHW = vectors_BCHW.float()
        b, c, h, w = x_BCHW.shape
        x_MC = x_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
        (codebook,) = self._codebook
        ids_M = nearest_codes(x_MC.detach(), codebook.detach())
        codes_MC = F.embedding(ids_M, codebook)
        loss = self.config.commitment * F.mse_loss(x_MC, codes_MC.detach())
        if self.config.update == "gradient":
            loss = loss + F.mse_loss(codes_MC, x_MC.detach())
        straight_MC = x_MC + (codes_MC - x_MC).detach()
        return Quantised(straight_MC.view(b, h, w, c).permute(0, 3, 1, 2).contiguous(), loss, x_MC.detach(), ids_M)

    @torch.no_grad()
    def update(self, done: Quantised, keep: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the optimizer's step: averages, codes, dead codes. No host synchronisation.

        Args:
            keep: a bool tensor; where it is False nothing changes (a bad step).
            optimizer: of a codebook that learns by gradient; a revived code's moments begin anew.
        """
        (codebook,) = self._codebook
        codes, decay, even = len(codebook), self.config.decay, self.parallel.world * len(done.ids_M) / len(codebook)
        # Not `bincount`, which reads the largest id on the host.
        counts_V = torch.zeros_like(self.uses_V).index_add_(0, done.ids_M, torch.ones_like(done.ids_M, dtype=torch.float32))
        counts_V = self.parallel.total(counts_V)
        uses_V = decay * self.uses_V + (1 - decay) * counts_V
        batch_sums_VC = torch.zeros_like(self.sums_VC).index_add_(0, done.ids_M, done.vectors_MC)
        sums_VC = decay * self.sums_VC + (1 - decay) * self.parallel.total(batch_sums_VC)
        if self.config.update == "ema":
            # A code that nobody ever chose has no average: it stays until it is revived.
            moved = (sums_VC / uses_V.clamp_min(1e-12).unsqueeze(1)).to(codebook.dtype)
            new_VC = torch.where((uses_V > 1e-6).unsqueeze(1), moved, codebook)
        else:
            new_VC = codebook.clone()
        if self.config.revive_below > 0:
            dead_V = uses_V < self.config.revive_below * even
            chosen_VC = done.vectors_MC[torch.randint(len(done.vectors_MC), (codes,), device=codebook.device)]
            self.parallel.share([chosen_VC])
            new_VC = torch.where(dead_V.unsqueeze(1), chosen_VC.to(codebook.dtype), new_VC)
            uses_V = torch.where(dead_V, even, uses_V)
            sums_VC = torch.where(dead_V.unsqueeze(1), chosen_VC * even, sums_VC)
            for moment in _moments(optimizer, codebook):
                moment.mul_(~(dead_V & keep).unsqueeze(1))
        codebook.copy_(torch.where(keep, new_VC, codebook))
        self.uses_V.copy_(torch.where(keep, uses_V, self.uses_V))
        self.sums_VC.copy_(torch.where(keep, sums_VC, self.sums_VC))
        self.seen_V.add_(counts_V)

    @torch.no_grad()
    def read_usage(self) -> tuple[float, float]:
        """(share of codes in use, perplexity) since the last read; synchronises and starts anew."""
        found = usage(self.seen_V)
        self.seen_V.zero_()
        return found


def usage(counts_V: Tensor) -> tuple[float, float]:
    """(share of codes that occur, perplexity = exp of the entropy of their frequencies), 0 for no counts."""
    total = counts_V.sum()
    p = counts_V.double() / total.clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return (counts_V > 0).double().mean().item(), entropy.exp().item() if total > 0 else 0.0


def _moments(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
