"""Samplers against closed forms: a Gaussian target, whose exact network is affine (see gaussian_target.py)."""

import math
import typing
from functools import partial

import pytest
import torch

from continuar.diffusion.gaussian import Grid, sampling_schedule, training_schedule, uniform_t
from continuar.diffusion.samplers import LAST_TIMESTEP, SAMPLERS, SamplerName, check_sampler, check_temperature
from continuar.diffusion.time_grids import uniform_log_snr
from continuar.errors import UserError
from tests.diffusion.gaussian_target import ABAR, Gaussian, distance, push

CORRELATED = Gaussian(
    torch.tensor([0.5, -0.8, 0.0], dtype=torch.float64),
    torch.tensor([[0.8, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 1.2]], dtype=torch.float64),
)
INDEPENDENT = Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.diag(torch.tensor([0.36, 1.5], dtype=torch.float64)))
STANDARD = Gaussian(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
DETERMINISTIC = [name for name, entry in SAMPLERS.items() if not entry.has_temperature]
STOCHASTIC = [name for name in SAMPLERS if name not in DETERMINISTIC]


def solver_error(name: str, steps: int, grid: Grid) -> float:
    schedule = sampling_schedule(steps, grid)
    found = push(SAMPLERS[name].run, CORRELATED.denoise(schedule), schedule, 3)
    return distance(found, CORRELATED.flow(schedule.timesteps[-1]))


@pytest.mark.parametrize(
    ("name", "grid", "order"),
    [
        ("ddim", uniform_t, 1),
        ("ddim", partial(uniform_t, last=LAST_TIMESTEP), 1),
        ("dpmpp_2m", partial(uniform_t, last=LAST_TIMESTEP), 2),
        ("dpmpp_2m", SAMPLERS["dpmpp_2m"].grid, 2),
    ],
)
def test_error_falls_with_the_number_of_steps_at_the_solver_s_order(name: str, grid: Grid, order: int) -> None:
    """The slope of log error over log steps, fitted by least squares."""
    steps = torch.tensor([20.0, 28, 40, 56, 80])
    errors = torch.tensor([solver_error(name, int(n), grid) for n in steps])
    x, y = steps.log() - steps.log().mean(), errors.log() - errors.log().mean()
    assert abs(-(x @ y) / (x @ x) - order) < 0.15 * order


def test_dpmpp_needs_a_fraction_of_ddim_s_steps() -> None:
    assert solver_error("dpmpp_2m", 20, SAMPLERS["dpmpp_2m"].grid) < solver_error("ddim", 100, uniform_t)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 200), ("dpmpp_2m", 25)])
def test_deterministic_samplers_reproduce_mean_and_covariance(name: str, steps: int) -> None:
    """Within 0.02 for the solver, and for the start what N(0, I) in place of x_last makes of mean and covariance."""
    schedule = SAMPLERS[name].schedule(steps)
    found = push(SAMPLERS[name].run, CORRELATED.denoise(schedule), schedule, 3)
    flow, abar = CORRELATED.flow(schedule.timesteps[-1]), ABAR[schedule.timesteps[-1]]
    start = abar.sqrt() * (flow.matrix @ CORRELATED.mean).abs().max() + 2 * abar
    assert found.noise.abs().max() == 0
    assert start < 0.025
    assert (found.mean - CORRELATED.mean).abs().max() < start + 0.02
    assert (found.covariance - CORRELATED.covariance).abs().max() < start + 0.02


@pytest.mark.parametrize("steps", [2, 5, 100])
def test_ddpm_with_the_exact_variance_is_exact_at_any_number_of_steps(steps: int) -> None:
    """Each reverse step of a Gaussian is Gaussian, whatever its length; the learned range can express its variance."""
    schedule = SAMPLERS["ddpm"].schedule(steps)
    found = push(SAMPLERS["ddpm"].run, INDEPENDENT.denoise(schedule), schedule, 2)
    assert (found.mean - INDEPENDENT.mean).abs().max() < 1e-3
    assert (found.covariance - INDEPENDENT.covariance).abs().max() < 1e-3


def test_dpmpp_sde_is_of_second_order_in_the_covariance() -> None:
    errors = []
    for steps in (20, 40, 80):
        schedule = SAMPLERS["dpmpp_2m_sde"].schedule(steps)
        found = push(SAMPLERS["dpmpp_2m_sde"].run, CORRELATED.denoise(schedule), schedule, 3)
        errors.append((found.covariance - CORRELATED.covariance).abs().max())
        assert (found.mean - CORRELATED.mean).abs().max() < 0.01
        assert found.noise[1:].abs().amax((1, 2)).min() > 0
    assert errors[0] < 0.07
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1]


def test_dpmpp_sde_forgets_where_it_began() -> None:
    """x_T has next to no say in x_0, which in the deterministic solver is a function of it."""
    schedule = SAMPLERS["dpmpp_2m_sde"].schedule(20)
    pushed = [push(SAMPLERS[name].run, CORRELATED.denoise(schedule), schedule, 3) for name in ("dpmpp_2m_sde", "dpmpp_2m")]
    assert pushed[0].matrix.abs().max() < 0.05
    assert pushed[1].matrix.abs().max() > 0.5


