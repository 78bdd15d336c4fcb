"""The official key layout: names, shapes and bits, there and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continuar.checkpoints.mar import config_from_official, official_shapes, to_continuar, to_official
from continuar.errors import UserError
from continuar.heads import DiffusionHead, DiffusionHeadConfig
from continuar.models import MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.orders import MAROrderConfig
from continuar.tokenizers import TokenSpec

from .layout import BASE, HUGE, LARGE, UNLIKE, Sizes, assert_same_bits, meta_state, shapes, state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config_of(s: Sizes) -> ModelConfig:
    """The config of a MAR of these sizes, written without the code under test."""
    backbone = MAEConfig(
        width=s.width,
        encoder_depth=s.depth,
        heads=s.heads,
        decoder_width=0 if s.decoder_width == s.width else s.decoder_width,
        decoder_depth=s.decoder_depth,
        decoder_heads=0 if s.decoder_heads == s.heads else s.decoder_heads,
        buffer=s.buffer,
    )
    head = DiffusionHeadConfig(width=s.head_width, depth=s.head_depth)
    return ModelConfig(TokenSpec((s.side, s.side), s.token_dim), s.classes, MAROrderConfig(), backbone, head)


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    small = st.integers(1, 3)
    heads, decoder_heads = draw(small), draw(small)
    return Sizes(
        width=2 * heads * draw(small),
        depth=draw(small),
        heads=heads,
        decoder_width=2 * decoder_heads * draw(small),
        decoder_depth=draw(small),
        decoder_heads=decoder_heads,
        side=draw(small),
        patch=draw(st.integers(1, 2)),
        channels=draw(small),
        classes=draw(st.integers(0, 3)),
        buffer=draw(small),
        head_width=draw(st.integers(1, 5)),
        head_depth=draw(small),
    )


@settings(max_examples=30)
@given(any_sizes(), st.sampled_from(DTYPES), st.integers(0, 99))
def test_layout_round_trip_keeps_every_bit(sizes: Sizes, dtype: torch.dtype, seed: int) -> None:
    official = state(sizes, dtype, seed)
    config = config_from_official(official, heads=sizes.heads, decoder_heads=sizes.decoder_heads)
    assert config == config_of(sizes)
    ours = to_continuar(official, config)
    with torch.device("meta"):
        expected = config.build().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
    assert_same_bits(to_official(ours, config), official)


@pytest.mark.parametrize("sizes", [BASE, LARGE, HUGE, UNLIKE], ids=["B", "L", "H", "unlike"])
def test_official_shapes_are_those_of_the_official_model(sizes: Sizes) -> None:
    config = config_of(sizes)
    assert {k: tuple(v) for k, v in official_shapes(config).items()} == shapes(sizes)


@pytest.mark.parametrize(("sizes", "millions"), [(BASE, 207.92), (LARGE, 478.33), (HUGE, 942.40)], ids=["B", "L", "H"])
def test_config_from_official_knows_the_papers_models(sizes: Sizes, millions: float) -> None:
    official = meta_state(sizes)
    config = config_from_official(official)
    assert config == config_of(sizes)
    with torch.device("meta"):
        model = config.build()
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions
    assert count == sum(v.numel() for v in official.values())
    back = to_official(to_continuar(official, config), config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in official.items()}


@pytest.mark.parametrize(("width", "millions"), [(256, 1.53), (512, 5.41), (1024, 20.26), (1536, 44.55)])
def test_diffusion_head_has_the_papers_size(width: int, millions: float) -> None:
    with torch.device("meta"):
        head = DiffusionHead(16, 1024, width=width, depth=3)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == millions


def test_to_continuar_joins_tensors_in_the_models_order() -> None:
    sizes = Sizes()
    official = state(sizes)
    ours = to_continuar(official, config_of(sizes))
    embedding, w = ours["condition.embedding"], sizes.head_width
    assert_same_bits(
        {"": embedding[:3], "null": embedding[3:]}, {"": official["class_emb.weight"], "null": official["fake_latent"]}
    )
    rows = ours["head.net.modulation.bias"].split([3 * w, 3 * w, 2 * w])
    names = ["res_blocks.0", "res_blocks.1", "final_layer"]
    expected = {n: official[f"diffloss.net.{n}.adaLN_modulation.1.bias"] for n in names}
    assert_same_bits(dict(zip(names, rows, strict=True)), expected)


def test_converted_tensors_share_no_storage() -> None:
    sizes = Sizes()
    flat = torch.arange(sum(torch.Size(s).numel() for s in shapes(sizes).values()), dtype=torch.float32)
    parts = flat.split([torch.Size(s).numel() for s in shapes(sizes).values()])
    official = {k: v.view(s) for (k, s), v in zip(shapes(sizes).items(), parts, strict=True)}
    ours = to_continuar(official, config_of(sizes))
    for made in (ours, to_official(ours, config_of(sizes))):
        assert len({v.untyped_storage().data_ptr() for v in made.values()}) == len(made)
        assert all(v.untyped_storage().nbytes() == 4 * v.numel() and v.is_contiguous() for v in made.values())
    assert_same_bits(to_official(ours, config_of(sizes)), {k: v.contiguous() for k, v in official.items()})


def test_to_continuar_names_all_that_does_not_fit() -> None:
    sizes = Sizes()
    official = state(sizes)
    del official["mask_token"], official["encoder_blocks.1.mlp.fc2.bias"]
    official |= {"head.weight": torch.zeros(1), "fake_latent": torch.zeros(2, 8)}
    with pytest.raises(UserError) as problem:
        to_continuar(official, config_of(sizes), "mar.pth")
    assert str(problem.value) == (
        "mar.pth does not fit the model: missing: mask_token, encoder_blocks.1.mlp.fc2.bias; unexpected: head.weight; "
        "of another shape: fake_latent (2, 8) instead of (1, 8)"
    )


def test_to_continuar_refuses_to_join_two_dtypes() -> None:
    official = state(Sizes())
    official["fake_latent"] = official["fake_latent"].to(torch.bfloat16)
    with pytest.raises(UserError, match=r"class_emb.weight is torch.float32 and fake_latent torch.bfloat16"):
        to_continuar(official, config_of(Sizes()))


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor | None] = {**state(Sizes()), **{k.replace("__", "."): v for k, v in tensors.items()}}
    return {k: v for k, v in merged.items() if v is not None}


@pytest.mark.parametrize(
    ("official", "message"),
    [
        ({"conv1.weight": torch.zeros(3)}, "f.pth is not a MAR: it lacks z_proj.weight, encoder_pos_embed_learned"),
        (changed(z_proj__weight=torch.zeros(8)), r"f.pth is not a MAR: z_proj.weight is \(8,\); 2 dimensions"),
        (changed(diffusion_pos_embed_learned=torch.zeros(1, 3, 8)), "f.pth has 3 token positions, which are not a square"),
        (changed(encoder_pos_embed_learned=torch.zeros(1, 4, 8)), "buffer is 0; allowed: 1 or more"),
        (
            {k.replace("encoder_blocks.1", "encoder_blocks.7"): v for k, v in state(Sizes()).items()},
            "encoder_blocks.1 is missing, although there is encoder_blocks.7",
        ),
        (
            {k: v for k, v in state(Sizes()).items() if not k.startswith("decoder_blocks")},
            "decoder_depth is 0; allowed: 1 or more",
        ),
    ],
    ids=["foreign", "dimensions", "grid", "buffer", "gap", "no blocks"],
)
def test_config_from_official_says_what_is_wrong(official: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_official(official, heads=2, where="f.pth")


@pytest.mark.parametrize(
    ("sizes", "heads", "message"),
    [
        (Sizes(), {}, "the encoder is 8 wide, .* give --heads"),
        (UNLIKE, {"heads": 4}, "the decoder is 32 wide, .* give --decoder-heads"),
        (Sizes(), {"heads": 0}, r"encoder \(--heads\) is 0; allowed: a divisor of its width 8"),
        (Sizes(), {"heads": 3}, r"encoder \(--heads\) is 3; allowed: a divisor of its width 8"),
        (Sizes(), {"heads": 2, "decoder_heads": -2}, r"decoder \(--decoder-heads\) is -2; allowed"),
    ],
)
def test_config_from_official_needs_fitting_heads(sizes: Sizes, heads: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_official(state(sizes), **heads)


def test_config_from_official_gives_the_encoders_heads_to_a_decoder_of_its_width() -> None:
    backbone = config_from_official(state(Sizes()), heads=4).backbone
    assert (backbone.heads, backbone.decoder_heads) == (4, 0)


@dataclass(frozen=True)
class Foreign:
    """Stands for a kind of part that official code does not have."""

    kind: Literal["foreign"] = "foreign"
    max_group: ClassVar[None] = None
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    token_kind: ClassVar[str] = "vector"
    max_condition: ClassVar[None] = None
    labelled: ClassVar[bool] = True
    count: ClassVar[int] = 1


@pytest.mark.parametrize("part", ["order", "backbone", "head", "condition"])
def test_other_kinds_have_no_place_in_the_official_layout(part: str) -> None:
    config = config_of(Sizes())
    ours = to_continuar(state(Sizes()), config)
    parts: dict[str, Any] = {part: Foreign()}
    with pytest.raises(UserError, match=f"{part} is 'foreign', which the official MAR layout has no place for"):
        official_shapes(replace(config, **parts))
    with pytest.raises(UserError, match=f"{part} is 'foreign'"):
        to_official(ours, replace(config, **parts))
