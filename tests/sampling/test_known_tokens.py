"""Known tokens and snapshots: laws over every model, and what is refused."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.errors import UserError
from continuar.models.autoregressive import ModelConfig
from continuar.pipeline import Pipeline, equal_batches
from continuar.sampling.generate import SamplingInput
from continuar.sampling.known_tokens import GREY
from tests.tiny import model_configs, name, options_of, pipeline, random_tokens

CONFIGS = model_configs()
every_model = pytest.mark.parametrize("config", CONFIGS, ids=name)
N, GRID = 16, (4, 4)
LABELS, SEEDS = [0, 1, 2, 1], [3, -4, 5, 6]
COUNTS = [9, 0, N, 9]
"""How many tokens each of the four images knows."""


def masks(counts: list[int]) -> torch.Tensor:
    order = torch.rand(len(counts), N, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return order.argsort(dim=1) < torch.tensor(counts)[:, None]


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest value, or the share of ids that differ."""
    return ((a - b).abs().max() / a.abs().max()).item() if a.is_floating_point() else (a != b).float().mean().item()


def quick(config: ModelConfig, **values: int) -> Pipeline:
    """A pipeline whose head takes two steps: these laws are about what is known, not about how a token is drawn."""
    names = [k for k in ("diffusion_steps", "flow_steps", "candidates") if k in options_of(config).to_dict()]
    return pipeline(config, options=options_of(config, **dict.fromkeys(names, 2), **values))


def by_kind(kind: str, order: str = "mar") -> ModelConfig:
    return next(c for c in CONFIGS if c.head.kind == kind and c.order.kind == order)


@every_model
def test_images_that_know_different_numbers_of_tokens_are_as_alone(config: ModelConfig) -> None:
    pipe, given, mask = quick(config), random_tokens(config, len(COUNTS), 1), masks(COUNTS)
    together = pipe.tokens(LABELS, SEEDS, known_tokens=given, known_mask=mask, batch_size=2)
    assert torch.equal(together[mask], given[mask])
    assert torch.equal(together[2], given[2])
    assert torch.isfinite(together).all()
    for i, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
        known = {} if i == 1 else {"known_tokens": given[i : i + 1], "known_mask": mask[i]}
        assert away(together[i : i + 1], pipe.tokens([label], [seed], **known)) < 1e-3


@every_model
def test_unknown_positions_do_not_matter_and_known_ones_do(config: ModelConfig) -> None:
    pipe, given, mask = quick(config), random_tokens(config, 2, 1), masks([10, 10])
    other = random_tokens(config, 2, 2)
    poison = torch.nan if given.is_floating_point() else -7
    shown = mask if given.ndim == 2 else mask[..., None]
    first, same, changed = (
        pipe.tokens([0, 1], 0, known_tokens=tokens, known_mask=mask) for tokens in (given, torch.where(shown, given, poison), other)
    )
    assert torch.equal(first, same)
    assert away(first[~mask], changed[~mask]) > 1e-2


@every_model
def test_the_last_snapshot_is_the_call(config: ModelConfig) -> None:
    pipe, tokens, mask = quick(config), random_tokens(config, len(COUNTS), 1), masks(COUNTS)
    known = {"known_tokens": tokens, "known_mask": mask, "batch_size": 2}
    snapshots = list(pipe.stream(LABELS, SEEDS, guidance_scale=1.5, **known))
    steps = options_of(config).steps or N
    assert [(s.step, s.steps) for s in snapshots] == [(i, steps) for i in range(1, steps + 1)]
    options = pipe.defaults.override(guidance_scale=1.5)
    assert torch.equal(snapshots[-1].tokens, pipe.tokens(LABELS, SEEDS, options=options, **known))
    assert np.array_equal(snapshots[-1].image(), pipe(LABELS, SEEDS, guidance_scale=1.5, **known))
    for before, after in pairwise(snapshots):
        assert (before.known_BN <= after.known_BN).all()
        assert torch.equal(after.tokens[before.known_BN], before.tokens[before.known_BN])
        assert not before.tokens[~before.known_BN].any()
    assert snapshots[-1].known_BN.all()
    assert snapshots[0].known_BN[2].all()
    assert not snapshots[-2].known_BN[1].all()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.order.kind != "confidence"], ids=name)
