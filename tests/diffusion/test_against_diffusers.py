"""Our samplers against the schedulers of diffusers, given the same betas, timesteps, noise and network."""

from typing import Any

import pytest
import torch
from torch import Tensor

from continuar.diffusion.gaussian import TRAIN_STEPS, Schedule, coefficients, cosine_betas, training_schedule
from continuar.diffusion.samplers import SAMPLERS
from continuar.diffusion.time_grids import strided

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

DIM = 4
ABAR = torch.from_numpy(training_schedule().abar)
WEIGHT = torch.randn(DIM, 2 * DIM, generator=torch.Generator().manual_seed(3))
BIAS = torch.randn(2 * DIM, generator=torch.Generator().manual_seed(4))


def network(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A fixed smooth network: the eps of an x_0 in -2..2, and v in -1..1."""
    x0, v = torch.tanh(x @ WEIGHT / 2 + BIAS * (1 + t / TRAIN_STEPS)).chunk(2, dim=1)
    return (x - ABAR[t].sqrt() * 2 * x0) / (1 - ABAR[t]).sqrt(), v


def noise(i: int) -> Tensor:
    return torch.randn(8, DIM, generator=torch.Generator().manual_seed(i))


def ours(name: str, schedule: Schedule) -> Tensor:
    return SAMPLERS[name].run(network, noise(1000), coefficients(schedule), temperature=torch.tensor(1.0), step_noise=noise)


def scheduler_of(kind: str, **options: Any) -> Any:
    scheduler = getattr(diffusers, kind)(trained_betas=cosine_betas(TRAIN_STEPS), **options)
    # They multiply in float32, where 1 - abar at t = 0 is off by 0.1%.
    scheduler.alphas_cumprod = ABAR
    return scheduler


def theirs(scheduler: Any, learned_variance: bool = False, stochastic: bool = False) -> Tensor:
    x = noise(1000)
    for i, t in zip(reversed(range(len(scheduler.timesteps))), scheduler.timesteps, strict=True):
        eps, v = network(x, t)
        out = torch.cat((eps, v), 1) if learned_variance else eps
        # They draw the step's noise from the generator, as `noise` does.
        extra = {"generator": torch.Generator().manual_seed(i)} if learned_variance or stochastic else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddim(steps: int) -> None:
    """On an integer stride: their DDIM has no other grid."""
    scheduler = scheduler_of("DDIMScheduler", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    schedule = training_schedule().respace(strided(steps))
    assert tuple(reversed(scheduler.timesteps.tolist())) == schedule.timesteps
    torch.testing.assert_close(ours("ddim", schedule), theirs(scheduler), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddpm_with_a_learned_variance(steps: int) -> None:
    scheduler = scheduler_of("DDPMScheduler", clip_sample=False, variance_type="learned_range")
    schedule = SAMPLERS["ddpm"].schedule(steps)
    scheduler.set_timesteps(timesteps=list(reversed(schedule.timesteps)))
    torch.testing.assert_close(ours("ddpm", schedule), theirs(scheduler, learned_variance=True), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [3, 20, 100])
@pytest.mark.parametrize(("name", "kind"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpmpp(name: str, kind: str, steps: int) -> None:
    scheduler = scheduler_of("DPMSolverMultistepScheduler", algorithm_type=kind, solver_order=2, solver_type="midpoint")
    schedule = SAMPLERS[name].schedule(steps)
    scheduler.set_timesteps(timesteps=list(reversed(schedule.timesteps)))
    torch.testing.assert_close(ours(name, schedule), theirs(scheduler, stochastic=name != "dpmpp_2m"), rtol=2e-5, atol=2e-5)
