"""Time grids: which timesteps a sampler visits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from continuar.diffusion.gaussian import Grid, sampling_schedule, training_schedule, uniform_t
from continuar.diffusion.samplers import SAMPLERS
from continuar.diffusion.time_grids import strided, uniform_log_snr
from continuar.errors import UserError

GRIDS = pytest.mark.parametrize("grid", [uniform_t, uniform_log_snr])
LAST = st.integers(1, 999)


@GRIDS
@given(last=LAST, data=st.data())
def test_grids_give_distinct_ascending_timesteps_from_0_to_the_last(grid: Grid, last: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, last + 1))
    times = grid(steps, last)  # type: ignore[call-arg]
    assert len(times) == steps
    assert all(a < b for a, b in itertools.pairwise(times))
    assert times[-1] == last
    assert steps == 1 or times[0] == 0


@GRIDS
@pytest.mark.parametrize(("steps", "last", "allowed"), [(0, 999, 1000), (1001, 999, 1000), (981, 979, 980), (-3, 979, 980)])
def test_grids_refuse_other_counts(grid: Grid, steps: int, last: int, allowed: int) -> None:
    with pytest.raises(UserError, match=f"diffusion steps is {steps}; allowed: 1 to {allowed}"):
        grid(steps, last)  # type: ignore[call-arg]


@given(st.integers(2, 1000))
def test_uniform_t_is_the_paper_s_spacing(steps: int) -> None:
    assert uniform_t(steps) == tuple(round(i * 999 / (steps - 1)) for i in range(steps))


def test_strided_refuses_a_count_no_stride_gives() -> None:
    assert strided(50) == tuple(range(0, 1000, 20))
    with pytest.raises(UserError, match="998"):
        strided(998)


@given(last=st.integers(300, 999), steps=st.integers(2, 30))
def test_uniform_log_snr_is_even_as_far_as_whole_timesteps_allow(last: int, steps: int) -> None:
    """Each timestep is the nearest to its even log-SNR, except where neighbours near t = 0 had to be taken."""
    log_snr, times = training_schedule().log_snr, uniform_log_snr(steps, last)
    even = np.linspace(log_snr[0], log_snr[last], steps)
    free = next(i for i in range(steps) if i == steps - 1 or times[i + 1] - times[i] > 1)
    for i in range(free + 1, steps):
        t = times[i]
        below, above = log_snr[max(t - 1, 0)], log_snr[min(t + 1, last)]
        assert (log_snr[t] + above) / 2 - 1e-9 <= even[i] <= (log_snr[t] + below) / 2 + 1e-9 or t in (0, last)
    assert times[: free + 1] == tuple(range(free + 1))


def test_log_snr_is_that_of_abar() -> None:
    schedule = training_schedule()
    assert np.all(np.diff(schedule.log_snr) < 0)
    np.testing.assert_allclose(1 / (1 + np.exp(-schedule.log_snr)), schedule.abar, rtol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_s_schedule_keeps_the_marginals_of_its_grid(name: str) -> None:
    entry = SAMPLERS[name]
    schedule = entry.schedule(37)
    assert schedule.timesteps == entry.grid(37)
    assert schedule is sampling_schedule(37, entry.grid)
    np.testing.assert_allclose(schedule.abar, training_schedule().abar[list(schedule.timesteps)], rtol=1e-7)
