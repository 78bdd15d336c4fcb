"""What heads draw is what their parameters say: frequencies, densities, closed forms."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from continuar.heads import (
    CategoricalHead,
    CategoricalHeadConfig,
    CategoricalOptions,
    FlowHead,
    FlowOptions,
    MixtureHead,
    MixtureHeadConfig,
    MixtureOptions,
    RegressionHead,
)
from continuar.heads.categorical import truncate

ROWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def categorical(probabilities: list[float]) -> tuple[CategoricalHead, Tensor]:
    """A head of one condition, z = 1, with these probabilities."""
    head = CategoricalHead(len(probabilities), 1)
    with torch.no_grad():
        head.logits.weight.copy_(torch.tensor(probabilities).log().unsqueeze(1))
        head.logits.bias.zero_()
    return head, torch.ones(ROWS, 1)


P = [0.05, 0.4, 0.15, 0.3, 0.1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, [p**2 for p in P]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_p": 0.75}, [0, 0.4, 0.15, 0.3, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"z_uncond": torch.zeros(ROWS, 1), "guidance": 3.0}, [p**3 for p in P]),
        ({"z_uncond": torch.full((ROWS, 1), 2.0), "guidance": 0.5}, [p**1.5 for p in P]),
    ],
)
def test_categorical_frequencies_are_the_probabilities(options: dict, expected: list[float]) -> None:
    head, z = categorical(P)
    counts = head.sample(z, generator=generator(), **options).bincount(minlength=5)
    share = torch.tensor(expected) / sum(expected)
    possible = share > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible].numpy(), (ROWS * share[possible]).numpy(), sum_check=False).pvalue > 1e-3


def test_categorical_log_prob_is_that_of_the_drawn_id() -> None:
    from continuar.noise import GeneratorNoise

    head, z = categorical(P)
    noise = GeneratorNoise(ROWS, torch.device("cpu"), generator())
    drawn = head.draw(z, options=CategoricalOptions(), temperature=torch.tensor(1.0), noise=noise)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob.exp(), torch.tensor(P)[drawn.tokens])


def test_categorical_loss_is_cross_entropy_with_smoothing_and_large_logits() -> None:
    head, _ = categorical(P)
    target = torch.tensor([1, 4])
    torch.testing.assert_close(head.loss(torch.ones(2, 1), target), -torch.tensor([0.4, 0.1]).log())
    head.label_smoothing = 0.2
    mean = -torch.tensor(P).log().mean()
    expected = -0.8 * torch.tensor([0.4, 0.1]).log() + 0.2 * mean
    torch.testing.assert_close(head.loss(torch.ones(2, 1), target), expected)
    assert torch.isfinite(head.loss(torch.full((2, 1), 1e6), target)).all()


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=9), st.floats(0.05, 1.0), st.integers(0, 9))
def test_truncation_keeps_the_fewest_that_reach_top_p(weights: list[float], top_p: float, top_k: int) -> None:
    p = torch.tensor([weights]) / sum(weights)
    top_k = min(top_k, len(weights))
    kept, ids = truncate(p, top_k, top_p)
    count = int((kept > 0).sum())
    assert count >= 1
    assert torch.equal(kept[0, :count], p[0, ids[0, :count]])
    assert count <= (top_k or len(weights))
    pool = p.sort(descending=True).values[0, : top_k or len(weights)]
    reached = pool.cumsum(0) / pool.sum()
    if top_p < 1:
        assert reached[count - 1] >= top_p - 1e-5
        assert count == 1 or reached[count - 2] < top_p + 1e-5


def mixture(weights: list[float], means: list[float], stds: list[float]) -> tuple[MixtureHead, Tensor]:
    """A head of one condition and one dimension with this mixture."""
    head = MixtureHead(1, 1, components=len(weights), min_std=1e-3)
    raw = [math.log(math.expm1(s - 1e-3)) - 0.5413 for s in stds]
    with torch.no_grad():
        values = [*(math.log(w) for w in weights), *means, *raw]
        head.parameters_of_z.weight.copy_(torch.tensor(values).unsqueeze(1))
    return head, torch.ones(ROWS, 1)


M = ([0.3, 0.7], [-2.0, 1.0], [0.4, 0.8])


def mixture_cdf(x, tau: float = 1.0):
    return sum(w * stats.norm.cdf(x, m, tau * s) for w, m, s in zip(*M, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mixture_samples_follow_the_density(temperature: float) -> None:
    head, z = mixture(*M)
    x = head.sample(z, temperature=temperature, generator=generator())[:, 0].numpy()
    assert stats.kstest(x, lambda v: mixture_cdf(v, temperature)).pvalue > 1e-3


def test_mixture_loss_is_the_negative_log_density_also_far_away() -> None:
    head, _ = mixture(*M)
    x = torch.linspace(-6, 6, 50).unsqueeze(1)
    density = sum(w * stats.norm.pdf(x.numpy(), m, s) for w, m, s in zip(*M, strict=True))
    ours = head.loss(torch.ones(50, 1), x)
    torch.testing.assert_close(ours, -torch.from_numpy(density).log().float().squeeze(1), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(head.loss(torch.ones(1, 1), torch.tensor([[1e4]]))).all()


def test_mixture_log_density_agrees_with_torch_distributions() -> None:
    torch.manual_seed(0)
    head = MixtureHead(3, 4, components=5)
    z, x = torch.randn(6, 4), torch.randn(6, 3)
    log_weight, mean, std = head.mixture(z)
    components = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    whole = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=log_weight), components)
    torch.testing.assert_close(head.loss(z, x), -whole.log_prob(x) / 3)


def test_mixture_guidance_approaches_the_closed_form_as_candidates_grow() -> None:
    """p_c = N(1, 1), p_u = N(0, 1): p_c^2 p_u^-1 is N(2, 1), and guidance 1 changes nothing."""
    head = MixtureHead(1, 1, components=1, min_std=1e-3)
    with torch.no_grad():
        head.parameters_of_z.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        head.parameters_of_z.bias[2] = math.log(math.expm1(1 - 1e-3)) - 0.5413
    z, null = torch.ones(4000, 1), torch.zeros(4000, 1)

    def moments(guidance: float, candidates: int) -> tuple[float, float]:
        x = head.sample(z, z_uncond=null, guidance=guidance, candidates=candidates, generator=generator())
        return x.mean().item(), x.std().item()

    errors = [abs(moments(2.0, n)[0] - 2.0) for n in (1, 8, 512)]
    assert errors[0] > errors[1] > errors[2]
    assert moments(2.0, 512) == pytest.approx((2.0, 1.0), abs=0.08)
    assert moments(1.0, 64) == pytest.approx((1.0, 1.0), abs=0.05)


def test_flow_solvers_follow_a_known_field_at_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact velocity of data N(0, s^2) on straight paths transports x_0 to s x_0."""
    head, s = FlowHead(1, 1, width=4, depth=1), 0.5

    def field(z, guidance):
        def velocity(x: Tensor, time: Tensor) -> Tensor:
            t = time.double() / 1000
            return (x.double() * (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)).to(x.dtype)

        return velocity

    monkeypatch.setattr(head, "velocity", field)
    z = torch.ones(200, 1)
    limit = head.sample(z, flow_steps=1000, solver="heun", generator=generator())
    errors = {}
    for solver in ("euler", "heun"):
        errors[solver] = [
            (head.sample(z, flow_steps=n, solver=solver, generator=generator()) - limit).abs().max().item() for n in (8, 16, 32)
        ]
    orders = {k: math.log2(v[0] / v[2]) / 2 for k, v in errors.items()}
    assert orders["euler"] == pytest.approx(1, abs=0.3)
    assert orders["heun"] == pytest.approx(2, abs=0.4)
    cold = head.sample(z, temperature=0.5, flow_steps=8, generator=generator())
    torch.testing.assert_close(cold, 0.5 * head.sample(z, flow_steps=8, generator=generator()))


