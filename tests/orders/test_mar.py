"""Group sizes, arrangement and the mask ratio of masked autoregression."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from continuar.errors import UserError
from continuar.orders import MAROrder, MAROrderConfig


@given(st.integers(1, 300), st.data())
def test_groups_are_positive_and_sum_to_the_unknown(unknown: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, unknown))
    sizes = MAROrder(unknown).group_sizes(steps, unknown)
    assert len(sizes) == steps
    assert min(sizes) >= 1
    assert sum(sizes) == unknown


def test_64_steps_of_256_tokens_take_one_to_seven_at_a_time() -> None:
    assert set(MAROrder(256).group_sizes(64, 256)) == set(range(1, 8))


def test_no_steps_are_refused() -> None:
    with pytest.raises(UserError, match="steps is 0"):
        MAROrder(16).group_sizes(0, 16)


@given(st.integers(0, 2**32), st.integers(0, 15))
def test_arrangement_puts_known_positions_first_and_keeps_the_order(seed: int, known_count: int) -> None:
    order = MAROrder(16)
    seeds = torch.tensor([seed])
    known = torch.zeros(1, 16, dtype=torch.bool)
    known[0, torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:known_count]] = True
    free, arranged = order.arrange(torch.zeros_like(known), seeds)[0], order.arrange(known, seeds)[0]
    assert set(arranged[:known_count].tolist()) == set(known[0].nonzero().flatten().tolist())
    assert arranged[known_count:].tolist() == [p for p in free.tolist() if not known[0, p]]


def test_mask_ratio_is_the_truncated_normal() -> None:
    order = MAROrder(256, 0.7)
    grid = [(i + 0.5) / 200 for i in range(200)]
    ours = [order._mask_ratio(u) for u in grid]
    theirs = stats.truncnorm((0.7 - 1) / 0.25, 0.0, loc=1.0, scale=0.25).ppf(grid)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9


def test_training_view_is_a_permutation_with_a_common_known_count() -> None:
    torch.manual_seed(0)
    order = MAROrder(64, 0.5)
    counts = set()
    for _ in range(50):
        view = order.training_view(3, torch.device("cpu"))
        assert torch.equal(view.order_BN.sort(dim=1).values, torch.arange(64).expand(3, 64))
        assert view.known_BK.shape[1] + view.query_BQ.shape[1] == 64
        counts.add(view.known)
    assert max(counts) <= 32
    assert len(counts) > 10


@given(st.integers(1, 64))
def test_granularity_leaves_few_counts(granularity: int) -> None:
    order = MAROrder(64, 0.5, granularity)
    masked = 64 - order.training_view(1, torch.device("cpu")).known
    assert masked == 64 or masked % granularity == 0


@pytest.mark.parametrize("values", [{"mask_ratio_min": 1.5}, {"mask_ratio_min": -0.1}, {"mask_granularity": 0}])
def test_config_refuses_values_out_of_range(values: dict) -> None:
    with pytest.raises(UserError, match="allowed"):
        MAROrderConfig(**values)
