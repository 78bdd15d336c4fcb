"""`continuar edit` and `sample --animate` as a user meets them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from continuar.cli.main import main
from continuar.pipeline import Pipeline
from tests.cli.test_cli import refused
from tests.tiny import model_configs, pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(model_configs()[0]).save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image.png, 16x12 of noise; mask.png with a white rectangle; and files that are no good."""
    folder = tmp_path_factory.mktemp("drawn")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)).save(folder / "image.png")
    white = np.zeros((12, 16), np.uint8)
    white[4:8, 5:9] = 255
    Image.fromarray(white).save(folder / "mask.png")
    Image.fromarray(white[:, :15]).save(folder / "narrow.png")
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:200])
    return folder


def test_edit_writes_samples_that_differ_only_in_the_mask(model: Path, drawn: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ["--class", "bee", "--num-samples", "3", "--seed", "4", "--dilation", "0", "--steps", "3", "--batch-size", "2"]
    command = ["edit", str(model), str(drawn / "image.png"), "--mask", str(drawn / "mask.png"), *options, "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    assert "3 samples, 4 of 16 tokens generated" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"00000.png", "00001.png", "00002.png", "grid.png", "samples.json"}
    entries = json.loads((out / "samples.json").read_text())
    assert [(e["file"], e["seed"]) for e in entries] == [("00000.png", 4), ("00001.png", 5), ("00002.png", 6)]
    wanted = {
        "label": 1,
        "class_name": "bee",
        "dilation": 0,
        "tokens_generated": 4,
        "steps": 3,
        "guidance_scale": 2.0,
        "diffusion_steps": 6,
    }
    wanted |= {"image": str(drawn / "image.png"), "mask": str(drawn / "mask.png"), "model": str(model), "weights": "ema"}
    assert all(wanted.items() <= e.items() for e in entries)

    # 16x12 becomes 8x8: by bicubic to 11x8, then the centre. Outside the mask, each sample is that image to the bit.
    small = Image.open(drawn / "image.png").resize((11, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    samples = np.stack([np.asarray(Image.open(out / f"{i:05d}.png")) for i in range(3)])
    differs = (samples != np.asarray(small)).any(axis=(0, 3))
    rows, columns = np.nonzero(differs)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 2, 5)
    assert len({v.tobytes() for v in samples}) == 3


def test_edit_of_everything_is_a_generation_and_of_nothing_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / "image.png")
    for grey, code in ((0, 2), (255, 0)):
        Image.new("L", (8, 8), grey).save(tmp_path / "mask.png")
        options = ["--mask", str(tmp_path / "mask.png"), "--class", "2", "--seed", "9", "--num-samples", "1", "--device", "cpu"]
        assert main(["edit", str(model), str(tmp_path / "image.png"), *options, "--out", str(tmp_path / "out")]) == code
    assert "mask.png has no white within the picture; allowed: white where to generate" in capsys.readouterr().err
    expected = Pipeline.from_pretrained(model, device="cpu")([2], [9])[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "00000.png")), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image.png", "--mask", "narrow.png"], "narrow.png is 15x12 pixels; allowed: 16x12, the size of "),
        (["text.png", "--mask", "mask.png"], "text.png cannot be used: not an image of a known format"),
        (["cut.png", "--mask", "mask.png"], "cut.png cannot be used: unreadable"),
        (["image.png", "--mask", "text.png"], "text.png cannot be used: not an image of a known format"),
        (["nothing.png", "--mask", "mask.png"], "No such file or directory"),
        (["image.png", "--mask", "nothing.png"], "nothing.png"),
        (["image.png", "--mask", "mask.png", "--dilation", "-1"], "--dilation is -1; allowed: 0 or more rings of tokens"),
        (["image.png", "--mask", "mask.png", "--num-samples", "0"], "--num-samples is 0; allowed: 1 or more"),
        (["image.png", "--mask", "mask.png", "--class", "bea"], "unknown class 'bea'; did you mean bee?"),
        (["image.png", "--mask", "mask.png", "--class", "3"], "class is 3; allowed: 0 to 2"),
        (["image.png", "--mask", "mask.png", "--steps", "17"], "steps is 17; allowed: 1 to 16"),
        (["image.png", "--mask", "mask.png", "--batch-size", "0"], "--batch-size is 0; allowed: 1 or more"),
        (["image.png", "--mask", "mask.png", "--flow-steps", "3"], "an option that the diffusion head does not have"),
        (["image.png", "--mask", "mask.png", "--seed", str(2**63)], "seed is 9223372036854775808; allowed: -2^63 to 2^63-1"),
    ],
)
def test_edit_refuses_bad_input_and_writes_nothing(
    model: Path, drawn: Path, tmp_path: Path, arguments: list[str], expected: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(drawn)
    assert expected in refused(["edit", str(model), *arguments, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_edit_needs_a_mask(model: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["edit", str(model), "image.png"])
    assert stop.value.code == 2
    assert "--mask" in capsys.readouterr().err


def test_animate_shows_the_grid_assembling(model: Path, tmp_path: Path) -> None:
    options = ["--classes", "bee,ant", "--per-class", "2", "--seed", "7", "--batch-size", "3", "--device", "cpu"]
    for extra in ([], ["--animate"]):
        assert main(["sample", str(model), *options, *extra, "--out", str(tmp_path / f"out{len(extra)}")]) == 0
    plain, animated = tmp_path / "out0", tmp_path / "out1"
    assert {p.name for p in animated.iterdir()} == {p.name for p in plain.iterdir()} | {"grid.gif"}
    for file in plain.iterdir():
        assert (animated / file.name).read_bytes() == file.read_bytes()
    page = np.asarray(Image.open(plain / "grid.png")).astype(int)
    with Image.open(animated / "grid.gif") as gif:
        assert gif.n_frames == 5  # the model's steps
        grey = []
        for i in range(5):
            gif.seek(i)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            assert frame.shape == page.shape
            grey.append((np.abs(frame - 128).max(-1) <= 8).mean())
        assert grey == sorted(grey, reverse=True)
        assert grey[0] > 0.5
        assert np.abs(frame - page).mean() < 8