def two_gaussians(z: Tensor) -> Tensor:
    """At +-z."""
    sign = torch.where(torch.rand(len(z), 1) < 0.5, 1.0, -1.0)
    return sign * z + 0.2 * torch.randn_like(z)


def energy_distance(x: Tensor, y: Tensor) -> float:
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


@pytest.mark.parametrize(
    "build", [lambda: FlowHead(2, 2, width=48, depth=2), lambda: MixtureHead(2, 8, components=4)], ids=["flow", "mixture"]
)
def test_samples_approach_a_mixture_that_depends_on_z(build) -> None:
    torch.manual_seed(0)
    head = build()
    # The mixture head is linear in z: something has to come before it, as a backbone does.
    before_head = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, head.cond_dim))
    parameters = [*head.parameters(), *before_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    def distance() -> float:
        total = 0.0
        for angle in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
            z = angle.expand(400, 2)
            total += energy_distance(head.sample(before_head(z).detach(), generator=generator(1)), two_gaussians(z))
        return total

    before = distance()
    for _ in range(600):
        angle = 6.2832 * torch.rand(128)
        z = torch.stack((angle.cos(), angle.sin()), 1)
        loss = head.loss(before_head(z), two_gaussians(z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.15 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CategoricalHead(5, 2).sample(torch.zeros(1, 2), top_k=6),
            "top_k is 6; allowed: 1 to 5, the vocabulary, or 0 for all",
        ),
        (lambda: CategoricalOptions(top_k=-1), "top_k is -1"),
        (lambda: CategoricalOptions(top_p=0.0), "top_p is 0.0; allowed: above 0 to 1"),
        (lambda: CategoricalHeadConfig(label_smoothing=1.0), "label_smoothing is 1.0; allowed: 0 up to below 1"),
        (lambda: CategoricalHead(5, 2).loss(torch.zeros(1, 2), torch.zeros(1)), r"of torch.float32; allowed: [M, 2], [M] integers"),
        (lambda: MixtureOptions(candidates=0), "candidates is 0"),
        (lambda: MixtureHeadConfig(min_std=0.0), "min_std is 0.0; allowed: above 0"),
        (lambda: FlowOptions(flow_steps=0), "flow_steps is 0"),
        (lambda: FlowOptions(solver="rk4"), "solver is 'rk4'; allowed: euler, heun"),
        (
            lambda: FlowHead(2, 2, width=4, depth=1).sample(torch.zeros(1, 2), diffusion_steps=5),
            "the flow head does not have; allowed: flow_steps, solver",
        ),
        (
            lambda: RegressionHead(2, 2, width=4).sample(torch.zeros(1, 2), top_k=5),
            "the regression head does not have; allowed: none",
        ),
        (
            lambda: RegressionHead(2, 2, width=4).sample(torch.zeros(1, 2), temperature=0.5),
            "a regression head draws nothing; allowed: 1.0",
        ),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
