"""Perceptual distances, against the formula written down once more, and the files their weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import UserError
from continuar.evaluation.networks import SqueezeNet
from continuar.training.config import LossConfig
from continuar.training.gan_losses import LPIPS, Perceptual, SqueezeNetPerceptual, build_perceptual

CPU = torch.device("cpu")
# (index, inputs, outputs) of VGG-16's convolutions, and where LPIPS' slices end.
VGG = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
SLICE_OF = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
LINEAR = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def lpips_state() -> dict[str, Tensor]:
    """As the published module's state dict, random."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for index, inputs, outputs in VGG:
        name = f"net.slice{SLICE_OF[index]}.{index}"
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    for i, width in enumerate(LINEAR):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
        state[f"lins.{i}.model.1.weight"] = state[f"lin{i}.model.1.weight"].clone()
    return state


def reference_lpips(state: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018 on VGG-16, layer by layer."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = torch.cat((a, b))
    x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    total = torch.zeros(len(a))
    for position, (index, _, _) in enumerate(VGG):
        if index in (5, 10, 17, 24):
            x = F.max_pool2d(x, 2)
        name = f"net.slice{SLICE_OF[index]}.{index}"
        x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
        if position + 1 == len(VGG) or SLICE_OF[VGG[position + 1][0]] != SLICE_OF[index]:
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            one, two = unit.chunk(2)
            weight = state[f"lin{SLICE_OF[index] - 1}.model.1.weight"]
            total = total + F.conv2d((one - two).square(), weight).mean((1, 2, 3))
    return total


def pair(size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_lpips_is_the_published_formula(lpips_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(lpips_state, tmp_path / "lpips.safetensors")
    network = LPIPS.from_file(tmp_path / "lpips.safetensors")
    a, b = pair()
    with torch.no_grad():
        torch.testing.assert_close(network(a, b), reference_lpips(lpips_state, a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["plain", "ldm"])
def test_lpips_is_read_from_torch_files_and_from_autoencoders_of_ldm(
    wrapper: str, lpips_state: dict[str, Tensor], tmp_path: Path
) -> None:
    content: dict = {k: v for k, v in lpips_state.items() if not k.startswith("lins.")}
    if wrapper == "ldm":
        content = {"state_dict": {f"loss.perceptual_loss.{k}": v for k, v in content.items()} | {"encoder.x": torch.ones(1)}}
    torch.save(content, tmp_path / "lpips.ckpt")
    config = LossConfig(perceptual="lpips", perceptual_weights=str(tmp_path / "lpips.ckpt"))
    network = build_perceptual(config, CPU)
    assert isinstance(network, LPIPS)
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.equal(network.lin2.detach(), lpips_state["lin2.model.1.weight"].flatten())


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SqueezeNet's layout with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file({k.removeprefix("layers."): v for k, v in SqueezeNet().state_dict().items()}, path)
    return path


def built(path: Path) -> Perceptual:
    network = build_perceptual(LossConfig(perceptual="squeezenet", perceptual_weights=str(path)), CPU)
    assert isinstance(network, SqueezeNetPerceptual)
    return network


@pytest.mark.parametrize("size", [8, 32, 70])
def test_distances_are_zero_for_equal_images_and_symmetric(size: int, squeezenet: Path) -> None:
    network, (a, b) = built(squeezenet), pair(size)
    assert network(a, a).abs().max() == 0
    torch.testing.assert_close(network(a, b), network(b, a))
    assert network(a, b).min() > 0
    assert network(a, b).shape == (2,)


def test_gradients_reach_the_image_and_not_its_target(squeezenet: Path) -> None:
    network = built(squeezenet)
    a, b = (x.requires_grad_() for x in pair(32))
    network(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert b.grad is None


def test_squeezenets_maps_are_those_of_the_feature_network(squeezenet: Path) -> None:
    network, (a, _) = built(squeezenet), pair(224)
    pixels = ((a + 1) * 127.5).round()
    maps = network.features(pixels / 127.5 - 1)
    features = SqueezeNet.from_file(squeezenet)(pixels.to(torch.uint8).permute(0, 2, 3, 1))
    torch.testing.assert_close(maps[-1].mean((2, 3)), features, rtol=1e-4, atol=1e-5)


def test_no_network_is_built_where_none_is_wanted() -> None:
    assert build_perceptual(LossConfig(), CPU) is None
    assert build_perceptual(LossConfig(perceptual="lpips", perceptual_weight=0.0), CPU) is None


def test_weights_that_are_lacking_or_do_not_fit_are_refused(tmp_path: Path, squeezenet: Path) -> None:
    def message(kind: str, path: str) -> str:
        with pytest.raises(UserError) as error:
            build_perceptual(LossConfig(perceptual=kind, perceptual_weights=path), CPU)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "whose weights you supply: --loss.perceptual-weights FILE, or --loss.perceptual off" in message("squeezenet", "")
    assert "does not exist" in message("squeezenet", str(tmp_path / "nothing.safetensors"))
    assert "does not fit the model: missing: lin0, lin1" in message("lpips", str(squeezenet))
    torch.save({"x": 3}, tmp_path / "a.pth")
    assert "does not hold weights alone" in message("lpips", str(tmp_path / "a.pth"))
    (tmp_path / "b.pth").write_bytes(b"text")
    assert "not a checkpoint of torch.save" in message("lpips", str(tmp_path / "b.pth"))
