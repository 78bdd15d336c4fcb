"""`continuar tokenizer train` and `evaluate`, from recipe to a cache of latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from continuar.cli.main import main
from continuar.data.latent_cache import LatentCache
from continuar.evaluation.networks import SqueezeNet
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from tests.tiny import write_images
from tests.training.tiny_tokenizers import tiny_run


@pytest.fixture
def squeezenet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "squeezenet.safetensors"
    save_file({k.removeprefix("layers."): v for k, v in SqueezeNet().state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_recipe_trains_a_tokenizer_that_is_evaluated_and_caches(
    kind: str, tmp_path: Path, squeezenet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = write_images(tmp_path / "data", size=16)
    run = tiny_run("", kind)
    run = replace(run, tokenizer=replace(run.tokenizer, image_size=16), train=replace(run.train, images=16))
    monkeypatch.setitem(TOKENIZER_RECIPES, "tiny", lambda: run)
    monkeypatch.chdir(tmp_path)
    perceptual = ["--loss.perceptual", "squeezenet", "--loss.perceptual-weights", str(squeezenet)]
    assert main(["tokenizer", "train", "tiny", "--data.path", str(root), "--device", "cpu", *perceptual]) == 0
    assert "trained: runs/tiny/tokenizer" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])["perceptual"] > 0
    evaluate = ["tokenizer", "evaluate", "runs/tiny", str(root), "--split", "train", "--device", "cpu", "--batch-size", "5"]
    assert main([*evaluate, "--squeezenet", str(squeezenet), "--out", "results"]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["images"] == 12
    assert 3 < results["psnr"] < 40
    assert -1 < results["ssim"] < 1
    assert results["squeezenet_frechet_distance"] > 0
    assert (results["codes_used"] is None) == (kind == "kl")
    assert np.asarray(Image.open(tmp_path / "results" / "reconstructions.png")).shape[0] > 32
    assert main(["cache", str(root), "runs/tiny", "latents", "--device", "cpu"]) == 0
    assert main(["cache", "check", "latents", "--device", "cpu"]) == 0
    assert LatentCache(tmp_path / "latents").info.tokenizer == str(tmp_path / "runs/tiny/tokenizer")
    assert main([*evaluate, "--images", "4"]) == 0
    assert "squeezenet" not in capsys.readouterr().out.split("rows")[-1]


def test_help_list_and_dry_run(capsys: pytest.CaptureFixture) -> None:
    assert main(["tokenizer"]) == 0
    assert main(["tokenizer", "train"]) == 0
    assert main(["tokenizer", "train", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TOKENIZER_RECIPES)
    assert main(["tokenizer", "train", "vq_cifar10", "--dry-run", "--optim.lr", "0.25"]) == 0
    out = capsys.readouterr().out
    assert '"lr": 0.25' in out
    assert "tokens per image  64 (8 x 8) of 1024 ids" in out
    for command in ("train kl_cifar10", "stats", "evaluate", "save"):
        with pytest.raises(SystemExit) as stop:
            main(["tokenizer", *command.split(), "--help"])
        assert stop.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "kl_cifar"], "unknown tokenizer recipe 'kl_cifar'; did you mean kl_cifar10"),
        (["train", "--images", "3"], "the recipe comes first, not '--images'"),
        (["train", "kl_cifar10", "--out", "OUT"], "whose weights you supply: --loss.perceptual-weights FILE"),
        (["train", "kl_cifar10", "--loss.perceptual", "off", "--out", "OUT"], "data.path is empty"),
        (["train", "kl_cifar10", "--tokenizer.image-size", "30"], "image size 30 is not divisible by stride x patch = 4 x 1"),
        (["train", "kl_cifar10", "--discriminator.weight", "-1"], "discriminator.weight is -1.0; allowed: 0 or more"),
        (["evaluate", "nothing", "nothing"], "nothing does not exist; allowed: a directory of an autoencoder"),
        (["evaluate", "nothing", "nothing", "--images", "1"], "--images is 1; allowed: 2 or more"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["tokenizer", *(str(out) if a == "OUT" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
