"""``continuar bench sample``."""

from pathlib import Path

import pytest

from continuar.cli.main import main
from continuar.pipeline import Pipeline
from tests.tiny import model_configs, model_file, shaken


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_configs()[0]
    return Pipeline(model_file(config), shaken(config)).save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_bench_sample_prints_a_row_per_batch(saved: Path, engine: str, capsys: pytest.CaptureFixture) -> None:
    command = ["bench", "sample", str(saved), "--batch", "1", "3", "--steps", "2", "--diffusion-steps", "3", "--engine", engine]
    assert main([*command, "--device", "cpu"]) == 0
    *_, header, one, three = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["batch", "s/image", "images/s", "x"]
    for batch, row in ((1, one), (3, three)):
        cells = row.split()
        assert int(cells[0]) == batch
        assert float(cells[1]) > 0
        assert (cells[4] == "-") == (engine == "eager")
        if engine == "fast":
            assert 0 < sum(int(cell.rstrip("%")) for cell in cells[4:7]) <= 102


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampel", "cifar10"], "did you mean sample"),
        (["sample", "no_such_model"], "no_such_model"),
        (["sample", "{saved}", "--batch", "0"], "--batch is 0; allowed: 1 or more"),
        (["sample", "{saved}", "--repeats", "0"], "--repeats is 0; allowed: 1 or more"),
        (["sample", "{saved}", "--steps", "17"], "steps is 17; allowed: 1 to 16"),
        (["sample", "{saved}", "--tokenizer", "x"], "--tokenizer is x, but"),
        (["sample", "{saved}", "--engine", "eager", "--precision", "bfloat16"], "precision is 'bfloat16' with the eager engine"),
    ],
)
def test_bench_refuses(saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *(a.replace("{saved}", str(saved)) for a in arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
