"""The adversarial term: a discriminator of patches, hinge losses and their adaptive weight.

Discriminator: Isola et al. 2017 (pix2pix); hinge loss: Lim & Ye 2017; adaptive weight: Esser et al. 2021 (VQGAN), Equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.autoencoders.config import DiscriminatorConfig
from continuar.training.parallel import Single

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
    images_B3HW: Tensor, others_B3HW: Tensor, adversarial_B3HW: Tensor, last_layer: Tensor, parallel: Single | None = None
) -> Tensor:
    """What makes the adversarial term pull the decoder's last layer as hard as the other terms do: a ratio of gradient norms.

    Args:
        images_B3HW: what the decoder made, with its graph.
        others_B3HW, adversarial_B3HW: gradients of the terms by these images.
        last_layer: the weight of the layer that made them.
        parallel: the processes whose images are one batch; one if not given.
    """
    (a,) = torch.autograd.grad(images_B3HW, last_layer, others_B3HW, retain_graph=True)
    (b,) = torch.autograd.grad(images_B3HW, last_layer, adversarial_B3HW, retain_graph=True)
    (parallel or Single()).average_all([a, b])
    return (a.float().norm() / (b.float().norm() + 1e-4)).clamp(0, _MAX_WEIGHT).detach()
