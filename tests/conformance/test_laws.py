"""The laws of docs/architecture.md, over every backbone x order x head of the closed tables."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continuar.config import from_json, members, to_json
from continuar.errors import UserError
from continuar.heads import HeadConfig
from continuar.models.autoregressive import Model, ModelConfig
from continuar.orders import OrderConfig, View
from continuar.pipeline import Pipeline
from continuar.sampling.generate import SamplingInput, generate, stream
from continuar.tensors import batched_gather
from continuar.tokenizers import TokenSpec
from tests.tiny import model_configs, name, options_of, pipeline, random_tokens, shaken, takes_steps

CONFIGS = model_configs()
every_model = pytest.mark.parametrize("config", CONFIGS, ids=name)
N = 16


def start_of(model: Model, seeds: list[int], labels: list[int], known: torch.Tensor | None = None) -> SamplingInput:
    """A start with random values at known positions."""
    known = torch.zeros(len(seeds), N, dtype=torch.bool) if known is None else known
    return SamplingInput(torch.tensor(labels), torch.tensor(seeds), random_tokens(model.config, len(seeds), 3), known)


def known_mask(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(batch, N, dtype=torch.bool).scatter_(1, order[:, :count], True)


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two batches of tokens are apart: relative to the largest value, or the share of ids that differ."""
    if not a.is_floating_point():
        return (a != b).float().mean().item()
    return ((a - b).abs().max() / a.abs().max()).item()


def test_every_row_of_the_comparison_is_among_the_models() -> None:
    found = {(c.backbone.kind, c.order.kind, c.head.kind) for c in CONFIGS}
    heads = ["diffusion", "flow", "categorical", "mixture", "regression"]
    rows = [("causal", "raster"), ("causal", "random"), ("mae", "random"), ("mae", "mar")]
    assert found >= {(*row, head) for row, head in itertools.product(rows, heads)} | {("mae", "confidence", "categorical")}


@every_model
@settings(max_examples=12)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
def test_predict_after_commit_equals_the_teacher_forced_forward(config: ModelConfig, groups: list[int], seed: int) -> None:
    model = shaken(config)
    largest = config.backbone.max_group or N
    torch.manual_seed(seed)
    order = model.order.training_order(2, torch.device("cpu"))
    cond, x = model.condition(torch.tensor([0, 2])), model.token_embedding(random_tokens(config, 2, seed))
    with torch.no_grad():
        state, known = model.backbone.start(cond, N), 0
        # The first group is given from the start, without a prediction: that is how known tokens come in.
        for number, size in enumerate(groups):
            if known + size >= N:
                break
            for part in order[:, known : known + size].split(size if number == 0 else largest, dim=1):
                if number > 0:
                    model.backbone.predict(state, part)
                model.backbone.commit(state, part, batched_gather(x, part))
            known += size
        view = View(order, known)
        query = view.query_BQ[:, :largest]
        stepwise = model.backbone.predict(state, query)
        forced = model.backbone(x, cond, view)
    assert forced.shape == (2, N - known, model.backbone.z_dim)
    torch.testing.assert_close(stepwise, forced[:, : query.shape[1]], rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("known", [0, 5, N - 1])
def test_every_position_is_committed_exactly_once(config: ModelConfig, known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(config)
    real = model.backbone.commit
    counts = [1, 3, N] if takes_steps(config) else [None]
    for steps in counts:
        committed = torch.zeros(2, N, dtype=torch.int64)

        def spy(state, index_BK, x_BKE, committed=committed):
            committed.scatter_add_(1, index_BK, torch.ones_like(index_BK))
            real(state, index_BK, x_BKE)

        monkeypatch.setattr(model.backbone, "commit", spy)
        options = options_of(config, steps=steps, guidance_scale=1.0)
        generate(model, start_of(model, [0, 1], [0, 1], known_mask(2, known)), options)
        assert (committed == 1).all()


@every_model
def test_an_image_does_not_depend_on_its_batch(config: ModelConfig) -> None:
    model, options = shaken(config), options_of(config)
    seeds, labels = [5, -9, 2**40, 0, 7], [0, 1, 2, 3, 0]
    together = generate(model, start_of(model, seeds, labels), options)
    alone = [generate(model, start_of(model, [s], [c]), options) for s, c in zip(seeds, labels, strict=True)]
    turned = generate(model, start_of(model, seeds[::-1], labels[::-1]), options).flip(0)
    for other in (torch.cat(alone), turned):
        assert away(together, other) < 1e-3
    if config.head.kind != "regression":  # it has no randomness but the order's
        assert away(together[0], together[4]) > 0.1


@every_model
@pytest.mark.parametrize("known", [0, 4, N])
def test_known_tokens_come_back_unchanged(config: ModelConfig, known: int) -> None:
    model = shaken(config)
    start = start_of(model, [1, 2], [0, 1], known_mask(2, known))
    out = generate(model, start, options_of(config))
    assert torch.equal(out[start.known_BN], start.tokens[start.known_BN])
    assert torch.isfinite(out).all()


@every_model
def test_stream_shows_every_step_with_more_known(config: ModelConfig) -> None:
    model, options = shaken(config), options_of(config)
    counts = [int(p.known_BN.sum(1).unique()) for p in stream(model, start_of(model, [0, 1], [0, 1]), options)]
    assert len(counts) == len(model.order.group_sizes(options.steps, N))
    assert counts == sorted(set(counts))
    assert counts[-1] == N


@every_model
def test_guidance_of_one_is_no_guidance_and_more_changes_the_image(config: ModelConfig) -> None:
    model = shaken(config)
    with torch.no_grad():  # conditions far from the null condition
        model.condition.embedding.mul_(5)
    start = start_of(model, [1, 2], [0, 1])
    # One candidate: the mixture head chooses among as many as guidance asks for, and so does not draw the same one otherwise.
    single = {"candidates": 1} if config.head.kind == "mixture" else {}
    plain, one = (generate(model, start, options_of(config, guidance_scale=g, **single)) for g in (1.0, 1.0 + 1e-9))
    assert away(plain, one) < 1e-3
    weak, strong = (generate(model, start, options_of(config, guidance_scale=g)) for g in (1.0 + 1e-9, 8.0))
    assert away(weak, strong) > 1e-2


@every_model
def test_lower_temperature_is_less_diverse_and_zero_has_no_noise(config: ModelConfig) -> None:
    model = shaken(config)
    if config.head.kind == "regression":
        with pytest.raises(UserError, match=r"temperature is 0\.5; a regression head draws nothing"):
            options_of(config, temperature=0.5)
        return
    z = torch.randn(1, model.backbone.z_dim, generator=torch.Generator().manual_seed(0)).expand(200, -1)

    def spread(temperature: float) -> float:
        steps = {k: v for k, v in options_of(config).to_dict().items() if k in ("diffusion_steps", "flow_steps")}
        drawn = model.head.sample(z, temperature=temperature, generator=torch.Generator().manual_seed(1), **steps)
        if not drawn.is_floating_point():
            return float(len(drawn.unique()) - 1)
        return drawn.std(0).mean().item()

    cold, cool, warm = spread(0.0), spread(0.3), spread(1.0)
    # The initial noise of a diffusion and the component of a mixture are not scaled: some spread is left at zero.
    assert cold <= cool < warm
    if config.head.kind in ("flow", "categorical"):
        assert cold < 1e-6


@every_model
def test_saving_and_loading_gives_the_same_images_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    pipe = pipeline(config)
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "m"), device="cpu")
    assert again.config == pipe.config
    assert torch.equal(pipe.tokens([0, 1], [3, 4]), again.tokens([0, 1], [3, 4]))
    assert np.array_equal(pipe([0, 1], [3, 4]), again([0, 1], [3, 4]))


