"""The process against its closed form, its likelihood against brute force; training, sampling and filling for real, but small."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from tests.examples import load_example

series = load_example("time_series")


def test_drawn_series_have_the_covariance_of_the_process() -> None:
    """C_s = E[x x' 1(regime s)] solves C_s = A_s (sum_r P(r -> s) C_r) A_s' + Q_s / 2."""
    matrices, noise = series.MATRICES.double().numpy(), [np.diag(n**2) for n in series.NOISE.double().numpy()]
    switch = np.array([[series.STAY, 1 - series.STAY], [1 - series.STAY, series.STAY]])
    c = np.zeros((2, 3, 3))
    for _ in range(2000):
        c = np.stack([a @ np.einsum("r,rij->ij", switch[:, s], c) @ a.T + noise[s] / 2 for s, a in enumerate(matrices)])
    torch.manual_seed(0)
    x = series.draw_series(4000, 8).double()
    np.testing.assert_allclose(np.cov(x[:, -1].T.numpy()), c.sum(0), atol=0.06)
    np.testing.assert_allclose(x.mean((0, 1)).numpy(), 0, atol=0.06)


def test_log_likelihood_equals_the_sum_over_all_paths_of_regimes() -> None:
    torch.manual_seed(1)
    x, steps = series.draw_series(2, 6), 5
    for one, found in zip(x, series.log_likelihood(x), strict=True):
        total = 0.0
        for path in itertools.product((0, 1), repeat=steps):
            # The regime before the first of these moments is either with 1/2, and so is the first one's.
            p = 0.5
            for t, s in enumerate(path):
                if t > 0:
                    p *= series.STAY if s == path[t - 1] else 1 - series.STAY
                mean = (series.MATRICES[s] @ one[t]).numpy()
                p *= multivariate_normal.pdf(one[t + 1].numpy(), mean, np.diag(series.NOISE[s].numpy() ** 2))
            total += p
        assert found.item() == pytest.approx(np.log(total) / steps, rel=1e-4)


def test_series_of_another_law_are_less_likely() -> None:
    torch.manual_seed(2)
    x = series.draw_series(200)
    true, noisy, shuffled = (
        series.log_likelihood(v).mean() for v in (x, x + 0.1 * torch.randn_like(x), x[:, torch.randperm(x.shape[1])])
    )
    assert true > noisy + 0.2
    assert true > shuffled + 1


def test_autocorrelation_is_one_at_lag_zero_and_follows_a_sine() -> None:
    turns = torch.arange(400.0).view(1, -1, 1) / 8 * 2 * torch.pi
    found = series.autocorrelation(turns.sin().expand(1, -1, 3), 9)
    torch.testing.assert_close(found[:, 0], (torch.arange(9.0) / 8 * 2 * torch.pi).cos(), atol=0.02, rtol=0)


def test_pieces_train_sample_fill_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    std, length = series.draw_series(200).std((0, 1)), 12
    model = series.train(series.build(length, width=16), 3, std, batch=4)
    data = series.draw_series(6, length)
    drawn = series.sample(model, 6, std, diffusion_steps=4)
    assert drawn.shape == (6, length, 3)
    assert drawn.isfinite().all()
    gap = slice(4, 8)
    filled = series.fill(model, data[0], gap, 2, std, diffusion_steps=4)
    outside = torch.ones(length, dtype=torch.bool)
    outside[gap] = False
    torch.testing.assert_close(filled[:, outside], data[:1, outside].expand(2, -1, -1))
    assert not torch.allclose(filled[0, gap], filled[1, gap])
    series.report(data, series.draw_series(6, length), drawn)
    assert capsys.readouterr().out.count("log-likelihood per step") == 3
    series.plot(data, drawn, filled, data[0], gap, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
