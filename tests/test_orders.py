"""Laws of every order, and of each one's own arrangement."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.config import members
from continuar.errors import UserError
from continuar.noise import KeyedNoise
from continuar.orders import ConfidenceOrder, ConfidenceOrderConfig, MAROrder, OrderConfig, RandomOrder, RasterOrder

ORDERS = [config().build(16) for config in members(OrderConfig)]
every_order = pytest.mark.parametrize("order", ORDERS, ids=lambda o: type(o).__name__)


def known_mask(seed: int, count: int) -> torch.Tensor:
    known = torch.zeros(1, 16, dtype=torch.bool)
    known[0, torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return known


@every_order
@given(st.integers(0, 2**32), st.integers(0, 15))
def test_arrangement_puts_known_positions_first_and_keeps_the_order(order, seed: int, count: int) -> None:
    known, seeds = known_mask(seed, count), torch.tensor([seed])
    free, arranged = order.arrange(torch.zeros_like(known), seeds)[0], order.arrange(known, seeds)[0]
    assert set(arranged[:count].tolist()) == set(known[0].nonzero().flatten().tolist())
    assert arranged[count:].tolist() == [p for p in free.tolist() if not known[0, p]]


@every_order
@given(st.integers(0, 16))
def test_default_groups_are_positive_and_sum_to_the_unknown(order, unknown: int) -> None:
    sizes = order.group_sizes(None, unknown)
    assert sum(sizes) == unknown
    assert all(size >= 1 for size in sizes)


@every_order
def test_training_orders_are_permutations_of_every_image(order) -> None:
    torch.manual_seed(0)
    orders = order.training_order(5, torch.device("cpu"))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(5, 16))
    assert (orders[0] == orders[1]).all() == isinstance(order, RasterOrder)


def test_raster_order_is_the_grids() -> None:
    assert RasterOrder(6).arrange(torch.zeros(2, 6, dtype=torch.bool), torch.tensor([1, 2])).tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("order", [RasterOrder(16), RandomOrder(16)], ids=["raster", "random"])
def test_one_by_one_orders_take_one_step_per_token(order) -> None:
    assert order.group_sizes(16, 16) == order.group_sizes(None, 16) == (1,) * 16
    assert order.group_sizes(16, 7) == order.group_sizes(7, 7) == (1,) * 7
    with pytest.raises(UserError, match="steps is 5; the order predicts one token per step; allowed: 7 or 16, or not given"):
        order.group_sizes(5, 7)


def noise(batch: int, query: int, round: int = 0) -> KeyedNoise:
    return KeyedNoise(torch.arange(batch).repeat_interleave(query), torch.arange(query).repeat(batch), round)


@given(st.integers(1, 9), st.integers(0, 100))
def test_confidence_chooses_distinct_candidates_and_ends_greedily(size: int, seed: int) -> None:
    log_prob = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    order = ConfidenceOrder(16, choice_temperature=4.5)
    early, late = (order.choose(size, progress, log_prob, noise(3, 9)) for progress in (0.1, 1.0))
    assert all(len(set(row)) == size for row in early.tolist())
    assert torch.equal(late.sort(dim=1).values, log_prob.topk(size, dim=1).indices.sort(dim=1).values)


def test_confidence_by_gumbel_noise_draws_in_proportion_to_probability() -> None:
    """With temperature 1 and no progress the first choice is a sample of softmax(log p): the Gumbel-max theorem."""
    log_prob = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, -1)
    chosen = ConfidenceOrder(16, choice_temperature=1.0).choose(1, 0.0, log_prob, noise(20_000, 4))
    shares = chosen.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, log_prob[0].exp(), atol=0.015, rtol=0)


def test_a_round_draws_anew() -> None:
    from continuar.noise import Purpose

    first, second, again = (noise(2, 8, r).uniform(Purpose.TOKEN, 0, 3) for r in (0, 1, 1))
    assert torch.equal(second, again)
    assert not (first == second).any()


def test_orders_that_arrange_do_not_choose_and_bad_values_are_refused() -> None:
    with pytest.raises(TypeError, match="RandomOrder arranges positions beforehand"):
        RandomOrder(16).choose(1, 0.5, torch.zeros(1, 4), noise(1, 4))
    with pytest.raises(UserError, match="choice_temperature is -1; allowed"):
        ConfidenceOrderConfig(choice_temperature=-1)


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
