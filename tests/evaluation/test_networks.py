"""Networks are what they are called, give what they should, and refuse other weights in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from continuar.data.loader import load_images
from continuar.errors import UserError
from continuar.evaluation.metrics import class_accuracy, nearest_neighbours
from continuar.evaluation.networks import (
    FID_SHA256,
    NETWORKS,
    Classifier,
    ClassifierConfig,
    FeatureNetwork,
    SqueezeNet,
    extract,
    load_network,
    sha256_of_state,
)
from tests.evaluation.tiny_networks import CLASSES, MeanColour, save_classifier

SHARED = Path(__file__).parents[3] / "shared"

WEIGHTS = SHARED / "weights" / "squeezenet1_1_imagenet.safetensors"

IMAGENETTE = SHARED / "data" / "imagenette128-val.parquet"

needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="the SqueezeNet weights are not beside the repository")

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def test_feature_network_is_called_fid_only_with_the_fid_weights() -> None:
    names = [FeatureNetwork(name, MeanColour(), sha) for name in NETWORKS for sha in (FID_SHA256 + "0af5f7", "00" + FID_SHA256)]
    assert [n.title("FID", "Frechet distance") for n in names if n.is_fid] == ["FID"]
    assert names[1].title("FID", "Frechet distance") == "Frechet distance (inception)"
    with pytest.raises(UserError, match="which means another one"):
        FeatureNetwork.from_module(MeanColour(), "inception")


def test_feature_network_of_any_module() -> None:
    network = FeatureNetwork.from_module(MeanColour(), "colour")
    found = network(IMAGES)
    np.testing.assert_allclose(found.features_ND, IMAGES.mean((1, 2)), rtol=1e-5)
    assert found.logits_NC is None
    with pytest.raises(UserError, match=r"the network 'custom' gives features \(3, 8, 8, 3\); allowed: \[3, any\]"):
        FeatureNetwork.from_module(nn.Identity())(IMAGES)


def test_sha256_of_state_tells_values_names_and_types_apart() -> None:
    def of(**state: torch.Tensor) -> str:
        module = nn.Module()
        for name, value in state.items():
            module.register_buffer(name, value)
        return sha256_of_state(module)

    one = torch.ones(2)
    states = [{"a": one}, {"b": one}, {"a": one * 2}, {"a": one.bfloat16()}, {"a": one.view(2, 1)}, {"a": one, "b": one}]
    assert len({of(**s) for s in states}) == len(states)
    assert of(a=one, b=2 * one) == of(b=2 * one, a=one.clone())


def test_load_network_classifier_gives_features_and_logits_of_its_last_layer(tmp_path: Path) -> None:
    network = load_network("classifier", save_classifier(tmp_path / "c"))
    found = network(IMAGES)
    assert network.classes == CLASSES
    output = load_file(tmp_path / "c" / "model.safetensors")
    expected = found.features_ND @ output["output.weight"].numpy().T + output["output.bias"].numpy()
    assert found.logits_NC is not None
    np.testing.assert_allclose(found.logits_NC, expected, rtol=1e-4, atol=1e-6)


def test_load_network_squeezenet_is_identified_by_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {k.replace("layers.", "features."): v for k, v in SqueezeNet().state_dict().items()}
    save_file(weights, tmp_path / "s.safetensors")
    network = load_network("squeezenet", tmp_path / "s.safetensors")
    assert network(IMAGES).features_ND.shape == (3, 512)
    import hashlib

    assert network.sha256 == hashlib.sha256((tmp_path / "s.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("inception", None, "needs --network-weights: weights-inception-2015-12-05-6726825d.pth"),
        ("squeezenet", "nothing", "network weights nothing do not exist; needed: a safetensors file"),
        ("inceptoin", None, "unknown network 'inceptoin'; did you mean inception?"),
    ],
)
def test_load_network_refuses_missing_networks_and_weights_in_one_line(name: str, weights: str | None, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        load_network(name, weights)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "package", "hint"),
    [("inception", "torch_fidelity", "pip install 'continuar[inception]'"), ("dinov2", "transformers", "pip install transformers")],
)
def test_load_network_names_the_missing_package(
    name: str, package: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "w.pth").touch()
    with pytest.raises(UserError, match="needs") as refused:
        load_network(name, tmp_path / "w.pth")
    assert str(refused.value).endswith(hint)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "keys"])
def test_load_network_refuses_damaged_squeezenet_weights_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"features.0.weight": torch.zeros(4)}, path)
    if damage != "keys":
        path.write_bytes(path.read_bytes()[:20] if damage == "truncated" else b"PK\x03\x04 else")
    expected = "does not fit the model: missing" if damage == "keys" else "truncated or not a safetensors file"
    with pytest.raises(UserError, match=expected):
        load_network("squeezenet", path)


def test_load_network_inception_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, so it is not FID; features, logits without bias and spatial features agree with the weights, and other
    weights are one line."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        state = module.FeatureExtractorInceptionV3("i", ["2048"]).state_dict()
    torch.save(state, tmp_path / "w.pth")
    network = load_network("inception", tmp_path / "w.pth")
    before: list[torch.Tensor] = []
    network.module.get_submodule("network.Mixed_6c").register_forward_hook(lambda m, i, out: before.append(out))
    found = network(IMAGES)
    assert found.features_ND.shape == (3, 2048)
    assert found.logits_NC is not None
    np.testing.assert_allclose(found.logits_NC, found.features_ND @ state["fc.weight"].numpy().T, rtol=1e-3, atol=1e-4)
    # sFID's features: convolution, batch norm and ReLU written out; channels last, as ADM's suite flattens them.
    unit = {k.removeprefix("Mixed_6d.branch1x1."): v[:7] for k, v in state.items() if "Mixed_6d.branch1x1." in k and v.ndim}
    x = torch.einsum("bcyx,oc->byxo", before[0], unit["conv.weight"][:, :, 0, 0])
    x = (x - unit["bn.running_mean"]) / (unit["bn.running_var"] + 1e-3).sqrt()
    expected = (x * unit["bn.weight"] + unit["bn.bias"]).clamp_min(0)
    assert expected.shape == (3, 17, 17, 7)
    assert 0 < float((expected == 0).float().mean()) < 1
    assert found.spatial_NS is not None
    np.testing.assert_allclose(found.spatial_NS, expected.reshape(3, 2023).numpy(), rtol=1e-3, atol=1e-5)
    assert not network.is_fid
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "keys.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("cut", "keys", "text"):
        with pytest.raises(UserError, match="is truncated or not the Inception network's weights") as refused:
            load_network("inception", tmp_path / f"{name}.pth")
        assert "\n" not in str(refused.value)


def test_load_network_dinov2_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "d")
    network = load_network("dinov2", tmp_path / "d")
    assert network(IMAGES).features_ND.shape == (3, 8)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layer.0" not in k}, tmp_path / "d" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit the model: missing or of another shape: .*layer.0"):
        load_network("dinov2", tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="is a model of type 'vit'; allowed: dinov2"):
        load_network("dinov2", tmp_path / "d")


def test_pixels_are_colours_or_their_means_over_a_grid() -> None:
    network = load_network("pixels", None)
    small, large = (np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8) for side in (8, 32))
    found = network(small).features_ND.reshape(3, 3, 8, 8)
    np.testing.assert_allclose(found, small.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    means = large.reshape(3, 8, 4, 8, 4, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(network(large).features_ND.reshape(3, 3, 8, 8), means.transpose(0, 3, 1, 2), rtol=1e-5)
    with pytest.raises(UserError, match="the network 'pixels' has none"):
        load_network("pixels", "weights.safetensors")


@needs_weights
def test_squeezenet_takes_bgr_with_caffe_s_means() -> None:
    from safetensors.torch import load_file

    network = SqueezeNet.from_file(WEIGHTS)
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    seen = []
    network.layers[0].register_forward_hook(lambda m, i, o: seen.append(o))
    assert network(torch.from_numpy(image)).shape == (1, 512)
    weights = load_file(WEIGHTS)
    blue_first = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2).float()
    centred = blue_first - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    expected = F.conv2d(centred, weights["features.0.weight"], weights["features.0.bias"], stride=2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-2)


@needs_weights
@pytest.mark.skipif(not IMAGENETTE.exists(), reason="Imagenette is not beside the repository")
def test_squeezenet_features_tell_classes_apart() -> None:
    images = load_images(IMAGENETTE, size=128)
    features = extract(SqueezeNet.from_file(WEIGHTS), images.images[:260], batch_size=64)
    _, nearest = nearest_neighbours(features[200:], features[:200], k=5)
    votes = np.array([np.bincount(images.labels[row], minlength=10).argmax() for row in nearest])
    assert class_accuracy(votes, images.labels[200:260]) > 0.6


def test_squeezenet_refuses_other_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        SqueezeNet.from_file(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"missing: .*of another shape: layers.0.weight"):
        SqueezeNet.from_file(tmp_path / "other.safetensors")


def test_classifier_learns_colours_and_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.integers(0, 120, (96, 8, 8, 3), np.uint8)
    images[np.arange(96), :, :, labels] += 100
    # Not narrower: oneDNN of torch 2.13 hangs on some AMD CPUs in the gradient of a strided 1x1 convolution of 4 channels.
    network = Classifier(ClassifierConfig(("red", "green", "blue"), width=8, blocks=1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert class_accuracy(network.predict(images), labels) > 0.95
    network.save(tmp_path / "c")
    again = Classifier.load(tmp_path / "c")
    assert again.config == network.config
    assert np.array_equal(again.predict(images), network.predict(images))
    with pytest.raises(UserError, match="1 predictions for 2 labels"):
        class_accuracy(np.zeros(1), np.zeros(2))
