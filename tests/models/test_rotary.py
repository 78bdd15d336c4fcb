"""Rotary positions: scores depend on offsets alone, in both backbones, and nothing else has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from continuar.checkpoints.mar import export_official
from continuar.config import from_json, members, to_json
from continuar.errors import UserError
from continuar.models import BackboneConfig, CausalConfig, MAEConfig
from continuar.models.positions import BASE, NO_POSITION, Rotary, Rotation, apply_rotary
from continuar.models.transformer import Attention
from continuar.orders import View
from continuar.training.engines import EagerEngine
from continuar.training.finetune import at_grid, begin_from
from tests.tiny import SMALL, TOKENIZER, model_configs, name, pipeline, random_tokens, shaken

ROTARY = [c for c in model_configs() if c.backbone.positions == "rotary"]
every_rotary = pytest.mark.parametrize("config", ROTARY, ids=name)
GRID = (32, 32)
places = st.tuples(st.integers(0, 15), st.integers(0, 15))
offsets = st.tuples(st.integers(0, 16), st.integers(0, 16))


def index_of(place: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> int:
    return (place[0] + offset[0]) * GRID[1] + place[1] + offset[1]


@given(places, places, offsets, st.integers(0, 1000))
def test_scores_depend_on_the_offset_alone(p: tuple, r: tuple, offset: tuple, seed: int) -> None:
    q, k = torch.randn(2, 1, 2, 1, 24, generator=torch.Generator().manual_seed(seed))
    rotary = Rotary(GRID, 24)

    def score(shift: tuple[int, int]) -> Tensor:
        at = [rotary(torch.tensor([[index_of(place, shift)]])) for place in (p, r)]
        return (apply_rotary(q, at[0]) * apply_rotary(k, at[1])).sum(-1)

    torch.testing.assert_close(score(offset), score((0, 0)), rtol=1e-4, atol=1e-4)


def test_turns_are_those_of_the_equation_and_keep_lengths() -> None:
    """Pair i of an axis turns by its coordinate times BASE^(-i/P), here with complex numbers in double precision."""
    x, index = torch.randn(1, 1, 3, 8), torch.tensor([[0, 37, NO_POSITION]])
    out = apply_rotary(x, Rotary(GRID, 8)(index))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    y, column = 37 // 32, 37 % 32
    angle = torch.tensor([y, y * BASE**-0.5, column, column * BASE**-0.5], dtype=torch.float64)
    turned = pairs[0, 0, 1] * torch.polar(torch.ones(4, dtype=torch.float64), angle)
    torch.testing.assert_close(out[0, 0, 1].double(), torch.cat((turned.real, turned.imag)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[..., [0, 2], :], x[..., [0, 2], :])  # the corner, and what is nowhere
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_rows_and_columns_are_told_apart_and_a_series_uses_all_pairs() -> None:
    angles = Rotary(GRID, 8)(torch.tensor([[1, 32]]))
    assert not torch.allclose(angles[..., 0, :], angles[..., 1, :])
    series = Rotary((1, 9), 8)(torch.tensor([[0, 5]]))
    assert (series[0, 0, 0, 1] != 1).all()


def test_attention_does_not_change_when_all_positions_are_shifted() -> None:
    """The whole layer: same tokens elsewhere on the grid give the same output, to rounding."""
    torch.manual_seed(0)
    attention, x, rotary = Attention(48, 2, 0.0, 0.0), torch.randn(2, 5, 48), Rotary(GRID, 24)
    index = torch.tensor([[index_of(p) for p in ((0, 0), (3, 1), (7, 7), (15, 2), (4, 9))]]).expand(2, -1)

    def out(shift: int, causal: bool) -> Tensor:
        angles = rotary(index + shift)
        return attention(x, causal=causal, rotation=Rotation(angles, angles))

    for causal in (False, True):
        torch.testing.assert_close(out(index_of((16, 9)), causal), out(0, causal), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out(0, causal), attention(x, causal=causal), atol=1e-3)


@every_rotary
def test_z_depends_on_where_known_tokens_are_and_on_which_position_is_asked(config: Any) -> None:
    model = shaken(config)
    cond, x = model.condition(torch.tensor([1])), model.token_embedding(random_tokens(config, 1, 0))
    x = x.repeat(1, 16 // x.shape[1], 1)[:, :1].expand(1, 16, -1)  # the same token wherever it is

    def z(known: int, asked: int) -> Tensor:
        state = model.backbone.start(cond, 16)
        model.backbone.commit(state, torch.tensor([[known]]), x[:, :1])
        return model.backbone.predict(state, torch.tensor([[asked]]))

    with torch.no_grad():
        assert (z(2, 9) - z(7, 9)).abs().max() > 1e-3
        assert (z(2, 9) - z(2, 10)).abs().max() > 1e-3
        # With nothing known there is nothing to attend to: the learned part tells which position z is for.
        first = [model.backbone.predict(model.backbone.start(cond, 16), torch.tensor([[asked]])) for asked in (0, 5)]
        assert (first[0] - first[1]).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", members(BackboneConfig), ids=lambda b: b.kind)
def test_learned_is_the_default_and_rotary_has_no_tables_before_the_blocks(backbone: Any) -> None:
    learned, rotary = (backbone(**SMALL[backbone], **extra).build((4, 4)) for extra in ({}, {"positions": "rotary"}))
    assert backbone().positions == "learned"
    given = to_json(backbone())
    del given["positions"]  # as files from before this choice are
    assert from_json(BackboneConfig, given) == backbone()
    gone = {k: v.numel() for k, v in learned.state_dict().items() if k not in rotary.state_dict()}
    shrunk = {k: v.shape for k, v in rotary.state_dict().items() if v.shape != learned.state_dict()[k].shape}
    if backbone is CausalConfig:
        assert (gone.keys(), shrunk) == ({"positions"}, {})
    else:
        assert (gone, shrunk) == ({}, {"encoder_positions": (3, 32), "decoder_positions": (3, 16)})
    assert not any(True for _ in rotary.buffers())


@every_rotary
def test_a_rotary_model_goes_to_another_grid(config: Any) -> None:
    larger = at_grid(shaken(config), (8, 8))
    view = View(torch.rand(2, 64).argsort(1), 0 if config.backbone.kind == "causal" else 20)
    assert larger.loss(random_tokens(larger.config, 2, 0), torch.tensor([0, 1]), view).isfinite().all()


@every_rotary
def test_bfloat16_training_turns_in_float32(config: Any) -> None:
    model, results = shaken(config).train(), []
    for bf16 in (False, True):
        torch.manual_seed(0)
        loss = EagerEngine(model, 0.0, bf16)(
            random_tokens(config, 4, 0), torch.tensor([0, 1, 2, 0]), model.training_view(4, torch.device("cpu"))
        )
        results.append(loss)
    assert results[1].item() == pytest.approx(results[0].item(), rel=0.03)


def test_heads_that_cannot_be_turned_are_refused() -> None:
    for build, message in (
        (lambda: MAEConfig(width=24, heads=4, positions="rotary"), "encoder heads of 6 dimensions with rotary"),
        (lambda: MAEConfig(decoder_width=60, decoder_heads=10, positions="rotary"), "decoder heads of 6 dimensions"),
        (lambda: CausalConfig(width=30, heads=3, positions="rotary"), "heads of 10 dimensions .*; allowed: multiples of 4"),
        (lambda: CausalConfig(positions="none"), "backbone.positions is 'none'; allowed: learned, rotary"),  # pyright: ignore
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_the_official_layout_has_no_place_for_it(tmp_path: Path) -> None:
    config = next(
        c for c in model_configs() if c.head.kind == "diffusion" and c.order.kind == "mar" and c.head.prediction == "epsilon"
    )
    config = replace(config, backbone=replace(config.backbone, positions="rotary"))
    saved = pipeline(config, shaken(config)).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="is 'rotary', which the official MAR layout has no place for; allowed: learned"):
        export_official(saved, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()
    learned = replace(config, backbone=replace(config.backbone, positions="learned")).build()
    with pytest.raises(UserError, match=r'another model \(backbone.positions: "rotary" -> "learned"\)'):
        begin_from(learned, str(saved), TOKENIZER.build())
