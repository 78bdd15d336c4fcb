"""Philox against its published vectors; keyed noise as a function of its key alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.noise import KeyedNoise, Purpose, keyed_permutation, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known-answer vectors of Random123 (philox4x32, 10 rounds).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox(tuple(torch.tensor([w]) for w in counter), tuple(torch.tensor([w]) for w in key))
    assert tuple(int(w) for w in words) == expected


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(0, 999), st.integers(1, 20))
def test_keyed_noise_does_not_depend_on_the_other_rows(seeds: list[int], step: int, dim: int) -> None:
    positions = torch.arange(len(seeds)) * 7
    together = KeyedNoise(torch.tensor(seeds), positions).normal(Purpose.STEP, step, dim)
    for row, seed in enumerate(seeds):
        alone = KeyedNoise(torch.tensor([seed]), positions[row : row + 1]).normal(Purpose.STEP, step, dim)
        assert torch.equal(together[row : row + 1], alone)
    assert torch.isfinite(together).all()


def test_keyed_noise_is_standard_normal_and_differs_by_every_part_of_the_key() -> None:
    seeds, positions = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    noise = KeyedNoise(seeds, positions)
    draw = noise.normal(Purpose.STEP, 3, 16)
    assert abs(draw.mean()) < 0.02
    assert abs(draw.std() - 1) < 0.02
    assert abs((draw**4).mean() - 3) < 0.1
    covariance = torch.cov(draw.T) - torch.eye(16)
    assert covariance.abs().max() < 0.08
    others = (
        noise.normal(Purpose.STEP, 4, 16),
        noise.normal(Purpose.INITIAL, 3, 16),
        KeyedNoise(seeds, positions + 1).normal(Purpose.STEP, 3, 16),
        KeyedNoise(seeds + 2**32, positions).normal(Purpose.STEP, 3, 16),
    )
    for other in others:
        assert abs((draw * other).mean()) < 0.02


def test_uniform_is_in_the_half_open_interval_and_flat() -> None:
    u = KeyedNoise(torch.arange(5000), torch.zeros(5000, dtype=torch.int64)).uniform(Purpose.TOKEN, 0, 5)
    assert u.min() > 0
    assert u.max() <= 1
    histogram = torch.histc(u, 10, 0, 1) / u.numel()
    assert (histogram - 0.1).abs().max() < 0.01


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 70))
def test_keyed_permutation_is_a_permutation(seed: int, positions: int) -> None:
    order = keyed_permutation(torch.tensor([seed, seed]), positions)
    assert torch.equal(order[0], order[1])
    assert torch.equal(order[0].sort().values, torch.arange(positions))


def test_keyed_permutations_are_uniform() -> None:
    orders = keyed_permutation(torch.arange(6000), 4)
    for place in range(4):
        share = torch.bincount(orders[:, place], minlength=4) / 6000
        assert (share - 0.25).abs().max() < 0.03
