"""Averages of a length chosen afterwards: closed forms, and against averages that were followed all along."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.cli.main import main
from continuar.distributed import SingleProcess
from continuar.errors import UserError
from continuar.pipeline import Pipeline
from continuar.training.config import EMAConfig
from continuar.training.power_ema import PowerAverages, combination, drop_after, exponent, inner_product, reconstruct
from continuar.training.trainer import train
from tests.tiny import model_configs, shaken, tiny_run, write_images


@given(st.floats(0.01, 0.27))
def test_exponent_gives_a_profile_of_that_standard_deviation(length: float) -> None:
    gamma = exponent(length)
    # Moments of p(x) = (gamma + 1) x^gamma on [0, 1].
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(length, rel=1e-6)


def test_exponents_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@given(st.floats(1, 100), st.floats(1, 20), st.floats(1, 100), st.floats(1, 20))
def test_inner_product_is_the_integral(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> None:
    x, weight = np.polynomial.legendre.leggauss(60)  # exact for smooth integrands
    tau = (x + 1) / 2 * min(t_a, t_b)
    p = [(g + 1) * (tau / t) ** g / t for t, g in ((t_a, gamma_a), (t_b, gamma_b))]
    integral = float((weight * p[0] * p[1]).sum() * min(t_a, t_b) / 2)
    assert float(inner_product(t_a, gamma_a, t_b, gamma_b)) == pytest.approx(integral, rel=1e-6)


class Walk:
    """A model whose weights walk at random, and averages that follow it."""

    def __init__(self, *lengths: float) -> None:
        self.model = shaken(model_configs()[0])
        self.averages = PowerAverages(self.model, EMAConfig(lengths=lengths, snapshot_images=1))
        self.generator = torch.Generator().manual_seed(0)

    def step(self, number: int) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=self.generator))
        self.averages.update(number)

    def average(self, length: float) -> torch.Tensor:
        return self.averages.tensors[f"{length}/token_embedding.weight"]


def test_an_average_is_the_profile_times_the_weights() -> None:
    walk, seen, steps = Walk(0.1), [], 40
    for number in range(steps):
        walk.step(number)
        seen.append(walk.model.token_embedding.weight.detach().double())
    edges = (np.arange(steps + 1) / steps) ** (exponent(0.1) + 1)
    expected = sum(weights * share for weights, share in zip(seen, np.diff(edges), strict=True))
    torch.testing.assert_close(walk.average(0.1).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_combination_of_profiles_finds_those_that_were_kept() -> None:
    times, gammas = [2.0, 2.0, 4.0, 4.0], [17.0, 7.0, 17.0, 7.0]
    np.testing.assert_allclose(combination(times, gammas, 4.0, 7.0), [0, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize(("length", "error"), [(0.05, 2e-3), (0.075, 0.01), (0.1, 2e-3), (0.15, 0.05)])
def test_a_reconstructed_average_is_the_one_that_was_followed(tmp_path: Path, length: float, error: float) -> None:
    walk, others = Walk(0.05, 0.1), PowerAverages(Walk(0.05).model, EMAConfig())
    assert others.tensors == {}
    followed = PowerAverages(walk.model, EMAConfig(lengths=(length,), snapshot_images=1))
    for number in range(400):
        walk.step(number)
        followed.update(number)
        if (number + 1) % 25 == 0:
            walk.averages.write(tmp_path, number + 1, SingleProcess())
    state, step = reconstruct(tmp_path, length)
    assert step == 400
    expected = followed.tensors[f"{length}/token_embedding.weight"]
    moved = (walk.model.token_embedding.weight - expected).norm()
    assert (state["token_embedding.weight"] - expected).norm() < error * moved
    assert state.keys() == dict(walk.model.named_parameters()).keys()
    # An earlier end needs only what was written until then.
    earlier, step = reconstruct(tmp_path, length, 200)
    drop_after(tmp_path, 200)
    again, _ = reconstruct(tmp_path, length)
    assert step == 200
    assert torch.equal(earlier["token_embedding.weight"], again["token_embedding.weight"])


def test_a_run_writes_averages_resumes_them_and_a_model_is_extracted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny_run(write_images(tmp_path / "data"))
    run = replace(run, ema=EMAConfig(decay=0.9, snapshot_images=16))
    train(run, tmp_path / "run", device=torch.device("cpu"))
    files = sorted((tmp_path / "run" / "averages").iterdir())
    assert [p.name for p in files] == [f"step-0000000{n}.safetensors" for n in (2, 4, 6)]
    before = files[-1].read_bytes()
    # Without its last checkpoint the run goes on from step 4, and writes the same averages again.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train(run, tmp_path / "run", device=torch.device("cpu"), resume=True)
    assert files[-1].read_bytes() == before
    for more, said in (
        (["--length", "0.07"], "the average of length 0.07 that ends at step 6"),
        (["--weights", "raw", "--bf16"], "raw weights"),
        (["--length", "0.05", "--step", "4"], "ends at step 4"),
    ):
        assert main(["extract", str(tmp_path / "run"), str(tmp_path / "saved"), *more]) == 0
        assert said in capsys.readouterr().out
        assert Pipeline.from_pretrained(tmp_path / "saved", device="cpu")(["ant"], steps=2).shape == (1, 8, 8, 3)
    for more, said in (
        (["--length", "0.5"], "length is 0.5; allowed: above 0 to below 0.28"),
        (["--length", "0.1", "--step", "5"], "step is 5; averages were written at 2, 4, 6"),
        (["--step", "4"], "--step is 4 without --length"),
    ):
        assert main(["extract", str(tmp_path / "run"), str(tmp_path / "other"), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("lengths", [(), (0.3,), (0.05, -1.0)])
def test_lengths_out_of_range_are_refused(lengths: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"ema.lengths is .*; allowed: one or more, each above 0 to below 0.28"):
        EMAConfig(lengths=lengths)
