"""The diffusion head alone."""

import pytest
import torch
from torch import Tensor

from continuar import DiffusionHead
from continuar.errors import UserError


def energy_distance(x: Tensor, y: Tensor) -> float:
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def mixture(z: Tensor) -> Tensor:
    """Two Gaussians at +-z."""
    sign = torch.where(torch.rand(len(z), 1) < 0.5, 1.0, -1.0)
    return sign * z + 0.2 * torch.randn_like(z)


def shaken_head(prediction: str = "epsilon") -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(3, 5, width=16, depth=2, prediction=prediction)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


def test_many_rows_embed_each_timestep_once_and_few_rows_each_row_alike() -> None:
    net = shaken_head().net
    x, t, z = torch.randn(4, 600, 3), torch.randint(1000, (4, 600)), torch.randn(600, 5)
    wanted = net.denoise(x, net.modulate(net.time_embedding(t) + net.condition(z)))
    found = net(x, t, z)
    inputs = [*net.parameters()]
    upstream = [torch.randn_like(out) for out in wanted]
    for out, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    gradients, expected = (torch.autograd.grad(outs, inputs, upstream) for outs in (found, wanted))
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)
    few = net(x[:, :9], t[:, :9], z[:9])
    torch.testing.assert_close(few[0], found[0][:, :9], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [9, 600])
def test_the_loss_is_the_mean_over_draws_of_the_loss_at_each(rows: int) -> None:
    head = shaken_head()
    z, x = torch.randn(rows, 5), torch.randn(rows, 3)
    torch.manual_seed(3)
    found = head.loss(z, x)
    torch.manual_seed(3)
    t, noise = torch.randint(1000, (4, rows)), torch.randn(4, rows, 3)
    draws = [head.loss_terms(z, x, t[i], noise[i]).total for i in range(4)]
    torch.testing.assert_close(found, torch.stack(draws).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_approach_a_mixture_that_depends_on_z(prediction: str) -> None:
    torch.manual_seed(0)
    head = DiffusionHead(2, 2, width=48, depth=2, prediction=prediction)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)

    def distance() -> float:
        total = 0.0
        for angle in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
            z = angle.expand(400, 2)
            samples = head.sample(z, diffusion_steps=50, generator=torch.Generator().manual_seed(1))
            total += energy_distance(samples, mixture(z))
        return total

    before = distance()
    for _ in range(500):
        angle = 6.2832 * torch.rand(128)
        z = torch.stack((angle.cos(), angle.sin()), 1)
        loss = head.loss(z, mixture(z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.15 * before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_one_value_per_row_and_reaches_z(prediction: str) -> None:
    head = shaken_head(prediction)
    z = torch.randn(7, 5, requires_grad=True)
    loss = head.loss(z, torch.randn(7, 3))
    assert loss.shape == (7,)
    loss[2].backward()
    assert z.grad is not None
    assert z.grad[2].any()
    assert not z.grad[[0, 1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_under_bfloat16_autocast_is_close_to_float32(prediction: str) -> None:
    head = shaken_head(prediction)
    z, x = torch.randn(64, 5), torch.randn(64, 3)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(head.loss(z, x).mean())
    assert losses[1].dtype is torch.float32
    assert torch.allclose(losses[0], losses[1], rtol=0.03)


def test_sample_repeats_with_a_generator_and_guidance_of_one_is_none() -> None:
    head, z = shaken_head(), torch.randn(6, 5)

    def draw(**options) -> Tensor:
        return head.sample(z, diffusion_steps=10, generator=torch.Generator().manual_seed(0), **options)

    assert torch.equal(draw(), draw())
    torch.testing.assert_close(draw(z_uncond=torch.randn(6, 5), guidance=1.0), draw(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(draw(temperature=0.5), draw())
    assert not torch.equal(draw(sampler="ddim"), draw())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 2.0}, "guidance is 2.0 without z_uncond"),
        ({"diffusion_steps": 0}, "diffusion steps is 0"),
        ({"sampler": "euler"}, "sampler is 'euler'"),
        ({"z_uncond": torch.zeros(5, 5)}, r"z_uncond is \(5, 5\); allowed: \(6, 5\)"),
    ],
)
def test_sample_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shaken_head().sample(torch.zeros(6, 5), **options)


def test_shapes_that_do_not_fit_are_named() -> None:
    head = shaken_head()
    with pytest.raises(ValueError, match=r"z is \(2, 4\) and x \(2, 3\); allowed: \[M, 5\] and \[M, 3\]"):
        head.loss(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"z is \(2, 4\); allowed: \[M, 5\]"):
        head.sample(torch.zeros(2, 4))
    for values in ({"token_dim": 0}, {"width": 0}):
        with pytest.raises(UserError, match="is 0; allowed: 1 or more"):
            DiffusionHead(**({"token_dim": 2, "cond_dim": 2} | values))
    with pytest.raises(UserError, match="prediction is 'x0'; allowed: epsilon, v_prediction"):
        DiffusionHead(2, 2, prediction="x0")