def test_a_generation_taken_up_again_goes_on_as_it_did(config: ModelConfig) -> None:
    """One token per step: what is known after k steps, given as known tokens, leads to the same image.

    Not where an order chooses while generating: the noise of its choice belongs to the step.
    """
    pipe = quick(config, steps=N)
    snapshots = list(pipe.stream([0, 1], [8, 9]))
    for step in (7, N - 1):
        snapshot = snapshots[step - 1]
        again = pipe.tokens([0, 1], [8, 9], known_tokens=snapshot.tokens, known_mask=snapshot.known_BN)
        assert away(snapshots[-1].tokens, again) < 1e-3


def test_raster_order_continues_a_prefix_and_fills_the_rest_row_by_row() -> None:
    config = by_kind("diffusion", "raster")
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[0], mask[2, 1] = True, True
    seen = [s.known_BN[0] for s in pipeline(config).stream([0], known_tokens=random_tokens(config, 1, 0), known_mask=mask)]
    came = [int((after & ~before).nonzero()) for before, after in pairwise([mask.flatten(), *seen])]
    assert came == [4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("kind", ["diffusion", "categorical"])
def test_masks_of_one_image_or_of_the_grid_serve_all(kind: str) -> None:
    pipe, given, mask = pipeline(by_kind(kind)), random_tokens(by_kind(kind), 1, 1), masks([7])[0]
    forms = [mask, mask.view(GRID), mask.expand(2, N), mask.view(GRID).numpy()]
    first, *others = (pipe.tokens([0, 1], 3, known_tokens=given, known_mask=form) for form in forms)
    twice = torch.cat((given, given))
    assert torch.equal(first[:, mask], twice[:, mask])
    for other in [*others, pipe.tokens([0, 1], 3, known_tokens=twice.numpy(), known_mask=mask)]:
        assert torch.equal(first, other)


@pytest.mark.parametrize("kind", ["diffusion", "categorical"])
def test_a_snapshot_shows_unknown_tokens_in_grey_and_known_ones_as_they_are(kind: str) -> None:
    config = by_kind(kind)
    pipe, given, mask = pipeline(config), random_tokens(config, 1, 1), masks([5])
    snapshot = next(iter(pipe.stream([0], known_tokens=given, known_mask=mask, steps=N)))
    assert int(snapshot.known_BN.sum()) == 6
    pixels = snapshot.known_BN.view(GRID).numpy().repeat(2, axis=0).repeat(2, axis=1)
    (image,), (decoded,) = snapshot.image(), pipe.decode(snapshot.tokens)
    assert (image[~pixels] == GREY).all()
    assert np.array_equal(image[pixels], decoded[pixels])


def test_where_all_is_known_the_only_snapshot_is_of_no_step() -> None:
    config = by_kind("diffusion")
    pipe, given = pipeline(config), random_tokens(config, 2, 1)
    known = {"known_tokens": given, "known_mask": np.ones(GRID, bool)}
    (snapshot,) = pipe.stream([0, 1], **known)
    assert (snapshot.step, snapshot.steps) == (0, 0)
    assert torch.equal(snapshot.tokens, given)
    assert torch.equal(pipe.tokens([0, 1], **known), given)
    assert np.array_equal(pipe([0, 1], **known), pipe.decode(given))


def test_progress_counts_the_steps_of_every_batch() -> None:
    config = by_kind("diffusion", "random")
    seen: list[tuple[int, int]] = []
    pipe, given = pipeline(config), random_tokens(config, 4, 1)
    mask = masks([15, 13, N, 13])
    pipe.tokens([0] * 4, known_tokens=given, known_mask=mask, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]


@given(st.lists(st.integers(0, N), min_size=1, max_size=12), st.integers(1, 5))
def test_equal_batches_hold_every_image_once_and_equal_counts(counts: list[int], size: int) -> None:
    rows = torch.arange(len(counts))
    known_BN = torch.arange(N) < torch.tensor(counts)[:, None]
    batches = equal_batches(SamplingInput(rows, 10 * rows, rows[:, None].expand(-1, N), known_BN), size)
    assert Counter(int(i) for b in batches for i in b.rows_b) == Counter(range(len(counts)))
    fewest = sum(-(-times // size) for times in Counter(counts).values())
    assert len(batches) == fewest
    for batch in batches:
        assert 1 <= len(batch.rows_b) <= size
        assert torch.equal(batch.inputs.seeds_B, 10 * batch.rows_b)
        assert torch.equal(batch.inputs.tokens[:, 0], batch.rows_b)
        assert (batch.inputs.known_BN.sum(1) == N - batch.unknown).all()


VECTORS, IDS, SOME = torch.zeros(2, N, 12), torch.zeros(2, N, dtype=torch.int64), torch.arange(N) < 3


@pytest.mark.parametrize(
    ("kind", "tokens", "mask", "message"),
    [
        ("diffusion", VECTORS, None, "known_mask is not given; allowed: known_tokens and known_mask together, or neither"),
        ("diffusion", None, SOME, "known_tokens is not given; allowed: known_tokens and known_mask together"),
        ("diffusion", VECTORS, SOME.float(), "known_mask is of float32; allowed: bool, True where a token is known"),
        ("diffusion", VECTORS, SOME[:9], "known_mask is [9]; allowed: [2, 16], or [16] or [4, 4] for all images"),
        ("diffusion", VECTORS, SOME.expand(3, N), "known_mask is [3, 16]; allowed: [2, 16]"),
        ("diffusion", VECTORS, SOME.view(2, 8), "known_mask is [2, 8]; allowed: [2, 16]"),
        ("diffusion", VECTORS[:, :9], SOME, "known_tokens is [2, 9, 12]; allowed: [2, 16, 12], or [1, 16, 12] for all images"),
        ("diffusion", torch.zeros(3, N, 12), SOME, "known_tokens is [3, 16, 12]; allowed: [2, 16, 12]"),
        ("diffusion", VECTORS[0], SOME, "known_tokens is [16, 12]; allowed: [2, 16, 12]"),
        ("diffusion", IDS, SOME, "known_tokens is of int64; allowed: floats"),
        ("diffusion", VECTORS + torch.nan, SOME, "known_tokens holds nan at a known position; allowed: finite values"),
        ("diffusion", VECTORS - torch.inf, SOME, "known_tokens holds -inf at a known position; allowed: finite values"),
        ("diffusion", [object()], SOME, "known_tokens is a list; allowed: a tensor or a NumPy array of numbers"),
        ("categorical", VECTORS, SOME, "known_tokens is of float32; allowed: integers, which are ids"),
        ("categorical", IDS > 0, SOME, "known_tokens is of bool; allowed: integers, which are ids"),
        ("categorical", IDS + 11, SOME, "known_tokens holds 11 at a known position; allowed: ids 0 to 10"),
        ("categorical", IDS - 1, SOME, "known_tokens holds -1 at a known position; allowed: ids 0 to 10"),
        ("categorical", VECTORS.long(), SOME, "known_tokens is [2, 16, 12]; allowed: [2, 16], or [1, 16] for all images"),
    ],
)
def test_known_tokens_that_do_not_fit_are_refused(kind: str, tokens, mask, message: str) -> None:
    pipe: Pipeline = pipeline(by_kind(kind))
    for run in (pipe.tokens, pipe.stream):
        with pytest.raises(UserError) as error:
            run([0, 1], known_tokens=tokens, known_mask=mask)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 17}, "steps is 17; allowed: 1 to 16"),
        ({"labels": ["wasp"]}, "unknown class 'wasp'"),
        ({"batch_size": 0}, "batch size is 0; allowed: 1 or more"),
        ({"flow_steps": 3}, "flow_steps is 3, an option that the diffusion head does not have"),
    ],
)
def test_stream_refuses_bad_settings_before_its_first_step(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        pipeline(by_kind("diffusion")).stream(**({"labels": [0]} | arguments))
    assert message in str(error.value)
