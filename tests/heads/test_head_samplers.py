"""Every sampler through the diffusion head: guidance, temperature and refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from continuar import DiffusionHead
from continuar.diffusion.gaussian import coefficients, eps_from_velocity, training_coefficients
from continuar.diffusion.samplers import SAMPLERS
from continuar.errors import UserError
from continuar.heads.diffusion import DiffusionOptions
from continuar.noise import KeyedNoise, Purpose
from continuar.sampling.generate import Guidance, SamplingOptions

DETERMINISTIC = [name for name, entry in SAMPLERS.items() if not entry.has_temperature]
STEPS = 12
NOISE = KeyedNoise(torch.arange(6), torch.arange(6) + 3)
Z, Z_UNCOND = (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def shaken_head(prediction: str = "epsilon") -> DiffusionHead:
    """A head whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    head = DiffusionHead(3, 5, width=16, depth=2, prediction=prediction)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


def draw(head: DiffusionHead, name: str, scale: float | None, temperature: float = 1.0, z: Tensor = Z) -> Tensor:
    guidance = None if scale is None else Guidance(Z_UNCOND, torch.tensor(scale))
    options = DiffusionOptions(diffusion_steps=STEPS, sampler=name)
    with torch.no_grad():
        return head.draw(z, options=options, temperature=torch.tensor(temperature), noise=NOISE, guidance=guidance).tokens


def plain_denoise(head: DiffusionHead, z: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The network as it is trained, one condition at a time."""

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out, v = head.net(x, t, z)
        return (out if head.prediction == "epsilon" else eps_from_velocity(training_coefficients(z.device), x, t[None], out)), v

    return denoise


@each_sampler
@each_prediction
def test_guided_draw_is_the_sampler_run_on_extrapolated_eps(name: str, prediction: str) -> None:
    head, w = shaken_head(prediction), 1.7
    conditional, unconditional = plain_denoise(head, Z), plain_denoise(head, Z_UNCOND)

    def guided(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (eps_c, v), (eps_u, _) = conditional(x, t), unconditional(x, t)
        return eps_u + w * (eps_c - eps_u), v

    with torch.no_grad():
        expected = SAMPLERS[name].run(
            guided,
            NOISE.normal(Purpose.INITIAL, 0, 3),
            coefficients(SAMPLERS[name].schedule(STEPS)),
            temperature=torch.tensor(1.0),
            step_noise=lambda i: NOISE.normal(Purpose.STEP, i, 3),
        )
    torch.testing.assert_close(draw(head, name, w), expected, rtol=2e-3, atol=2e-3)


@each_sampler
@each_prediction
def test_guidance_of_one_is_conditional_and_of_zero_unconditional(name: str, prediction: str) -> None:
    head = shaken_head(prediction)
    torch.testing.assert_close(draw(head, name, 1.0), draw(head, name, None), rtol=2e-3, atol=2e-3)
    # The variance stays the conditional half's: without noise there is nothing else of it left.
    torch.testing.assert_close(draw(head, name, 0.0, temperature=0.0), draw(head, name, None, 0.0, Z_UNCOND), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(draw(head, name, 2.0), draw(head, name, None), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_temperature_is_refused_by_every_door_where_no_noise_is_added(name: str) -> None:
    message = f"temperature is 0.5 with the sampler '{name}', which adds no noise; allowed: 1.0"
    with pytest.raises(UserError, match=message):
        shaken_head().sample(Z, sampler=name, temperature=0.5)
    with pytest.raises(UserError, match=message):
        SamplingOptions(temperature=0.5, head=DiffusionOptions(sampler=name))


def test_steps_that_a_grid_does_not_have_are_refused_when_options_are_made() -> None:
    DiffusionOptions(diffusion_steps=980, sampler="dpmpp_2m")
    for refuse in (DiffusionOptions, lambda **o: shaken_head().sample(Z, **o)):
        with pytest.raises(UserError, match="diffusion steps is 981; allowed: 1 to 980"):
            refuse(diffusion_steps=981, sampler="dpmpp_2m")
