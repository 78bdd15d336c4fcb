"""The command line as a user meets it: what is written, and one clear line for every mistake."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from continuar.cli.main import main
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.recipes import RECIPES
from tests.tiny import model_configs, model_file, shaken, write_images

TINY = [
    *("--backbone.width", "16", "--backbone.heads", "2", "--backbone.encoder-depth", "1", "--backbone.decoder-depth", "1"),
    *("--head.width", "16", "--train.images", "32", "--train.batch-size", "8", "--tokenizer.image-size", "8"),
    *("--sampling.steps", "2", "--sampling.head.diffusion-steps", "2", "--device", "cpu"),
]
"""Options of recipe `folder` for a run of four steps."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_configs()[0]
    return Pipeline(model_file(config), shaken(config)).save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a command that must fail; returns its only line on stderr."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("continuar: error: ")
    return lines[0]


def test_help_does_not_import_torch() -> None:
    script = "import sys; from continuar.cli.main import main; code = main(['--help']); sys.exit(code or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("train", "sample", "convert"):
        assert command in done.stdout


def test_version_and_command_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    for command in ("sample", "convert"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"continuar {command}" in capsys.readouterr().out


def test_list_names_every_recipe(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("digits", ["tokens per image  16 (4 x 4) of dim 4", "FLOPs per image"]),
        ("mar_b_imagenet256", ["parameters        207.92M", "tokens per image  256 (16 x 16) of dim 16"]),
        ("mar_l_imagenet256_ablation", ["head 20.26M", "training 618 GFLOP", "generation 27.1 TFLOP"]),
    ],
)
def test_dry_run_says_what_a_recipe_costs(recipe: str, expected: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["train", recipe, "--dry-run", "--optim.lr", "0.25"]) == 0
    out = capsys.readouterr().out
    assert '"lr": 0.25' in out
    assert [line for line in expected if line not in out] == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_model_config(name: str) -> None:
    run = RECIPES[name]()
    assert run.model_config(run.data.classes or 2).tokens == run.tokenizer.spec


