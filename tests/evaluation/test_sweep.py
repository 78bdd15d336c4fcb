"""Sweeps evaluate every point once, continue, and write tables and plots that hold what the evaluations found."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from continuar.cli.main import main
from continuar.errors import UserError
from continuar.evaluation.sweep import SWEEPS, Axis, parse_axes, points
from tests.evaluation.tiny_networks import save_classifier, save_model
from tests.tiny import write_images


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    save_model(root / "model")
    save_classifier(root / "classifier0")
    write_images(root / "data", per_class=4, classes=("ant", "bee", "cat"))
    return root


def command(place: Path, out: Path, *over: str) -> list[str]:
    network = ["--network", "classifier", "--network-weights", str(place / "classifier0"), "--device", "cpu"]
    fixed = ["--reference", str(place / "data"), "--images", "12", "--batch-size", "6", "--diffusion-steps", "4"]
    return ["sweep", str(place / "model"), *network, *fixed, "--out", str(out), "--over", *over]


def test_parse_axes_reads_and_points_multiplies() -> None:
    axes = parse_axes(["steps=1, 2", "weights=ema,raw"])
    assert axes == (Axis("steps", (1, 2)), Axis("weights", ("ema", "raw")))
    expected = [(s, w) for s in (1, 2) for w in ("ema", "raw")]
    assert [tuple(p.values()) for p in points(axes)] == expected
    assert parse_axes(["figure4"]) == (SWEEPS["figure4"],)
    assert parse_axes(["top-p=0.5,1", "solver=heun"]) == (Axis("top_p", (0.5, 1.0)), Axis("solver", ("heun",)))
    assert parse_axes(["diffusion-steps=3", "figure5"]) == (Axis("diffusion_steps", (3,)), SWEEPS["figure5"])


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ([], "no axis is given; allowed: figure4, figure5, figure6, or NAME=A,B,... of steps"),
        (["figure7"], "unknown sweep 'figure7'; did you mean figure"),
        (["setps=1"], "unknown axis 'setps'; did you mean steps?"),
        (["steps="], "the axis steps has no values"),
        (["steps=1,1"], "the axis steps has a value twice: 1, 1"),
        (["steps=1,x"], "the axis steps has the values '1,x'; allowed: ints, separated by commas"),
        (["temperature=1", "figure5"], "an axis is given twice: temperature, temperature"),
        (["weights=ema,new"], "weights is 'ema, new'; allowed: ema, raw"),
    ],
)
def test_parse_axes_refuses_bad_axes_in_one_line(over: list[str], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_axes(over)
    assert expected in str(refused.value)


def test_sweep_continues_and_its_tables_hold_the_results(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    out, over = tmp_path / "out", ["steps=1,2", "temperature=0.5,1"]
    assert main(command(place, out, "steps=1", "temperature=0.5,1")) == 0  # as if interrupted: half of it
    first = {p.name: (p / "result.json").read_bytes() for p in (out / "points").iterdir()}
    assert main(command(place, out, *over)) == 0
    again = {p.name: (p / "result.json").read_bytes() for p in (out / "points").iterdir()}
    assert set(first) == {"steps-1_temperature-0.5", "steps-1_temperature-1.0"}
    assert {name: again[name] for name in first} == first
    assert len(again) == 4
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["steps"], r["temperature"]) for r in rows] == [("1", "0.5"), ("1", "1.0"), ("2", "0.5"), ("2", "1.0")]
    for row in rows:
        found = json.loads(again[f"steps-{row['steps']}_temperature-{row['temperature']}"])
        assert float(row["frechet_distance"]) == found["scores"]["frechet_distance"]
        asked = {"diffusion_steps": 4, "steps": int(row["steps"]), "temperature": float(row["temperature"])}
        asked |= {"engine": "fast", "precision": "float32"}
        assert asked.items() <= found["samples"]["settings"].items()
    assert len({row["frechet_distance"] for row in rows}) == 4
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed
    assert "| steps | temperature | Frechet distance (classifier) |" in printed
    assert Image.open(out / "plot.png").size[0] > 600
    drawn = (out / "plot.svg").read_text()
    for words in (
        "Frechet distance (classifier)",
        "lower is better",
        "12 images per point, held against 12 of data",
        "engine fast",
    ):
        assert words in drawn
    assert "steps 1" not in drawn  # what is swept is no common setting


def test_sweep_draws_the_same_picture_and_is_not_continued_by_another_engine(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    over = ["sampler=ddpm,ddim"]
    for name in ("a", "b"):
        assert main(command(place, tmp_path / name, *over)) == 0
    assert main([*command(place, tmp_path / "a", *over), "--engine", "eager"]) == 2
    assert 'settings.engine: "fast" -> "eager"' in capsys.readouterr().err
    for file in ("plot.svg", "plot.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("over", "more", "expected"),
    [
        (["steps=1,17"], ["--images", "10"], "images is 10, which 3 classes do not divide; take 9 or 12"),
        (["steps=1,17"], [], "at steps 17: steps is 17; allowed: 1 to 16"),
        (
            ["temperature=1,0.9", "sampler=ddpm,ddim"],
            [],
            "at temperature 0.9, sampler ddim: temperature is 0.9 with",
        ),
        (["flow-steps=3"], [], "at flow steps 3: flow_steps is 3, an option that the diffusion head does not have"),
        (["steps=1"], ["--steps", "2"], "steps is both swept and set; allowed: one of them"),
        (["steps=1"], ["--reference", ""], "--reference is missing"),
        (["steps=1"], ["--engine", "eager", "--precision", "bfloat16"], "precision is 'bfloat16' with the eager engine"),
    ],
)
def test_sweep_refuses_bad_input(
    place: Path, tmp_path: Path, over: list[str], more: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    assert main([*command(place, tmp_path / "out", *over), *more]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    assert main(command(place, tmp_path / "full", "steps=1")) == 2
    assert "is not an empty directory, nor a sweep's" in capsys.readouterr().err
