"""What every condition of the closed table must do, with every backbone; what a backbone makes of several condition tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from continuar.checkpoints.mar import official_parts
from continuar.checkpoints.store import CONFIG, WEIGHTS, PipelineConfig
from continuar.config import from_json, members, to_json
from continuar.errors import UserError
from continuar.heads import FlowHeadConfig, FlowOptions
from continuar.io import read_tensors, write_tensors
from continuar.models import BackboneConfig, CausalConfig, MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.models.conditions import ConditionConfig, LabelsConfig, VectorsConfig
from continuar.orders import MAROrderConfig, RandomOrderConfig, View
from continuar.pipeline import Pipeline
from continuar.sampling.generate import SamplingInput, generate
from continuar.tensors import batched_gather
from continuar.tokenizers import TokenSpec
from continuar.training.estimate import generation_flops, training_flops
from tests.tiny import SMALL, TOKENIZER, options_of, random_tokens, shaken

N = 16
TABLE: dict[type, dict[str, Any]] = {LabelsConfig: {}, VectorsConfig: {"dim": 5, "count": 2}}


def model_config(backbone: Any, condition: ConditionConfig, **values: Any) -> ModelConfig:
    """A small model with a flow head, whose guidance at scale 0 is exactly its unconditional half."""
    order = RandomOrderConfig() if backbone is CausalConfig else MAROrderConfig()
    parts = backbone(**SMALL[backbone] | values), FlowHeadConfig(**SMALL[FlowHeadConfig])
    return ModelConfig(TOKENIZER.spec, 3 if condition.labelled else 0, order, *parts, condition)


CONFIGS = [model_config(b, c(**TABLE[c])) for b in members(BackboneConfig) for c in members(ConditionConfig)]
every_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.backbone.kind}-{c.condition.kind}")
both_backbones = pytest.mark.parametrize("backbone", members(BackboneConfig), ids=lambda b: b.kind)


def values_of(config: ModelConfig, batch: int, seed: int = 0) -> Tensor:
    """Condition values that the model takes."""
    generator, condition = torch.Generator().manual_seed(seed), config.condition
    if isinstance(condition, VectorsConfig):
        return torch.randn(batch, condition.count, condition.dim, generator=generator)
    return torch.arange(batch) % config.classes


@every_model
def test_dropped_rows_are_null_as_often_as_asked_and_others_untouched(config: ModelConfig) -> None:
    rows, share = 20_000, 0.1
    condition = shaken(config).condition
    values = values_of(config, rows)
    torch.manual_seed(0)
    plain, dropped, null = condition(values), condition(values, share), condition.null(rows)
    assert plain.shape == null.shape == (rows, config.condition.count, config.backbone.width)
    is_null = (dropped == null).flatten(1).all(1)
    assert torch.equal(dropped[~is_null], plain[~is_null])
    assert not (plain == null).flatten(1).all(1).any()
    spread = (share * (1 - share) / rows) ** 0.5
    assert abs(is_null.float().mean().item() - share) < 4 * spread
    assert torch.equal(condition(values, 0.0), plain)


@every_model
def test_null_is_what_guidance_sees_as_its_unconditional_half(config: ModelConfig) -> None:
    model, seeds = shaken(config), torch.tensor([4, 5])
    told = SamplingInput.blank(config.tokens, seeds, 5 * values_of(config, 2))
    if config.condition.labelled:
        told = SamplingInput.blank(config.tokens, seeds, values_of(config, 2))
    untold = SamplingInput.blank(config.tokens, seeds)
    options = options_of(config, guidance_schedule="constant")
    only_null = generate(model, told, options.override(guidance_scale=0.0))
    without = generate(model, untold, options.override(guidance_scale=1.0))
    torch.testing.assert_close(only_null, without, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(generate(model, told, options.override(guidance_scale=1.0)), without, rtol=1e-2, atol=1e-2)


@every_model
def test_the_loss_hears_the_condition_and_reaches_every_parameter(config: ModelConfig) -> None:
    model, view = shaken(config), View(torch.rand(6, N).argsort(dim=1), 5)
    tokens, values = random_tokens(config, 6, 0), values_of(config, 6)

    def loss(*condition: Any) -> Tensor:
        torch.manual_seed(0)
        return model.loss(tokens, condition[0], view, *condition[1:])

    assert not torch.allclose(loss(values), loss(None))
    torch.testing.assert_close(loss(values, 0.0), loss(values))
    loss(values, 0.5).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_model
def test_an_image_does_not_depend_on_its_batch(config: ModelConfig) -> None:
    model, options, seeds = shaken(config), options_of(config), [7, -3, 2**40]
    values = values_of(config, 3)
    together = generate(model, SamplingInput.blank(config.tokens, torch.tensor(seeds), values), options)
    for i, seed in enumerate(seeds):
        alone = generate(model, SamplingInput.blank(config.tokens, torch.tensor([seed]), values[i : i + 1]), options)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)


@every_model
def test_saving_and_loading_gives_the_same_tokens_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")[: config.classes]
    pipe = Pipeline(PipelineConfig(config, TOKENIZER, names, options_of(config)), shaken(config))
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "m"), device="cpu")
    assert again.config == pipe.config
    start = SamplingInput.blank(config.tokens, torch.tensor([1, 2]), values_of(config, 2))
    assert torch.equal(*(generate(p.model, start, p.defaults) for p in (pipe, again)))
    # Without labels the pipeline generates unconditionally, whatever the model's condition is.
    unconditional = generate(pipe.model, SamplingInput.blank(config.tokens, torch.tensor([1, 2])), pipe.defaults)
    assert torch.equal(again.tokens(seeds=[1, 2], engine="eager"), unconditional)
    assert from_json(ModelConfig, to_json(config)) == config


def test_files_of_before_the_conditions_are_read(tmp_path: Path) -> None:
    pipe = Pipeline(PipelineConfig(CONFIGS[0], TOKENIZER, ("ant", "bee", "cat"), options_of(CONFIGS[0])), shaken(CONFIGS[0]))
    saved = pipe.save_pretrained(tmp_path / "m")
    config, weights = json.loads((saved / CONFIG).read_text()), read_tensors(saved / WEIGHTS)
    del config["model"]["condition"]
    weights["class_embedding.weight"] = weights.pop("condition.embedding")
    (saved / CONFIG).write_text(json.dumps(config))
    write_tensors(saved / WEIGHTS, weights)
    assert torch.equal(Pipeline.from_pretrained(saved, device="cpu").tokens([0, 2], 3), pipe.tokens([0, 2], 3))


def test_the_last_label_is_the_null_condition_and_no_classes_leave_only_it() -> None:
    labels = shaken(CONFIGS[0]).condition
    assert torch.equal(labels(torch.tensor([3, 3])), labels.null(2))
    unconditional = shaken(replace(CONFIGS[0], classes=0))
    assert unconditional.condition.null(4).shape == (4, 1, 32)
    assert sum(p.numel() for p in unconditional.condition.parameters()) == 32


@both_backbones
@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, N - 1))
def test_predict_after_commit_equals_forward_for_every_number_of_condition_tokens(backbone: Any, count: int, known: int) -> None:
    config = model_config(backbone, VectorsConfig(5, count))
    model = shaken(config)
    cond, x = model.condition(values_of(config, 2)), model.token_embedding(random_tokens(config, 2, 1))
    view = View(torch.rand(2, N, generator=torch.Generator().manual_seed(known)).argsort(dim=1), known)
    with torch.no_grad():
        state = model.backbone.start(cond, N)
        model.backbone.commit(state, view.known_BK, batched_gather(x, view.known_BK))
        stepwise = model.backbone.predict(state, view.query_BQ[:, :1])
        torch.testing.assert_close(stepwise, model.backbone(x, cond, view)[:, :1], rtol=1e-4, atol=1e-5)


@both_backbones
def test_every_condition_token_is_heard_and_so_is_their_order(backbone: Any) -> None:
    config = model_config(backbone, VectorsConfig(5, 3))
    model, x = shaken(config), torch.zeros(1, N, 32)
    view = View(torch.arange(N)[None], 2)

    def z(values: Tensor) -> Tensor:
        return model.backbone(x, model.condition(values), view).detach()

    values = values_of(config, 1)
    for i in range(3):
        changed = values.clone()
        changed[:, i] += 1
        assert (z(changed) - z(values)).abs().max() > 1e-3
    assert (z(values[:, [1, 0, 2]]) - z(values)).abs().max() > 1e-3


def test_condition_tokens_are_repeated_until_the_buffer_is_full() -> None:
    mae = MAEConfig(**SMALL[MAEConfig] | {"buffer": 7}).build((4, 4)).eval()
    cond = torch.randn(2, 3, 32)
    x, known = torch.randn(2, 4, 32), torch.arange(4).expand(2, 4)
    full = cond[:, [0, 1, 2, 0, 1, 2, 0]]
    assert torch.equal(mae.encode(x, known, cond), mae.encode(x, known, full))
    one = cond[:, :1]
    assert torch.equal(mae.encode(x, known, one), mae.encode(x, known, one.expand(-1, 7, -1)))


def test_a_causal_backbone_reads_any_number_of_condition_tokens_as_a_prefix() -> None:
    config = model_config(CausalConfig, VectorsConfig(5, 40))
    assert (
        generate(shaken(config), SamplingInput.blank(config.tokens, torch.tensor([1]), values_of(config, 1)), options_of(config))
        .isfinite()
        .all()
    )


def test_flops_are_counted_for_every_condition() -> None:
    few, many = (model_config(CausalConfig, VectorsConfig(5, count)) for count in (1, 9))
    assert training_flops(few) < training_flops(many)
    for config in CONFIGS:
        assert generation_flops(config, options_of(config)) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: model_config(MAEConfig, VectorsConfig(5, 4)),
            "a condition of 4 tokens does not fit into the buffer of 3; allowed: 1 to 3",
        ),
        (lambda: replace(CONFIGS[0], condition=VectorsConfig(5)), "classes is 3 with a condition of vectors, which has no classes"),
        (lambda: replace(CONFIGS[0], classes=-1), "classes is -1; allowed: 0 or more"),
        (lambda: VectorsConfig(5, 0), "condition.count is 0; allowed: 1 or more"),
        (lambda: VectorsConfig(0), "condition.dim is 0; allowed: 1 or more"),
    ],
)
def test_conditions_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LabelsConfig, torch.zeros(2), r"the condition is torch.float32 \[2\]; allowed: int64 labels \[B\], 0 to 3"),
        (LabelsConfig, torch.zeros(2, 1, dtype=torch.int64), r"torch.int64 \[2, 1\]; allowed: int64 labels"),
        (VectorsConfig, torch.zeros(2, dtype=torch.int64), r"torch.int64 \[2\]; allowed: floats \[B, 2, 5\]"),
        (VectorsConfig, torch.zeros(2, 2, 4), r"torch.float32 \[2, 2, 4\]; allowed: floats \[B, 2, 5\]"),
    ],
)
def test_values_of_another_shape_or_type_are_refused(kind: type, values: Tensor, message: str) -> None:
    config = next(c for c in CONFIGS if type(c.condition) is kind)
    with pytest.raises(UserError, match=message):
        generate(shaken(config), SamplingInput.blank(config.tokens, torch.tensor([1, 2]), values), options_of(config))


def test_the_official_layout_has_no_place_for_vectors() -> None:
    with pytest.raises(UserError, match="condition is 'vectors', which the official MAR layout has no place for; allowed: labels"):
        official_parts(model_config(MAEConfig, VectorsConfig(5)))


@both_backbones
def test_sequences_of_vectors_are_learned_by_heart(backbone: Any) -> None:
    """Four words of two letters over one alphabet, an image each: only a model that reads both letters tells them apart."""
    letters = torch.eye(2)
    words = torch.stack([torch.stack((letters[i], letters[j])) for i in range(2) for j in range(2)])
    config = model_config(backbone, VectorsConfig(2, 2), attention_dropout=0.0, dropout=0.0)
    masks = {"mask_ratio_min": 0.0} if backbone is MAEConfig else {}
    config = replace(config, tokens=TokenSpec((2, 2), 2), backbone=replace(config.backbone, **masks))
    torch.manual_seed(0)
    model, images = config.build().train(), torch.randn(4, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    which = torch.arange(24) % 4
    for _ in range(200):
        loss = model.loss(images[which], words[which], model.training_view(24, torch.device("cpu"))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    options = options_of(config, steps=None, guidance_scale=1.0)
    assert isinstance(options.head, FlowOptions)
    drawn = generate(model.eval(), SamplingInput.blank(config.tokens, which, words[which]), options.override(flow_steps=20))
    far = (drawn[:, None] - images).square().flatten(2).sum(-1)
    assert (far.argmin(1) == which).float().mean() > 0.85
