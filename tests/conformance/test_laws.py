"""The laws of docs/architecture.md, over every backbone x order x head of the closed tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.configs import from_json, to_json
from continuar.generation.eager import Start, generate, stream
from continuar.generation.plan import SamplingOptions
from continuar.model import Model, ModelConfig
from continuar.orders import View
from continuar.pipeline import Pipeline
from tests.tiny import OPTIONS, model_configs, model_file, name, shaken

CONFIGS = model_configs()
every_model = pytest.mark.parametrize("config", CONFIGS, ids=name)
N = 16


def start_of(model: Model, seeds: list[int], labels: list[int], known: torch.Tensor | None = None) -> Start:
    """A start with random values at known positions."""
    batch = len(seeds)
    known = torch.zeros(batch, N, dtype=torch.bool) if known is None else known
    values = torch.randn(batch, N, model.config.tokens.dim, generator=torch.Generator().manual_seed(3))
    return Start(torch.tensor(labels), torch.tensor(seeds), values, known)


def known_mask(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(batch, N, dtype=torch.bool).scatter_(1, order[:, :count], True)


@every_model
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
def test_predict_after_commit_equals_the_teacher_forced_forward(config: ModelConfig, groups: list[int], seed: int) -> None:
    model = shaken(config)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, N, generator=generator).argsort(dim=1)
    tokens = torch.randn(2, N, config.tokens.dim, generator=generator)
    cond, x = model.condition(torch.tensor([0, 2])), model.token_embedding(tokens)
    with torch.no_grad():
        state, known = model.backbone.start(cond, N), 0
        for size in groups:
            if known + size >= N:
                break
            index = order[:, known : known + size]
            model.backbone.predict(state, index)
            model.backbone.commit(state, index, x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1])))
            known += size
        view = View(order, known)
        stepwise = model.backbone.predict(state, view.query_BQ)
        forced = model.backbone(x, cond, view)
    assert stepwise.shape == (2, N - known, model.backbone.z_dim)
    torch.testing.assert_close(stepwise, forced, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("steps", [1, 3, N])
@pytest.mark.parametrize("known", [0, 5, N - 1])
def test_every_position_is_committed_exactly_once(
    config: ModelConfig, steps: int, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shaken(config)
    committed = torch.zeros(2, N, dtype=torch.int64)
    real = model.backbone.commit

    def spy(state, index_BK, x_BKE):
        committed.scatter_add_(1, index_BK, torch.ones_like(index_BK))
        real(state, index_BK, x_BKE)

    monkeypatch.setattr(model.backbone, "commit", spy)
    generate(model, start_of(model, [0, 1], [0, 1], known_mask(2, known)), SamplingOptions(steps=steps, diffusion_steps=2))
    assert (committed == 1).all()


@every_model
def test_an_image_does_not_depend_on_its_batch(config: ModelConfig) -> None:
    model = shaken(config)
    seeds, labels = [5, -9, 2**40, 0, 7], [0, 1, 2, 3, 0]
    together = generate(model, start_of(model, seeds, labels), OPTIONS)
    alone = [generate(model, start_of(model, [s], [c]), OPTIONS) for s, c in zip(seeds, labels, strict=True)]
    turned = generate(model, start_of(model, seeds[::-1], labels[::-1]), OPTIONS).flip(0)
    scale = together.abs().max()
    for other in (torch.cat(alone), turned):
        assert (together - other).abs().max() < 1e-3 * scale
    assert (together[0] - together[4]).abs().max() > 0.1 * scale


@every_model
@pytest.mark.parametrize("known", [0, 4, N])
def test_known_tokens_come_back_unchanged(config: ModelConfig, known: int) -> None:
    model = shaken(config)
    start = start_of(model, [1, 2], [0, 1], known_mask(2, known))
    out = generate(model, start, OPTIONS)
    assert torch.equal(out[start.known_BN], start.tokens_BND[start.known_BN])
    assert torch.isfinite(out).all()


@every_model
def test_stream_shows_every_step_with_more_known(config: ModelConfig) -> None:
    model = shaken(config)
    counts = [int(p.known_BN.sum(1).unique()) for p in stream(model, start_of(model, [0, 1], [0, 1]), OPTIONS)]
    assert len(counts) == OPTIONS.steps
    assert counts == sorted(set(counts))
    assert counts[-1] == N


@every_model
def test_guidance_of_one_is_no_guidance_and_more_changes_the_image(config: ModelConfig) -> None:
    model = shaken(config)
    start = start_of(model, [1, 2], [0, 1])
    plain, one, three = (generate(model, start, OPTIONS.override(guidance=g)) for g in (1.0, 1.0 + 1e-9, 3.0))
    scale = plain.abs().max()
    assert (plain - one).abs().max() < 1e-3 * scale
    assert (plain - three).abs().max() > 1e-2 * scale


@every_model
def test_saving_and_loading_gives_the_same_tokens_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    pipe = Pipeline(model_file(config), shaken(config))
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "m"), device="cpu")
    assert again.file == pipe.file
    assert torch.equal(pipe.tokens([0, 1], [3, 4]), again.tokens([0, 1], [3, 4]))


@every_model
def test_bfloat16_storage_rounds_the_weights_once(config: ModelConfig, tmp_path: Path) -> None:
    model = shaken(config)
    expected = {k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()}
    saved = Pipeline(model_file(config), model).save_pretrained(tmp_path / "m", torch.bfloat16)
    loaded = Pipeline.from_pretrained(saved, device="cpu").model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())


@every_model
def test_loss_is_finite_per_queried_token_and_reaches_every_parameter(config: ModelConfig) -> None:
    model = shaken(config).train()
    torch.manual_seed(0)
    view = View(torch.rand(3, N).argsort(dim=1), 5)
    loss = model.loss(torch.randn(3, N, config.tokens.dim), torch.tensor([0, 1, 2]), view, label_dropout=0.5)
    assert loss.shape == (3, N - 5)
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@every_model
def test_loss_falls_on_a_few_images(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = config.build().train()
    tokens, labels = torch.randn(4, N, config.tokens.dim), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = model.loss(tokens, labels, model.order.training_view(4, torch.device("cpu"))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:20])


@every_model
def test_config_survives_json(config: ModelConfig) -> None:
    assert from_json(ModelConfig, to_json(config)) == config


@every_model
def test_no_weight_decay_on_biases_norms_and_the_head(config: ModelConfig) -> None:
    model = config.build()
    decayed, others = model.parameter_groups()
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    for parameter in decayed:
        assert not names[id(parameter)].startswith("head.")
        assert not names[id(parameter)].endswith("bias")
        assert "norm" not in names[id(parameter)]
    assert any("mask_token" in names[id(p)] or "positions" in names[id(p)] for p in decayed)
