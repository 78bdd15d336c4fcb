"""What a run shows of itself: losses by time and by masked share, samples, trackers."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from continuar.distributed import SingleProcess
from continuar.errors import UserError
from continuar.heads import DiffusionHead, FlowHeadConfig, RegressionHeadConfig
from continuar.tensors import add_loss_by_quarter
from continuar.training.step import Meter
from continuar.training.trainer import train
from tests.tiny import tiny_run, write_images

CPU = torch.device("cpu")


def parts(meter: Meter, group: str) -> dict[str, float]:
    """The meter's means of one group, by what stands behind its name."""
    return {name.split("/")[1]: value for name, value in meter.read().means.items() if name.startswith(group)}


@pytest.mark.parametrize("head", [DiffusionHead(5, 7, 16, 1), FlowHeadConfig(16, 1).build(5, 7)])
def test_losses_by_time_are_parts_of_the_loss(head: Any) -> None:
    torch.manual_seed(0)
    meter = Meter(CPU, SingleProcess(), head)
    losses = [head(torch.randn(300, 7), torch.randn(300, 5)) for _ in range(3)]
    sums, counts = head.time_losses.clone()
    assert counts.sum() == 3 * 300 * head.diffusion_batch_mul
    assert ((counts / counts.sum() - 0.25).abs() < 0.05).all()
    torch.testing.assert_close(sums.sum() / counts.sum(), torch.stack(losses).mean())
    found = parts(meter, "loss_by_time")
    assert list(found) == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    torch.testing.assert_close(torch.tensor(list(found.values())), sums / counts)
    assert parts(meter, "loss_by_time") == {}


def test_times_are_sorted_into_their_quarters_and_what_is_no_number_counts_as_nothing() -> None:
    head = DiffusionHead(5, 7, 16, 1)
    add_loss_by_quarter(head.time_losses, torch.tensor([0.1]), torch.tensor([1.0]))  # nobody watches
    assert head.time_losses is None
    meter = Meter(CPU, SingleProcess(), head)
    time = torch.tensor([[0.0, 0.2499, 0.25], [0.5, 0.999, 0.75]])
    add_loss_by_quarter(head.time_losses, time, torch.tensor([[1.0, 3.0, 5.0], [7.0, torch.nan, 4.0]]))
    assert parts(meter, "loss_by_time") == {"0.00-0.25": 2.0, "0.25-0.50": 5.0, "0.50-0.75": 7.0, "0.75-1.00": 2.0}


def test_heads_without_times_and_steps_without_loss_show_none() -> None:
    head = RegressionHeadConfig(16, 1).build(5, 7)
    meter = Meter(CPU, SingleProcess(), head)
    head(torch.randn(3, 7), torch.randn(3, 5))
    one, good, bad = torch.tensor(1.0), torch.tensor(False), torch.tensor(True)
    for loss, flag, masked in ((2.0, good, 7), (4.0, good, 7), (torch.nan, bad, 7), (8.0, good, 10), (torch.inf, bad, 9)):
        meter.add(flag, {"loss": torch.tensor(loss), "norm": one}, {f"loss_by_masked/{masked}": torch.tensor(loss)})
    averages = meter.read()
    assert averages.means == {"loss": pytest.approx(14 / 3), "norm": 1.0, "loss_by_masked/7": 3.0, "loss_by_masked/10": 8.0}
    assert (averages.steps, averages.skipped, averages.bad_in_a_row) == (5, 2, 1)
    assert meter.read().means == {}
    meter.add(bad, {"loss": one})
    assert math.isnan(meter.read().means["loss"])


def test_metrics_tell_time_left_parts_of_the_loss_and_the_largest_sample(tmp_path: Path) -> None:
    run = tiny_run(write_images(tmp_path / "data"), sample_images=32)
    train(run, tmp_path / "run", device=CPU)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["seconds_left"] == pytest.approx((6 - line["step"]) * 8 / line["images_per_second"])
        assert len([name for name in line if name.startswith("loss_by_time/")]) == 4
        masked = [float(name.split("/")[1]) for name in line if name.startswith("loss_by_masked/")]
        assert masked
        assert all(0.7 <= share <= 1 for share in masked)
    assert ["sample_max/ema" in line and line["sample_max/raw"] > 0 for line in lines] == [False, True, True]


class Recorder:
    """Stands for either library: what is called, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **values: Any) -> "Recorder":
        self.calls.append(("init", values))
        return self

    def log(self, metrics: dict, step: int) -> None:
        self.calls.append(("log", (step, metrics["loss"])))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_asked_for_gets_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    recorder = Recorder()
    module = SimpleNamespace(init=recorder.init, __spec__=object())
    monkeypatch.setitem(sys.modules, name, module)
    train(tiny_run(write_images(tmp_path / "data")), tmp_path / "mine", device=CPU, track=name)
    assert [call for call, _ in recorder.calls] == ["init", "log", "log", "log", "finish"]
    values = recorder.calls[0][1]
    assert (values["project"], values["name"], values["resume"]) == ("continuar", "mine", "allow")
    assert values["config"]["train"]["batch_size"] == 8
    assert ("id" in values) == (name == "wandb")
    assert [value[0] for call, value in recorder.calls if call == "log"] == [2, 4, 6]


def test_a_tracker_that_is_not_there_is_refused_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continuar.training.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track trackio needs a package: pip install trackio"):
        train(tiny_run(tmp_path), tmp_path / "run", device=CPU, track="trackio")
    assert not (tmp_path / "run").exists()
