"""Closed forms of the diffusion process and its samplers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.diffusion.gaussian import (
    add_noise,
    coefficients,
    cosine_betas,
    eps_from_velocity,
    log_variance,
    posterior_mean,
    predict_x0,
    sampling_schedule,
    training_schedule,
    variational_bound,
    velocity,
)
from continuar.diffusion.samplers import SAMPLERS


@given(st.integers(2, 1000))
def test_respacing_keeps_the_marginals(count: int) -> None:
    full, respaced = training_schedule(), sampling_schedule(count)
    np.testing.assert_allclose(respaced.abar, full.abar[list(respaced.timesteps)], rtol=1e-7)


def test_cosine_betas_are_capped_and_follow_the_cosine() -> None:
    betas = cosine_betas(1000)
    assert betas.max() == 0.999
    abar = np.cumprod(1 - betas)
    t = np.arange(1, 1000) / 1000
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / 1
    np.testing.assert_allclose(abar[:900], expected[:900] / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-9)


def test_posterior_of_the_true_x0_composes_to_the_marginal() -> None:
    """q(x_{t-1}) from q(x_t) and the posterior is again sqrt(abar) x0 + noise: mean and variance, at every step."""
    c = coefficients(sampling_schedule(50))
    x0 = torch.full((1, 1), 0.7)
    for i in range(1, 50):
        mean = posterior_mean(c, x0, c.sqrt_abar[i] * x0, i)
        assert torch.allclose(mean, c.sqrt_abar[i - 1] * x0, atol=1e-5)
        variance = c.mean_from_x[i] ** 2 * (1 - c.abar[i]) + c.log_posterior_variance[i].exp()
        assert torch.allclose(variance, 1 - c.abar[i - 1], atol=1e-5)


def test_predict_x0_inverts_add_noise() -> None:
    torch.manual_seed(0)
    c = coefficients(training_schedule())
    x0, eps, i = torch.randn(900, 3), torch.randn(900, 3), torch.arange(900)
    assert torch.allclose(predict_x0(c, add_noise(c, x0, i, eps), i, eps), x0, atol=2e-4)


def test_velocity_and_eps_say_the_same() -> None:
    torch.manual_seed(0)
    c = coefficients(training_schedule())
    x0, eps, i = torch.randn(1000, 3), torch.randn(1000, 3), torch.arange(1000)
    x = add_noise(c, x0, i, eps)
    assert torch.allclose(eps_from_velocity(c, x, i, velocity(c, x0, i, eps)), eps, atol=1e-5)


def test_log_variance_spans_its_range() -> None:
    c = coefficients(training_schedule())
    i = torch.tensor([5])
    assert torch.equal(log_variance(c, torch.ones(1, 1), i)[0, 0], c.log_beta[5])
    assert torch.allclose(log_variance(c, -torch.ones(1, 1), i)[0, 0], c.log_posterior_variance[5])


def test_bound_of_the_perfect_network_is_zero_and_does_not_train_eps() -> None:
    torch.manual_seed(0)
    c = coefficients(training_schedule())
    x0, noise, i = torch.randn(64, 4), torch.randn(64, 4), torch.randint(1, 1000, (64,))
    x = add_noise(c, x0, i, noise)
    eps, v = noise.clone().requires_grad_(), torch.full((64, 4), -1.0, requires_grad=True)
    vb = variational_bound(c, eps, v, x0, x, i)
    assert vb.abs().max() < 1e-2
    vb.sum().backward()
    assert eps.grad is None or eps.grad.abs().max() == 0
    assert v.grad is not None


def exact_eps(c, mean: float, std: float):
    """The exact eps and v for a Gaussian target N(mean, std^2): E[eps | x_t] is linear in x_t, Var[x_0 | x_t] constant."""
    by_step = {int(t): i for i, t in enumerate(c.timesteps)}

    def denoise(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        i = by_step[int(t)]
        a, s = c.sqrt_abar[i], c.sqrt_one_minus_abar[i]
        marginal = a**2 * std**2 + s**2
        eps = s * (x - a * mean) / marginal
        low, high = c.log_posterior_variance[i], c.log_beta[i]
        variance = low.exp() + c.mean_from_x0[i] ** 2 * std**2 * s**2 / marginal
        return eps, torch.ones_like(x) * (2 * (variance.log() - low) / (high - low) - 1)

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_reproduce_a_gaussian(name: str) -> None:
    torch.manual_seed(0)
    c = coefficients(sampling_schedule(200))
    x = torch.randn(20_000, 1)
    out = SAMPLERS[name].run(
        exact_eps(c, 0.5, 0.6),
        x,
        c,
        temperature=torch.tensor(1.0),
        step_noise=lambda i: torch.randn(x.shape, generator=torch.Generator().manual_seed(i)),
    )
    assert abs(out.mean().item() - 0.5) < 0.02
    assert abs(out.std().item() - 0.6) < 0.02


def test_temperature_zero_adds_no_noise_and_a_lower_one_less() -> None:
    torch.manual_seed(0)
    c = coefficients(sampling_schedule(50))
    x = torch.randn(5000, 1)
    stds = []
    for temperature in (0.0, 0.7, 1.0):
        out = SAMPLERS["ddpm"].run(
            exact_eps(c, 0.0, 1.0),
            x,
            c,
            temperature=torch.tensor(temperature),
            step_noise=lambda i: torch.randn(x.shape, generator=torch.Generator().manual_seed(i)),
        )
        stds.append(out.std().item())
    assert stds[0] < stds[1] < stds[2]
    assert abs(stds[2] - 1) < 0.03
