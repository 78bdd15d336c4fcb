"""The DiT baseline: diffusers' transformer, our loss, samplers and noise."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from continuar.config import from_json, to_json
from continuar.diffusion.gaussian import add_noise, training_coefficients, variational_bound, velocity
from continuar.diffusion.samplers import SAMPLERS
from continuar.errors import UserError
from continuar.models import dit
from continuar.models.dit import DiT, DiTConfig, DiTNetworkConfig
from continuar.orders import View
from continuar.tokenizers import TokenSpec

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

CONFIG = DiTConfig(TokenSpec((4, 4), 3), 3, DiTNetworkConfig(patch=2, width=16, depth=2, heads=2))
LABELS, SEEDS = torch.tensor([0, 2, 3, 1]), torch.tensor([7, -1, 2**40, 0])

each_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def shaken(tokens: TokenSpec = CONFIG.tokens, classes: int = 3, **changes: Any) -> DiT:
    """A model whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    model = DiTConfig(tokens, classes, replace(CONFIG.network, **changes)).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def loss_of(model: DiT, tokens: Tensor, labels: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Of a view of the model's own."""
    return model.loss(tokens, labels, model.training_view(len(tokens), tokens.device), dropout)


def inputs(model: DiT, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens and timesteps."""
    spec, generator = model.config.tokens, torch.Generator().manual_seed(1)
    return torch.randn(batch, spec.seq_len, spec.dim, generator=generator), torch.randint(1000, (batch,), generator=generator)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"), [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)]
)
def test_sizes_have_the_published_parameter_counts(width: int, depth: int, heads: int, millions: int) -> None:
    """DiT-S/2, B/2, L/2 and XL/2 on 32 x 32 x 4 latents of ImageNet (Peebles & Xie 2023, Table 4)."""
    with torch.device("meta"):
        network = DiTNetworkConfig(patch=2, width=width, depth=depth, heads=heads)
        model = DiTConfig(TokenSpec((32, 32), 4), 1000, network).build()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_forward_is_diffusers_own_with_one_embedding_in_all_blocks() -> None:
    model = shaken()
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
    ).eval()
    weights = dict(model.transformer.state_dict())
    for i in range(2):
        weights |= {f"transformer_blocks.{i}.norm1.emb.{k}": v for k, v in model.condition.state_dict().items()}
    assert torch.equal(weights.pop("pos_embed.pos_embed"), theirs.pos_embed.pos_embed)
    theirs.load_state_dict(weights)
    x, t = inputs(model)
    with torch.no_grad():
        out, v = model(x, t, LABELS)
        expected = theirs(x.mT.reshape(4, 3, 4, 4), timestep=t, class_labels=LABELS).sample
    torch.testing.assert_close(torch.cat((out, v), -1), expected.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_tokens_lie_on_their_grid_in_raster_order() -> None:
    model, seen = shaken(), []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> tuple[Tensor]:
            seen.append(x)
            return (torch.cat((x, 2 * x), 1),)

    model.transformer = Recorder()
    x, t = inputs(model)
    out, v = model(x, t, LABELS)
    assert torch.equal(seen[0][1, :, 2, 3], x[1, 2 * 4 + 3])
    assert torch.equal(out, x)
    assert torch.equal(v, 2 * x)


@each_prediction
def test_loss_of_a_network_that_says_zero_is_the_closed_form(prediction: str) -> None:
    """As initialised: adaLN and output are zero, so that eps (or the velocity) and v are 0."""
    model = DiTConfig(CONFIG.tokens, 3, DiTNetworkConfig(width=16, depth=1, heads=2, prediction=prediction)).build()
    x0, t = inputs(model)
    c, noise, i = training_coefficients(x0.device), torch.randn_like(x0), t.unsqueeze(-1)
    x = add_noise(c, x0, i, noise)
    terms = model.loss_terms(x0, LABELS, t, noise)
    target = noise if prediction == "epsilon" else velocity(c, x0, i, noise)
    torch.testing.assert_close(terms.mse, target.square().mean(-1))
    eps = torch.zeros_like(x) if prediction == "epsilon" else c.sqrt_one_minus_abar[t][:, None, None] * x
    torch.testing.assert_close(terms.vb, variational_bound(c, eps, torch.zeros_like(x), x0, x, i.expand(4, 16)))
    assert loss_of(model, x0, LABELS, 0.1).shape == (4, 16)


def test_training_lowers_the_loss_and_samples_follow_their_label() -> None:
    torch.manual_seed(0)
    network = DiTNetworkConfig(width=32, depth=1, heads=2, prediction="v_prediction")
    model = DiTConfig(TokenSpec((2, 2), 2), 2, network).build()
    decayed, others = model.parameter_groups()
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(200):
        labels = torch.randint(2, (32,))
        tokens = (2.0 * labels - 1)[:, None, None] + 0.3 * torch.randn(32, 4, 2)
        loss = loss_of(model, tokens, labels, 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) < 0.6 * sum(losses[:20]) * 50 / 20
    labels = torch.tensor([0, 1]).repeat(16)
    for name in SAMPLERS:
        means = model.sample(labels, torch.arange(32), steps=12, sampler=name).mean((1, 2))
        assert ((means > 0) == (labels == 1)).all()
        assert abs(means[labels == 0].mean() + 1) < 0.25
        assert abs(means[labels == 1].mean() - 1) < 0.25


def test_null_label_is_the_last_row_of_the_one_label_embedding() -> None:
    model = shaken().train()
    table = model.condition.class_embedder.embedding_table.weight
    assert (model.null_label, len(table)) == (3, 4)
    assert sum(isinstance(m, nn.Embedding) for m in model.modules()) == 1
    x, _ = inputs(model)
    loss_of(model, x, torch.full((4,), model.null_label)).sum().backward()
    assert table.grad[3].any()
    assert not table.grad[:3].any()


def test_a_dropped_label_is_the_null_label_and_nothing_else_drops_labels() -> None:
    model = shaken().train()
    x, t = inputs(model)

    def loss(labels: Tensor | None, dropout: float) -> Tensor:
        torch.manual_seed(5)
        return loss_of(model, x, labels, dropout)

    null = torch.full((4,), model.null_label)
    assert torch.equal(loss(LABELS, 1.0), loss(null, 1.0))
    assert torch.equal(loss(None, 0.0), loss(null, 0.0))
    assert not torch.equal(loss(LABELS, 0.0), loss(null, 0.0))
    training = [model(x, t, LABELS)[0] for _ in range(2)]
    assert torch.equal(*training)
    assert torch.equal(training[0], model.eval()(x, t, LABELS)[0])


@each_prediction
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_extrapolates_eps_and_one_runs_no_null_condition(prediction: str, name: str) -> None:
    model, w = shaken(prediction=prediction), 1.8
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    x = torch.randn(4 * 16, 3, generator=torch.Generator().manual_seed(2))
    null = torch.full_like(LABELS, model.null_label)
    with torch.no_grad():
        for t in (0, 500, 999):
            (eps, v), (eps_c, v_c), (eps_u, _) = (
                model.denoiser(labels, scale)(x, torch.tensor(t)) for labels, scale in ((LABELS, w), (LABELS, 1.0), (null, 1.0))
            )
            torch.testing.assert_close(eps, eps_u + w * (eps_c - eps_u), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v, v_c, rtol=1e-4, atol=1e-4)
    assert rows == [8, 4, 4] * 3
    # Where both halves have the null condition, there is nothing to extrapolate.
    options: dict[str, Any] = {"steps": 5, "sampler": name}
    torch.testing.assert_close(
        model.sample(null, SEEDS, guidance=3.0, **options), model.sample(null, SEEDS, **options), rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(model.sample(LABELS, SEEDS, guidance=3.0, **options), model.sample(LABELS, SEEDS, **options))


@each_prediction
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(prediction: str, name: str) -> None:
    model = shaken(prediction=prediction)
    options: dict[str, Any] = {"steps": 6, "guidance": 1.5, "sampler": name}
    together = model.sample(LABELS, SEEDS, **options)
    assert together.shape == (4, 16, 3)
    assert together.isfinite().all()
    alone = torch.cat([model.sample(LABELS[i : i + 1], SEEDS[i : i + 1], **options) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together, model.sample(LABELS, SEEDS + 1, **options), rtol=0.05, atol=0.05)


def test_temperature_changes_ddpm_alone() -> None:
    model = shaken(prediction="v_prediction")
    assert not torch.equal(
        model.sample(LABELS, SEEDS, steps=5, temperature=0.5), model.sample(LABELS, SEEDS, steps=5, temperature=1.0)
    )


def test_bfloat16_autocast_keeps_outputs_in_float32_and_the_loss_close() -> None:
    model = shaken()
    x, t = inputs(model)
    noise = torch.randn_like(x)
    full = model.loss_terms(x, LABELS, t, noise).total
    with torch.autocast("cpu", torch.bfloat16):
        out, v = model(x, t, LABELS)
        half = model.loss_terms(x, LABELS, t, noise).total
    assert (out.dtype, v.dtype, half.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(half.mean(), full.mean(), rtol=0.03, atol=0.0)


def test_it_survives_copying_json_and_groups_each_parameter_once() -> None:
    model = shaken()
    again = from_json(DiTConfig, json.loads(json.dumps(to_json(CONFIG)))).build().eval()
    assert again.config == CONFIG
    again.load_state_dict(model.state_dict())
    x, t = inputs(model)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(x, t, LABELS)[0], model(x, t, LABELS)[0])
    decayed, others = model.parameter_groups()
    assert {id(p) for p in (*decayed, *others)} == {id(p) for p in model.parameters()}
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert all(p.ndim == 1 for p in others)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": TokenSpec((4, 4), vocabulary=8)}, "DiT takes vector tokens; these are ids"),
        ({"tokens": TokenSpec((4, 2), 3)}, r"token grid is \(4, 2\); allowed for DiT: a square"),
        ({"classes": -1}, "classes is -1; allowed: 0 or more"),
        ({"patch": 3}, "network.patch is 3; allowed: divisors of 4"),
        ({"patch": 0}, "network.patch is 0; allowed: 1 or more"),
        ({"width": 18}, "network.width is 18; allowed: multiples of 4"),
        ({"heads": 3}, "network.width 16 is not divisible by its 3 heads"),
        ({"prediction": "x0"}, "network.prediction is 'x0'; allowed: epsilon, v_prediction"),
    ],
)
def test_configs_that_cannot_work_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shaken(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds_B": SEEDS[:2]}, r"labels are \(4,\) and seeds \(2,\); allowed: \[B\] and \[B\]"),
        ({"sampler": "euler"}, "sampler is 'euler'; allowed: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde"),
        ({"steps": 0}, "diffusion steps is 0; allowed: 1 to 1000"),
        ({"steps": 981, "sampler": "dpmpp_2m"}, "diffusion steps is 981; allowed: 1 to 980"),
        ({"temperature": 0.9, "sampler": "dpmpp_2m"}, "temperature is 0.9 with the sampler 'dpmpp_2m', which adds no noise"),
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        ({"guidance": float("inf")}, "guidance is inf; allowed: 0 or more, finite"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shaken().sample(**({"labels_B": LABELS, "seeds_B": SEEDS} | options))


def test_an_unconditional_model_has_the_null_label_alone() -> None:
    model = shaken(classes=0)
    labels = torch.full((2,), model.null_label)
    assert model.null_label == 0
    assert model.sample(labels, SEEDS[:2], steps=2).shape == (2, 16, 3)


def test_the_package_imports_without_diffusers_which_is_asked_for_when_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("dit_without_diffusers", dit.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=r"the DiT baseline needs diffusers: pip install 'continuar\[diffusers\]'"):
        module.DiTConfig(CONFIG.tokens, 3).build()


def test_the_loss_is_given_in_the_order_of_the_view_and_noted_by_time() -> None:
    model = shaken()
    model.time_losses = torch.zeros(2, 4)
    x, _ = inputs(model)
    losses = []
    for order in (torch.arange(16), torch.arange(15, -1, -1)):
        torch.manual_seed(3)
        losses.append(model.loss(x, LABELS, View(order.expand(4, -1), 0)))
    assert torch.equal(losses[0], losses[1].flip(1))
    assert model.time_losses[1].sum() == 8
    torch.testing.assert_close(model.time_losses[0].sum(), 2 * losses[0].mean(1).sum())
    with pytest.raises(AssertionError, match="5 tokens of the view are known; DiT predicts all"):
        model.loss(x, LABELS, View(torch.arange(16).expand(4, -1), 5))
