"""The adversarial term: closed forms and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from continuar.training.config import DiscriminatorConfig
from continuar.training.gan_losses import PatchDiscriminator, adaptive_weight, hinge


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patches_are_rated_down_to_the_smallest_image(layers: int) -> None:
    config = DiscriminatorConfig(width=8, layers=layers)
    discriminator, size = PatchDiscriminator(config), config.smallest_image
    assert discriminator(torch.zeros(2, 3, size, size)).shape == (2, 1, 1, 1)
    assert discriminator(torch.zeros(2, 3, 2 * size, 2 * size)).shape[2] > 1
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, size - 2**layers, size - 2**layers))


def test_an_image_is_rated_without_its_neighbours() -> None:
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(DiscriminatorConfig(width=8, layers=2)), torch.randn(3, 3, 16, 16)
    together = discriminator(images)
    assert together.std() > 0
    torch.testing.assert_close(together[1:2], discriminator(images[1:2]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("real", "fake", "expected"), [(2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (0.5, -2.0, 0.25), (2.0, -0.5, 0.25)]
)
def test_hinge_is_zero_beyond_the_margin(real: float, fake: float, expected: float) -> None:
    assert hinge(torch.full((2, 1), real), torch.full((2, 1), fake)).item() == pytest.approx(expected)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer() -> None:
    torch.manual_seed(0)
    last, x = nn.Linear(3, 2), torch.randn(5, 3)
    made = last(x)
    others, adversarial = made.square().mean(), 7 * made.sum()
    a = torch.autograd.grad(others, last.weight, retain_graph=True)[0].norm()
    b = torch.autograd.grad(adversarial, last.weight, retain_graph=True)[0].norm()
    by_made = [torch.autograd.grad(term, made, retain_graph=True)[0] for term in (others, adversarial)]
    weight = adaptive_weight(made, *by_made, last.weight)
    torch.testing.assert_close(weight, a / (b + 1e-4))
    assert not weight.requires_grad
    pulled = torch.autograd.grad(weight * adversarial, last.weight, retain_graph=True)[0].norm()
    torch.testing.assert_close(pulled, a, rtol=1e-3, atol=0)
    assert adaptive_weight(made, by_made[0], 0 * by_made[1], last.weight) == pytest.approx(1e4, rel=1) or a < 1
