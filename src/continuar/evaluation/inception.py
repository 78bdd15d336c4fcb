"""The Inception network of FID as torch-fidelity ports it, with the spatial features of sFID beside its own.

sFID (Nash et al. 2021) is the Frechet distance of features that still know where something is: the first 7 channels of a 17 x 17
map, 2,023 numbers, about as many as FID's 2,048. ADM's suite (Dhariwal & Nichol 2021), whose references hold their mean and
covariance as mu_s and sigma_s, reads them from the tensor "mixed_6/conv:0" of the graph of 2015-12-05. What that is:

* The graph lists the operations of a unit, as published listings of its first ones show, in the order conv2d_params, Conv2D,
  batchnorm, CheckNumerics, control_dependency, and last one with the unit's own name, which the next unit reads: the ReLU. So
  "mixed_6/conv" is the first branch's 1x1 convolution *after* batch norm and ReLU; the bare convolution is "mixed_6/conv/Conv2D".
* The ports of the graph to torch load mixed_6/conv into ``Mixed_6d.branch1x1``, channel by channel; public ports of sFID read the
  whole unit as well.
* The suite flattens [N, 17, 17, 7], channels last. The distance of two sets computed here would be the same in any order; against
  mu_s and sigma_s the order matters.

It has not been compared with published numbers: the weights are the user's to supply.
"""

from __future__ import annotations

from torch import Tensor, nn

SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """uint8 images [B, H, W, 3] -> features [B, 2048], logits without bias [B, 1008], spatial features [B, 2023].

    The images are resized bilinearly to 299 x 299 as in TensorFlow 1.

    Args:
        network: torch-fidelity's FeatureExtractorInceptionV3, asked for 2048 and logits_unbiased.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._unit: Tensor | None = None
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, unit: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._unit = output

    def forward(self, images_BHW3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, logits = self.network(images_BHW3.permute(0, 3, 1, 2).contiguous())
        assert self._unit is not None
        spatial = self._unit[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._unit = None
        return features, logits, spatial
