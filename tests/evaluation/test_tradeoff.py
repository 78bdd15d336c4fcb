"""Figure 6: every model has the curve of its kind, every point a quality and a time, and an interrupted comparison continues."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from continuar.checkpoints.store import PipelineConfig
from continuar.cli.main import main
from continuar.heads import DiffusionOptions
from continuar.models.dit import DiTConfig, DiTNetworkConfig
from continuar.pipeline import Pipeline
from continuar.sampling.options import SamplingOptions
from tests.evaluation.tiny_networks import CLASSES, save_classifier, save_model
from tests.tiny import TOKENIZER, model_configs, pipeline, write_images

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("matplotlib", reason="the extra [metrics] is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tradeoff")
    save_model(root / "mar")
    found = (c for c in model_configs() if (c.order.kind, c.backbone.kind, c.head.kind) == ("raster", "causal", "flow"))
    pipeline(next(found)).save_pretrained(root / "ar")
    config = DiTConfig(TOKENIZER.spec, 3, DiTNetworkConfig(width=16, depth=1, heads=2, prediction="v_prediction"))
    torch.manual_seed(0)
    file = PipelineConfig(config, TOKENIZER, CLASSES, SamplingOptions(head=DiffusionOptions(diffusion_steps=2)))
    Pipeline(file, config.build()).save_pretrained(root / "dit")
    save_classifier(root / "classifier0")
    write_images(root / "data", per_class=4, classes=CLASSES)
    return root


def command(place: Path, out: Path, models: list[str], *over: str) -> list[str]:
    network = ["--network", "classifier", "--network-weights", str(place / "classifier0"), "--device", "cpu"]
    fixed = ["--reference", str(place / "data"), "--images", "12", "--batch-size", "6", "--out", str(out)]
    return ["sweep", *(str(place / name) for name in models), *network, *fixed, "--over", "figure6", *over]


def test_tradeoff_gives_every_model_its_curve_and_continues(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, over = tmp_path / "out", ["steps=1,3", "diffusion-steps=2,5"]
    assert main(command(place, out, ["mar"], *over)) == 0  # as if interrupted
    first = {p: p.read_bytes() for p in (out / "points").glob("*/*.json")}
    assert len(first) == 6  # job, result and speed of two points
    assert main(command(place, out, ["mar", "ar", "dit"], *over)) == 0
    assert {p: p.read_bytes() for p in first} == first
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(Path(r["model"]).name, r["setting"], r["value"]) for r in rows] == [
        ("mar", "steps", "1"),
        ("mar", "steps", "3"),
        ("ar", "tokens, one per step", "16"),
        ("dit", "diffusion_steps", "2"),
        ("dit", "diffusion_steps", "5"),
    ]
    results = [json.loads(p.read_text()) for p in (out / "points").glob("*/result.json")]
    distances = {r["scores"]["frechet_distance"] for r in results}
    assert {float(row["frechet_distance"]) for row in rows} == distances
    assert len(distances) == 5
    speeds = [json.loads(p.read_text()) for p in (out / "points").glob("*/speed.json")]
    assert {float(row["seconds_per_image"]) for row in rows} == {s["seconds_per_image"] for s in speeds}
    assert all(len(s["repeats"]) == 3 and s["batch_size"] == 6 and s["seconds_per_image"] > 0 for s in speeds)
    settings = {(r["samples"]["settings"]["steps"], r["samples"]["settings"].get("diffusion_steps")) for r in results}
    assert {(None, 2), (None, 5)} <= settings
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert "| model | setting | value | Frechet distance (classifier) |" in (out / "table.md").read_text()
    assert "ms/image" in (out / "table.md").read_text()
    assert Image.open(out / "plot.png").size[0] > 600
    assert (out / "plot.svg").is_file()


def test_curve_has_the_values_of_the_paper_up_to_the_number_of_tokens(place: Path, tmp_path: Path) -> None:
    from continuar.evaluation.sweep import curve
    from continuar.pipeline import load

    curves = {name: curve(load(place / name, device="cpu"), {}) for name in ("mar", "ar", "dit")}
    assert curves["mar"] == [("steps", 8), ("steps", 16)]
    assert curves["ar"] == [("tokens, one per step", 16)]
    assert curves["dit"] == [("diffusion_steps", steps) for steps in (50, 75, 150, 250)]


@pytest.mark.parametrize(
    ("models", "over", "more", "expected"),
    [
        (["mar", "mar"], [], [], "a model is given twice"),
        (["mar"], ["temperature=1,2"], [], "temperature is swept with figure6; allowed with it: steps of autoregressive models"),
        (["mar"], ["steps=2"], ["--steps", "3"], "steps is both swept and set"),
        (["mar"], ["steps=17"], [], "at steps 17: steps is 17; allowed: 1 to 16"),
        ([], [], [], "0 models are given; allowed: one, or several for --over figure6"),
    ],
)
def test_tradeoff_refuses_bad_comparisons_in_one_line(
    place: Path, tmp_path: Path, models: list[str], over: list[str], more: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([*command(place, tmp_path / "out", models, *over), *more]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_sweep_takes_one_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = command(place, tmp_path / "out", ["mar", "dit"])
    assert main([*arguments[: arguments.index("figure6")], "steps=1"]) == 2
    assert "2 models are given; allowed: one, or several for --over figure6" in capsys.readouterr().err
