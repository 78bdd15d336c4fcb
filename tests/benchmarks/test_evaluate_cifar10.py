"""The script that measures the shipped model: its numbers are the library's, and its keys what a slice prints and decides by."""

import json
import sys
from pathlib import Path

import evaluate_cifar10
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import continuar
from continuar.data.loader import load_images
from continuar.errors import UserError
from continuar.evaluation.metrics import class_accuracy, frechet_distance
from continuar.evaluation.networks import Classifier, ClassifierConfig, SqueezeNet, extract
from continuar.pipeline import shipped_models
from continuar.statistics import moments
from tests.tiny import write_images

pytestmark = pytest.mark.skipif("cifar10" not in shipped_models(), reason="no model is shipped")


def measure(place: Path, out: Path, *more: str) -> dict:
    words = ["evaluate_cifar10.py", "cifar10", "--train", str(place / "data"), "--test", str(place / "data"), "--out", str(out)]
    words += ["--squeezenet", str(place / "s.safetensors"), "--classifier", str(place / "classifier"), "--device", "cpu"]
    words += ["--samples", "20", "--steps", "1", "--diffusion-steps", "2", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        evaluate_cifar10.main()
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of images, and networks with random weights."""
    root = tmp_path_factory.mktemp("evaluate_cifar10")
    classes = continuar.load("cifar10", device="cpu").classes
    write_images(root / "data", per_class=3, classes=classes, size=32)
    torch.manual_seed(0)
    save_file({k.replace("layers.", "features."): v for k, v in SqueezeNet().state_dict().items()}, root / "s.safetensors")
    Classifier(ClassifierConfig(classes, width=2, blocks=1)).save(root / "classifier")
    return root


def test_evaluate_cifar10_rows_hold_the_scores_of_each_guidance(place: Path, tmp_path: Path) -> None:
    found = measure(place, tmp_path, "--guidance-scale", "1", "4", "--batch-size", "8", "--engine", "eager")
    assert [row["guidance_scale"] for row in found["rows"]] == [1, 4]
    network, classifier = SqueezeNet.from_file(place / "s.safetensors"), Classifier.load(place / "classifier")
    real, labels = load_images(place / "data", size=32), np.arange(20) % 10
    pipe = continuar.load("cifar10", device="cpu")
    images = pipe(labels.tolist(), 0, guidance_scale=4.0, steps=1, diffusion_steps=2, batch_size=8, engine="eager")
    expected = frechet_distance(moments(extract(network, images)), moments(extract(network, real.images)))
    row = found["rows"][1]
    assert row["squeezenet_frechet_distance"] == pytest.approx(expected, rel=1e-2)  # the last batch rounds otherwise, by 1/255
    assert row["class_accuracy"] == pytest.approx(class_accuracy(classifier.predict(images), labels), abs=0.051)
    assert {"steps": 1, "diffusion_steps": 2, "engine": "eager", "precision": "float32", "samples": 20}.items() <= row.items()
    assert {"squeezenet_precision", "squeezenet_recall", "squeezenet_kernel_distance"} <= set(row)
    for name, columns in (("grid", 2), ("neighbours", 5)):
        assert Image.open(tmp_path / f"{name}.png").width == columns * 68 + 4
    # What reads it.


def test_evaluate_cifar10_passes_precision_on_and_refuses_as_the_library(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision is 'bfloat16' with the eager engine"):
        measure(place, tmp_path, "--engine", "eager", "--precision", "bfloat16")
    with pytest.raises(SystemExit):
        measure(place, tmp_path, "--batch-size", "0")