@pytest.mark.parametrize("name", STOCHASTIC)
def test_temperature_scales_the_added_noise_alone(name: str) -> None:
    schedule = SAMPLERS[name].schedule(20)
    one, half = (push(SAMPLERS[name].run, INDEPENDENT.denoise(schedule), schedule, 2, t) for t in (1.0, 0.5))
    assert distance(one, half) == 0
    torch.testing.assert_close(half.noise, 0.5 * one.noise, rtol=1e-6, atol=1e-9)
    assert one.noise[0].abs().max() == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_between_two_gaussians_extrapolates_the_mean(name: str) -> None:
    """With one covariance, eps_u + w (eps_c - eps_u) is the exact eps of N(mu_u + w (mu_c - mu_u), covariance)."""
    schedule, w = SAMPLERS[name].schedule(80), 2.5
    unconditional = Gaussian(torch.tensor([-0.2, 0.3], dtype=torch.float64), INDEPENDENT.covariance)
    conditional, null = INDEPENDENT.denoise(schedule), unconditional.denoise(schedule)

    def guided(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (eps_c, v), (eps_u, _) = conditional(x, t), null(x, t)
        return eps_u + w * (eps_c - eps_u), v

    found = push(SAMPLERS[name].run, guided, schedule, 2)
    target = Gaussian(unconditional.mean + w * (INDEPENDENT.mean - unconditional.mean), INDEPENDENT.covariance)
    same = push(SAMPLERS[name].run, target.denoise(schedule), schedule, 2)
    torch.testing.assert_close(found.mean, same.mean, rtol=1e-9, atol=1e-9)
    assert (found.mean - target.mean).abs().max() < 0.04 * target.mean.abs().max()
    assert (found.covariance - target.covariance).abs().max() < 0.04 * target.covariance.max()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_point_is_found_exactly_whatever_the_steps(name: str, steps: int) -> None:
    point = Gaussian(torch.tensor([0.7, -3.0], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    schedule = SAMPLERS[name].schedule(steps)
    found = push(SAMPLERS[name].run, point.denoise(schedule), schedule, 2)
    # x_0 = (x_T - sigma eps) / alpha subtracts numbers of 1/alpha = 20,000 in coefficients of float32.
    tolerance = 5e-3 if steps == 1 else 1e-4
    assert (found.mean - point.mean).abs().max() < tolerance
    assert found.matrix.abs().max() < tolerance


@pytest.mark.parametrize("steps", [1, 2])
def test_dpmpp_without_a_past_is_ddim(steps: int) -> None:
    schedule = SAMPLERS["dpmpp_2m"].schedule(steps)
    pushed = [push(SAMPLERS[name].run, CORRELATED.denoise(schedule), schedule, 3) for name in ("ddim", "dpmpp_2m")]
    assert distance(*pushed) < 1e-5


def test_an_error_of_the_first_eps_is_what_the_docstring_of_dpmpp_says() -> None:
    abar = training_schedule().abar
    assert [round(math.sqrt(1 / abar[t] - 1)) for t in (999, 979)] == [20291, 32]
    assert round(math.sqrt(abar[LAST_TIMESTEP]), 3) == 0.031

    def response(name: str, grid: Grid) -> float:
        schedule = sampling_schedule(20, grid)
        exact, first = STANDARD.denoise(schedule), schedule.timesteps[-1]
        wrong = push(SAMPLERS[name].run, lambda x, t: (exact(x, t)[0] + (int(t) == first), x), schedule, 1)
        return abs((wrong.offset - push(SAMPLERS[name].run, exact, schedule, 1).offset).item())

    assert round(response("ddim", uniform_t)) == 1574
    assert round(response("dpmpp_2m", uniform_log_snr)) == 28
    assert round(response("dpmpp_2m", SAMPLERS["dpmpp_2m"].grid), 2) == 0.08


def test_the_table_has_every_name() -> None:
    assert tuple(SAMPLERS) == typing.get_args(SamplerName)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("euler", 10, "sampler is 'euler'; allowed: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde"),
        ("ddpm", 1001, "diffusion steps is 1001; allowed: 1 to 1000"),
        ("dpmpp_2m", 981, "diffusion steps is 981; allowed: 1 to 980"),
        ("dpmpp_2m", 0, "diffusion steps is 0; allowed: 1 to 980"),
    ],
)
def test_names_and_counts_outside_the_table_are_refused(name: str, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sampler(name, steps)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_temperature_is_refused_where_no_noise_is_added(name: str) -> None:
    check_temperature(name, 1.0)
    check_temperature("ddpm", 0.9)
    with pytest.raises(
        UserError, match=f"temperature is 0.9 with the sampler '{name}', which adds no noise; allowed: 1.0, or the sampler ddpm"
    ):
        check_temperature(name, 0.9)
