"""Blocks by themselves."""

import pytest
import torch
from torch import Tensor

from continuar.models.positions import Rotary, Rotation
from continuar.models.transformer import Block, QueryBlock


def rotation(index_BL: Tensor) -> Rotation:
    """Of queries and keys that stand in different places."""
    rotary = Rotary((4, 4), 16)
    return Rotation(rotary(index_BL), rotary(index_BL.flip(1)))


@pytest.mark.parametrize("turned", [False, True], ids=["learned", "rotary"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_query_block_is_the_last_rows_of_a_block(rows: int, recomputed: bool, turned: bool) -> None:
    torch.manual_seed(0)
    block, query = Block(32, 2, 0.0, 0.0), QueryBlock(32, 2, 0.0, 0.0)
    query.load_state_dict(block.state_dict())
    query.activation_checkpointing = recomputed
    x, upstream = torch.randn(3, 16, 32, requires_grad=True), torch.randn(3, rows, 32)
    angles = rotation(torch.rand(3, 16).argsort(1)) if turned else None
    whole, found = block(x, rotation=angles)[:, -rows:], query(x, rows, rotation=angles)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(whole, [x, *block.parameters()], upstream)
    for gradient, want in zip(torch.autograd.grad(found, [x, *query.parameters()], upstream), expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
