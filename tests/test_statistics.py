"""Streamed moments against NumPy on all samples; PSNR against torchmetrics."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio

from continuar.errors import UserError
from continuar.statistics import MomentAccumulator, moments, psnr

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1)


@pytest.mark.parametrize("covariance", [True, False])
@given(sizes=SIZES)
def test_accumulator_moments_are_numpy_s(covariance: bool, sizes: list[int]) -> None:
    x = np.random.default_rng(0).normal(1000, 1, size=(sum(sizes), 4))
    found, other = MomentAccumulator(covariance), MomentAccumulator(covariance)
    for i, part in enumerate(np.split(x, np.cumsum(sizes)[:-1])):
        (found if i % 2 else other).add(part)
    found.merge(other)
    np.testing.assert_allclose(found.mean, x.mean(0))
    np.testing.assert_allclose(found.std(), x.std(0), rtol=1e-6, atol=1e-9)
    assert found.overall() == pytest.approx((x.mean(), x.std()), rel=1e-9)
    assert found.count == len(x)
    if covariance:
        np.testing.assert_allclose(found.moments().covariance, np.cov(x.T), rtol=1e-6, atol=1e-9)


def test_accumulator_keeps_digits_where_the_mean_is_large() -> None:
    """E[x^2] - E[x]^2 would lose all of them here."""
    x = 1e9 + np.random.default_rng(0).normal(size=(500, 2))
    sums = MomentAccumulator(covariance=False)
    for part in np.split(x, 10):
        sums.add(part)
    np.testing.assert_allclose(sums.std(), x.std(0), rtol=1e-6)


def test_accumulator_of_gaussians_is_that_of_their_draws() -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(3, 2, (40, 3)), rng.uniform(0.1, 2, (40, 3))
    draws = mean + std * rng.normal(size=(20_000, 40, 3))
    sums = MomentAccumulator(covariance=False)
    sums.add(mean[:10], std[:10] ** 2)
    sums.add(mean[10:], std[10:] ** 2)
    np.testing.assert_allclose(sums.mean, draws.mean((0, 1)), rtol=1e-2)
    np.testing.assert_allclose(sums.std(), draws.std((0, 1)), rtol=1e-2)


@pytest.mark.parametrize("covariance", [True, False])
def test_accumulator_all_reduce_is_one_process_s(covariance: bool) -> None:
    x = np.random.default_rng(0).normal(1e6, 1, (60, 3))
    ranks = [MomentAccumulator(covariance) for _ in range(3)]
    for rank, part in zip(ranks, np.split(x, [7, 30]), strict=True):
        rank.add(part)
    single = MomentAccumulator(covariance)
    single.add(x)
    for found in _all_reduce_in_lockstep(ranks):
        assert found.count == 60
        np.testing.assert_allclose(found.mean, single.mean, rtol=1e-12)
        np.testing.assert_allclose(found.std(), single.std(), rtol=1e-6)


def _all_reduce_in_lockstep(ranks: list[MomentAccumulator]) -> list[MomentAccumulator]:
    """What the processes would hold: threads that meet at every sum."""
    import threading

    barrier, parts = threading.Barrier(len(ranks)), [torch.empty(0)] * len(ranks)

    def total_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(x: torch.Tensor) -> torch.Tensor:
            parts[rank] = x
            barrier.wait()
            found = torch.stack(parts).sum(0)
            barrier.wait()
            return found

        return total

    threads = [threading.Thread(target=sums.all_reduce, args=(total_of(rank),)) for rank, sums in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return ranks


def test_moments_need_two_samples() -> None:
    with pytest.raises(UserError, match="1 features; at least 2"):
        moments(np.zeros((1, 3)))


def test_psnr_agrees_with_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 4, 9, 9, 3)).astype(np.float64)
    expected = peak_signal_noise_ratio(torch.from_numpy(a), torch.from_numpy(b), 255.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(psnr(((a - b) ** 2).mean((1, 2, 3))), expected.numpy(), rtol=1e-6)
    assert float(psnr(0.04, peak=2.0)) == pytest.approx(20)
    assert float(psnr(0.0)) == float("inf")