@every_model
def test_bfloat16_storage_rounds_the_weights_once(config: ModelConfig, tmp_path: Path) -> None:
    model = shaken(config)
    expected = {k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()}
    saved = pipeline(config, model).save_pretrained(tmp_path / "m", torch.bfloat16)
    loaded = Pipeline.from_pretrained(saved, device="cpu").model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())


@every_model
def test_loss_is_finite_per_queried_token_and_reaches_every_parameter(config: ModelConfig) -> None:
    model = shaken(config).train()
    torch.manual_seed(0)
    view = View(torch.rand(3, N).argsort(dim=1), 5)
    loss = model.loss(random_tokens(config, 3, 0), torch.tensor([0, 1, 2]), view, condition_dropout=0.5)
    assert loss.shape == (3, N - 5)
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("config", [c for c in CONFIGS if "rotary" not in name(c) or c.order.kind == "mar"], ids=name)
def test_a_few_short_sequences_are_learned_by_heart(config: ModelConfig) -> None:
    """Four tokens an image, one image per class: after a few seconds sampling gives them back."""
    spec = TokenSpec((2, 2), config.tokens.dim and 2, config.tokens.vocabulary)
    small = ModelConfig(spec, 3, config.order, still(config.backbone), larger(config.head))
    torch.manual_seed(0)
    model = small.build().train()
    images, labels = random_tokens(small, 3, 0), torch.arange(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    # A mixture begins with one component per image whatever the class, and takes long to leave that (0.79 to 1 over five seeds).
    updates, wanted = (1000, 0.65) if config.head.kind == "mixture" else (350, 0.85)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        view = model.training_view(24, torch.device("cpu"))
        loss = model.loss(images[labels.repeat(8)], labels.repeat(8), view).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    given = options_of(small, steps=None, guidance_scale=1.0)
    steps = {k: 50 for k in ("diffusion_steps", "flow_steps") if k in given.to_dict()}
    start = SamplingInput(labels.repeat(8), torch.arange(24), spec.blank(24), torch.zeros(24, 4, dtype=torch.bool))
    drawn = generate(model.eval(), start, given.override(**steps))
    # Which of the three images does each drawn token belong to? Guessing would be right for a third.
    far = (drawn[:, None] - images).abs().float().view(24, 3, 4, -1).sum(-1)
    assert (far.argmin(1) == labels.repeat(8)[:, None]).float().mean() > wanted


def still(backbone):
    """The backbone without dropout, trained on every number of known tokens."""
    masks = {"mask_ratio_min": 0.0} if backbone.masked else {}
    return type(backbone)(**{**vars(backbone), "attention_dropout": 0.0, "dropout": 0.0} | masks)


def larger(head):
    """The head, predicting what a short training can learn: an error of eps is multiplied by 300 at the first step."""
    values = {**vars(head)} | ({"prediction": "v_prediction"} if head.kind == "diffusion" else {})
    return type(head)(**values | ({"width": 48} if "width" in values else {}))


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
    assert {"backbone." + table for table in model.backbone.position_tables()} <= {names[id(p)] for p in decayed}


def refused(order: str, backbone: str, head: str) -> str:
    """Why a triple of kinds is refused; empty if it is not."""
    parts = {}
    for config in CONFIGS:
        parts |= {config.backbone.kind: config.backbone, config.order.kind: config.order, config.head.kind: config.head}
    tokens = TokenSpec((4, 4), vocabulary=11) if head == "categorical" else TokenSpec((4, 4), 12)
    try:
        ModelConfig(tokens, 3, parts[order], parts[backbone], parts[head])
    except UserError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize(
    ("triple", "reason"),
    [
        (
            ("mar", "causal", "diffusion"),
            "order 'mar' predicts groups of tokens, a causal backbone one at a time",
        ),
        (("confidence", "causal", "categorical"), "order 'confidence' predicts groups of tokens"),
        (
            ("raster", "mae", "flow"),
            "a mae backbone learns from random masks and would hardly",
        ),
        (("confidence", "mae", "diffusion"), "which a diffusion head does not know; allowed heads: categorical, mixture"),
        (("confidence", "mae", "regression"), "which a regression head does not know; allowed heads: categorical, mixture"),
    ],
)
def test_pairs_that_cannot_work_are_refused_with_the_reason(triple: tuple[str, str, str], reason: str) -> None:
    assert reason in refused(*triple)


def test_every_triple_is_either_a_model_or_refused() -> None:
    found = {(c.order.kind, c.backbone.kind, c.head.kind) for c in CONFIGS}
    orders, backbones, heads = ({getattr(c, part).kind for c in CONFIGS} for part in ("order", "backbone", "head"))
    assert len(orders) == len(members(OrderConfig))
    assert len(heads) == len(members(HeadConfig))
    for triple in itertools.product(orders, backbones, heads):
        assert bool(refused(*triple)) != (triple in found), triple


def test_heads_and_tokens_must_fit() -> None:
    mixture = next(c for c in CONFIGS if c.head.kind == "mixture" and c.order.kind == "mar")
    categorical = next(c for c in CONFIGS if c.head.kind == "categorical" and c.order.kind == "mar")
    with pytest.raises(UserError, match="gives vectors of dim 12, a categorical head makes ids; allowed heads: diffusion"):
        ModelConfig(TokenSpec((4, 4), 12), 3, categorical.order, categorical.backbone, categorical.head)
    with pytest.raises(UserError, match="gives ids of a vocabulary of 11, a mixture head makes vectors; allowed heads"):
        ModelConfig(TokenSpec((4, 4), vocabulary=11), 3, mixture.order, mixture.backbone, mixture.head)


@every_model
def test_steps_that_the_order_cannot_take_are_refused(config: ModelConfig) -> None:
    model = shaken(config)
    expected = "one token per step; allowed: 16, or not given" if config.order.max_group == 1 else None
    for steps, message in ((5, expected), (N + 1, "steps is 17; allowed: 1 to 16")):
        if message is not None:
            with pytest.raises(UserError, match=message):
                generate(model, start_of(model, [0], [0]), options_of(config, steps=steps))


def test_the_engine_refuses_what_would_break_its_laws() -> None:
    model = shaken(CONFIGS[0])
    uneven = torch.zeros(2, N, dtype=torch.bool)
    uneven[0, 0] = uneven[1, :2] = True
    with pytest.raises(UserError, match=r"images of one batch know \[1, 2\] tokens; allowed: equally many"):
        generate(model, start_of(model, [0, 1], [0, 1], uneven), options_of(model.config))
    with pytest.raises(UserError, match="1 conditions for 2 seeds; allowed: one each"):
        generate(model, start_of(model, [0, 1], [0]), options_of(model.config))
    with pytest.raises(UserError, match=r"training mode.*call model.eval\(\) first"):
        generate(model.train(), start_of(model, [0], [0]), options_of(model.config))
