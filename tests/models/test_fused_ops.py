"""Dropout by hashing: its statistics, its gradient, and compiled blocks against an explicit mask."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.models import transformer as blocks
from continuar.models.fused_ops import draw_seed, hashed_dropout, hashed_gelu_dropout, kept
from continuar.models.transformer import Block, QueryBlock

COUNT = 2**20
RATES = [0.01, 0.1, 0.5]
DEVIATIONS = 4.5
"""Standard deviations that are allowed; the draws are fixed."""


def standardised(p: float, seed_2: Tensor, first: int = 0) -> Tensor:
    """What is kept, as numbers of mean 0 and variance 1 if it is with probability 1 - p."""
    return (kept(torch.Size([COUNT]), p, seed_2, first).double() - (1 - p)) / math.sqrt(p * (1 - p))


def seeds(count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [draw_seed(torch.device("cpu")) for _ in range(count)]


@pytest.mark.parametrize("p", RATES)
def test_elements_are_kept_with_their_probability_everywhere(p: float) -> None:
    for seed in [*seeds(4), torch.zeros(2, dtype=torch.int32), torch.tensor([-1, 2**31 - 1], dtype=torch.int32)]:
        x = standardised(p, seed)
        assert abs(x.sum()) < DEVIATIONS * math.sqrt(COUNT)
        for rows in (x.view(1024, 1024), x.view(256, 4096)):
            for sums in (rows.sum(0) / math.sqrt(rows.shape[0]), rows.sum(1) / math.sqrt(rows.shape[1])):
                # Sums of many independent elements are normal: their squares have mean 1 and variance 2, and a bit for rare p.
                excess = 1 / (p * (1 - p)) / (COUNT / len(sums))
                assert abs((sums**2 - 1).sum()) < DEVIATIONS * math.sqrt((2 + excess) * len(sums))


@pytest.mark.parametrize("p", RATES)
def test_elements_are_independent_of_their_neighbours(p: float) -> None:
    for seed in seeds(2):
        x = standardised(p, seed)
        for lag in (*range(1, 33), *(2**k for k in range(6, 20)), 320, 1000, 1280, 320 * 1024):
            assert abs((x[lag:] * x[:-lag]).sum()) < DEVIATIONS * math.sqrt(COUNT - lag), lag


@pytest.mark.parametrize("p", RATES)
def test_draws_and_numbers_are_independent_of_one_another(p: float) -> None:
    one, other = seeds(2)
    same_s, same_t = torch.stack((one[0], other[1])), torch.stack((other[0], one[1]))
    draws = [standardised(p, seed) for seed in (one, other, same_s, same_t)]
    draws += [standardised(p, one, first) for first in (COUNT, 2 * COUNT, 1024 * COUNT)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert abs((x * y).sum()) < DEVIATIONS * math.sqrt(COUNT)


def test_patterns_of_eight_occur_as_often_as_of_independent_elements() -> None:
    p, seed = 0.3, seeds(1)[0]
    bits = 2 ** torch.arange(8)
    found = torch.bincount((kept(torch.Size([COUNT]), p, seed, 0).view(-1, 8) * bits).sum(1), minlength=256)
    ones = ((torch.arange(256)[:, None] & bits) > 0).sum(1)
    expected = (1 - p) ** ones * p ** (8 - ones) * (COUNT / 8)
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < DEVIATIONS * math.sqrt(2 * 255)


def test_nothing_is_dropped_at_rate_zero_and_numbers_go_on_where_they_should() -> None:
    seed = seeds(1)[0]
    assert kept(torch.Size([3, 5]), 0.0, seed, 0).all()
    whole = kept(torch.Size([4, 6]), 0.5, seed, 7)
    assert torch.equal(whole[2:], kept(torch.Size([2, 6]), 0.5, seed, 7 + 12))
    assert kept(torch.Size([4]), 0.5, seed, 2**31 - 5).shape == (4,)


def test_the_gradient_is_the_mask_over_the_probability() -> None:
    seed, x, upstream = seeds(1)[0], torch.randn(32, 48, requires_grad=True), torch.randn(32, 48)
    factor = kept(x.shape, 0.3, seed, 11) * (1 / 0.7)
    y = hashed_dropout(x, 0.3, seed, 11)
    torch.testing.assert_close(y, x * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], upstream * factor, rtol=1e-6, atol=0)
    z, wanted = hashed_gelu_dropout(x, 0.3, seed, 11), F.gelu(x) * factor
    torch.testing.assert_close(z, wanted, rtol=1e-6, atol=1e-6)
    (found,), (expected,) = (torch.autograd.grad(out, x, upstream) for out in (z, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gelu_and_its_gradient_are_right_to_float32() -> None:
    x = torch.linspace(-12, 12, 20_001, requires_grad=True)
    y, wanted = hashed_gelu_dropout(x, 0.0, seeds(1)[0], 0), F.gelu(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2e-7, atol=4e-7)
    found, expected = (torch.autograd.grad(out.sum(), x)[0] for out in (y, wanted))
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=1e-6)


def with_masks(block: Block, x: Tensor, p: float, seed_2: Tensor, rows: int) -> Tensor:
    """The block's last rows, written out with explicit masks."""
    b, length, width = len(x), rows, x.shape[2]
    count = b * length * width
    after_attention, at_the_end, inside = (
        kept(torch.Size([b, length, wide]), p, seed_2, first) / (1 - p)
        for wide, first in ((width, 0), (width, count), (4 * width, 2 * count))
    )
    attention, mlp = block.attention, block.mlp
    q, k, v = attention.qkv(block.norm1(x)).view(b, x.shape[1], 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q[:, :, -rows:], k, v).transpose(1, 2).reshape(b, rows, width)
    x = x[:, -rows:] + attention.projection(y) * after_attention
    return x + mlp[3](F.gelu(mlp[0](block.norm2(x))) * inside) * at_the_end


@pytest.mark.parametrize(("kind", "rows"), [(Block, 17), (QueryBlock, 11)])
def test_a_compiled_block_equals_explicit_masks_and_saves_none(
    kind: type[Block], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    p, width, block = 0.3, 32, kind(32, 2, 0.0, 0.3).train()
    x, upstream = torch.randn(2, 17, width, requires_grad=True), torch.randn(2, rows, width)
    fixed = seeds(1)[0]
    inputs = [x, *block.parameters()]
    wanted = with_masks(block, x, p, fixed, rows)
    expected = torch.autograd.grad(wanted, inputs, upstream)
    monkeypatch.setattr(blocks, "block_seed", lambda x, p: fixed)
    compiled = torch.compile(block, dynamic=False, fullgraph=True)
    y = compiled(x) if kind is Block else compiled(x, rows)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    saved = y.grad_fn.saved_tensors
    assert not [t for t in saved if t.dtype == torch.bool]
    # One tensor of the MLP's inner width, what GELU is given, and no other of as many numbers but weights.
    weights = {q.data_ptr() for q in block.parameters()}
    assert sum(t.numel() == 4 * y.numel() for t in saved if t.data_ptr() not in weights) == 1
    for found, want in zip(torch.autograd.grad(y, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_compiled_draws_are_functions_of_the_generator() -> None:
    torch.manual_seed(0)
    block, x = Block(32, 2, 0.0, 0.3).train(), torch.randn(2, 17, 32)
    compiled = torch.compile(block, dynamic=False, fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    again = compiled(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
