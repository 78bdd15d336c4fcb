"""Group sizes, arrangement and the mask ratio of masked autoregression."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.errors import UserError
from continuar.orders import MAROrder


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