def test_sample_writes_images_grid_and_settings(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--classes",
        "bee,0",
        "--per-class",
        "2",
        "--seed",
        "7",
        "--guidance-scale",
        "1.5",
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    assert main(["sample", str(model), *options, "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {*(f"{i:05d}.png" for i in range(4)), "grid.png", "samples.json"}
    entries = json.loads((out / "samples.json").read_text())
    assert [(e["file"], e["label"], e["class_name"], e["seed"]) for e in entries] == [
        ("00000.png", 1, "bee", 7),
        ("00001.png", 1, "bee", 8),
        ("00002.png", 0, "ant", 9),
        ("00003.png", 0, "ant", 10),
    ]
    assert all(e["guidance_scale"] == 1.5 and e["steps"] == 5 and e["diffusion_steps"] == 6 for e in entries)
    image = np.asarray(Image.open(out / "00002.png"))
    expected = Pipeline.from_pretrained(model, device="cpu")(["ant"], [9], guidance_scale=1.5)[0]
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "bea"], "unknown class 'bea'; did you mean bee?"),
        (["--classes", "3"], "class is 3; allowed: 0 to 2"),
        (["--classes", "-1"], "class is -1; allowed: 0 to 2"),
        (["--steps", "17"], "steps is 17; allowed: 1 to 16"),
        (["--steps", "0"], "steps is 0; allowed: 1"),
        (["--diffusion-steps", "0"], "diffusion steps is 0; allowed: 1 to 1000"),
        (["--diffusion-steps", "1001"], "diffusion steps is 1001; allowed: 1 to 1000"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0; allowed: 0 or more"),
        (["--guidance", "nan"], "guidance_scale is nan; allowed: 0 or more"),
        (["--temperature", "nan"], "temperature is nan; allowed: 0 or more"),
        (["--temperature", "-0.5"], "temperature is -0.5; allowed: 0 or more"),
        (["--sampler", "ddim", "--temperature", "0.9"], "temperature is 0.9 with the sampler 'ddim'"),
        (["--sampler", "dpmpp_2m", "--diffusion-steps", "990"], "diffusion steps is 990; allowed: 1 to 980"),
        (["--per-class", "0"], "--per-class is 0; allowed: 1 or more"),
        (["--batch-size", "0"], "--batch-size is 0; allowed: 1 or more"),
        (["--animate", "--seed", str(2**63)], "seed is 9223372036854775808; allowed: -2^63 to 2^63-1"),
        (["--device", "tpu"], "device is 'tpu'; allowed: auto, cpu"),
    ],
)
def test_sample_refuses_bad_values_and_writes_nothing(
    model: Path, tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert expected in refused(["sample", str(model), *arguments, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_sample_refuses_an_output_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("kept")
    assert "file" in refused(["sample", str(model), "--out", str(tmp_path / "file")], capsys)
    assert "file" in refused(["sample", str(model), "--out", str(tmp_path / "file" / "below")], capsys)
    assert (tmp_path / "file").read_text() == "kept"


def test_sample_refuses_missing_and_damaged_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def broken(name: str, content: bytes, file: str = "model.safetensors") -> str:
        copy = tmp_path / name
        copy.mkdir()
        for source in model.iterdir():
            (copy / source.name).write_bytes(source.read_bytes())
        (copy / file).write_bytes(content)
        return refused(["sample", str(copy), "--out", str(tmp_path / "out")], capsys)

    weights = (model / "model.safetensors").read_bytes()
    assert "unknown model" in refused(["sample", str(tmp_path / "nothing")], capsys)
    assert "did you mean" in refused(["sample", str(model.parent / "tinny")], capsys)
    assert "neither a saved model nor a run" in refused(["sample", str(tmp_path)], capsys)
    assert "convert" in refused(["sample", str(model / "config.json")], capsys)
    assert "truncated or not a safetensors file" in broken("empty", b"")
    assert "truncated or not a safetensors file" in broken("truncated", weights[:-50])
    assert "truncated or not a safetensors file" in broken("foreign", b"PK\x03\x04 something else")
    assert "not valid JSON" in broken("json", b"{", "config.json")
    assert "not the config of a saved model" in broken("other", b'{"a": 1}', "config.json")
    config = json.loads((model / "config.json").read_text())
    config["model"]["backbone"]["kind"] = "mea"
    assert "backbone 'mea'; did you mean mae?" in broken("kind", json.dumps(config).encode(), "config.json")
    config["model"]["backbone"] |= {"kind": "mae", "width": 64}
    line = broken("shapes", json.dumps(config).encode(), "config.json")
    assert "does not fit the model: of another shape: " in line
    assert "token_embedding.weight (32, 12) instead of (64, 12)" in line or "in all)" in line
    assert not (tmp_path / "out").exists()


def test_commands_and_recipes_suggest_the_nearest_name(capsys: pytest.CaptureFixture) -> None:
    assert "did you mean train?" in refused(["trian"], capsys)
    assert "did you mean digits" in refused(["train", "digit"], capsys)
    assert "the recipe comes first" in refused(["train", "--optim.lr", "1"], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits", "--tokenizer.patch", "3"], "image size 8 is not divisible by the patch 3; allowed patches: 1, 2, 4, 8"),
        (["digits", "--optim.lr", "-1"], "optim.lr is -1.0; allowed: above 0"),
        (["digits", "--tokenizer.image-size", "16"], "image size is 16; the digits are 8x8"),
        (["folder"], "data.path is empty"),
        (["folder", "--data.path", "/nonexistent"], "data path /nonexistent does not exist"),
        (["mar_b_imagenet256"], "training on latents"),
        (["digits", "--train.engine", "graphs", "--device", "cpu"], "a cpu device does not have; allowed: eager, compile"),
    ],
)
def test_train_refuses_bad_values_and_writes_nothing(
    tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("sklearn")
    assert expected in refused(["train", *arguments, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_train_refuses_an_output_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("kept")
    assert "file is a file; allowed: a directory" in refused(["train", "digits", "--out", str(tmp_path / "file" / "run")], capsys)


def test_train_refuses_folders_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--tokenizer.image-size", "8", "--sampling.steps", "4", "--out", str(tmp_path / "run")]
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused(["train", "folder", "--data.path", str(tmp_path / "empty"), *options], capsys)
    data = write_images(tmp_path / "data")
    for i in range(4):
        (data / "ant" / f"broken{i}.png").write_bytes(b"not an image")
    assert main(["train", "folder", "--data.path", str(data), *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bar of reading
    assert "4 of 16 images cannot be used (25.0%; allowed: 1.0%)" in line
    assert "broken0.png" in line
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback() -> None:
    from continuar.errors import UserError

    with pytest.raises(UserError, match="unknown command"):
        main(["trian", "--debug"])


def test_a_time_limit_ends_a_run_cleanly_and_resume_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, out = write_images(tmp_path / "data"), tmp_path / "run"
    command = ["train", "folder", "--data.path", str(data), *TINY, "--out", str(out)]
    ticks = itertools.count(0, 40)  # seconds: asked once before the first step, then after each
    monkeypatch.setattr("continuar.cli.train.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert main([*command, "--max-minutes", "1"]) == 0
    assert "stopped after 1 minutes at step 2 of 4" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in newest_checkpoints(out)] == ["step-00000002"]
    # Another limit is not another config.
    assert main([*command, "--max-minutes", "60", "--resume"]) == 0
    assert "trained: " in capsys.readouterr().out
    assert newest_checkpoints(out)[0].name == "step-00000004"
    assert "--max-minutes is -1.0; allowed: 0 or more" in refused([*command, "--max-minutes", "-1"], capsys)


def test_a_tiny_run_trains_and_samples_from_the_command_line(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data")
    assert main(["train", "folder", "--data.path", str(data), *TINY, "--out", str(tmp_path / "run")]) == 0
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        assert main(["sample", str(tmp_path / "run"), "--weights", weights, "--per-class", "1", "--out", str(out)]) == 0
        assert (out / "00001.png").is_file()
