"""How a codebook learns: straight-through gradients, moving averages, revival, usage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from continuar.training.config import CodebookLearning
from continuar.training.gan_losses import CodebookLearner, Quantised, usage

KEEP = torch.tensor(True)


def learner(codes: int = 5, dim: int = 3, seed: int = 0, **changes) -> tuple[CodebookLearner, nn.Parameter]:
    torch.manual_seed(seed)
    codebook = nn.Parameter(torch.randn(codes, dim))
    return CodebookLearner(codebook, CodebookLearning(**changes)), codebook


def vectors(batch: int = 2, dim: int = 3, side: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gradients_pass_straight_through(update: str) -> None:
    learn, codebook = learner(update=update, commitment=0.0)
    x = vectors().requires_grad_()
    done = learn(x)
    towards = torch.randn_like(x)
    (done.codes_BCHW * towards).sum().backward()
    torch.testing.assert_close(x.grad, towards)
    nearest = (x.detach().permute(0, 2, 3, 1).reshape(-1, 1, 3) - codebook.detach()).square().sum(-1).argmin(1)
    torch.testing.assert_close(done.codes_BCHW.permute(0, 2, 3, 1).reshape(-1, 3), codebook.detach()[nearest])
    assert torch.equal(done.ids_M, nearest)
    assert codebook.requires_grad == (update == "gradient")


def test_commitment_pulls_vectors_and_the_codebooks_loss_pulls_codes() -> None:
    learn, codebook = learner(update="gradient", commitment=0.5)
    x = vectors().requires_grad_()
    done = learn(x)
    done.loss.backward()
    chosen = codebook.detach()[done.ids_M]
    rows = x.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    expected = 0.5 * 2 * (rows - chosen) / rows.numel()
    torch.testing.assert_close(x.grad.permute(0, 2, 3, 1).reshape(-1, 3), expected)
    pulled = torch.zeros_like(codebook).index_add_(0, done.ids_M, 2 * (chosen - rows) / rows.numel())
    torch.testing.assert_close(codebook.grad, pulled)
    torch.testing.assert_close(done.loss.detach(), 1.5 * (rows - chosen).square().mean())


def test_moving_averages_are_those_of_the_paper() -> None:
    learn, codebook = learner(update="ema", decay=0.8, revive_below=0.0)
    uses, sums = np.zeros(5), np.zeros((5, 3))
    expected = codebook.detach().double().numpy().copy()
    for step in range(6):
        x = vectors(seed=step)
        done = learn(x)
        learn.update(done, KEEP)
        rows, ids = x.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy(), done.ids_M.numpy()
        for code in range(5):
            uses[code] = 0.8 * uses[code] + 0.2 * (ids == code).sum()
            sums[code] = 0.8 * sums[code] + 0.2 * rows[ids == code].sum(0)
            if uses[code] > 1e-6:
                expected[code] = sums[code] / uses[code]
    np.testing.assert_allclose(codebook.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_averages_converge_to_cluster_centres() -> None:
    centres = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, 4.0]])
    generator = torch.Generator().manual_seed(0)
    codebook = nn.Parameter(centres + torch.randn(3, 2, generator=generator))
    learn = CodebookLearner(codebook, CodebookLearning(decay=0.9, revive_below=0.0))
    for _ in range(100):
        which = torch.randint(3, (64,), generator=generator)
        x = centres[which] + 0.1 * torch.randn(64, 2, generator=generator)
        learn.update(learn(x.view(4, 4, 4, 2).permute(0, 3, 1, 2)), KEEP)
    torch.testing.assert_close(codebook.detach(), centres, atol=0.05, rtol=0)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_collapsed_codebook_comes_to_life(update: str) -> None:
    codebook = nn.Parameter(torch.full((32, 3), 50.0))
    codebook.data[0] = 0
    dead = CodebookLearner(codebook, CodebookLearning(update=update, revive_below=0.0))
    x = vectors(batch=8)
    assert len(dead(x).ids_M.unique()) == 1
    for _ in range(5):
        dead.update(dead(x), KEEP)
    assert dead.read_usage()[0] == 1 / 32
    learn = CodebookLearner(codebook, CodebookLearning(update=update, revive_below=0.03))
    torch.manual_seed(0)
    learn.update(learn(x), KEEP)
    learn.read_usage()
    learn.update(learn(x), KEEP)
    used, perplexity = learn.read_usage()
    assert used > 0.8
    assert perplexity > 16


def test_a_code_that_is_used_is_left_alone_and_an_unused_one_waits() -> None:
    # 32 vectors, 2 codes: even use is 16. Code 0 gets all of them; code 1 falls below 3% after ln(0.03)/ln(0.5) = 5.06 steps.
    codebook = nn.Parameter(torch.tensor([[0.0], [100.0]]))
    learn = CodebookLearner(codebook, CodebookLearning(update="gradient", decay=0.5, revive_below=0.03))
    learn.uses_V.fill_(16.0)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for step in range(6):
        assert codebook[1].item() == 100
        learn.update(learn(x), KEEP)
        assert codebook[0].item() == 0, step
    assert codebook[1].item() in x.flatten().tolist()


def test_a_revived_code_begins_with_fresh_moments() -> None:
    codebook = nn.Parameter(torch.tensor([[0.0], [100.0]]))
    learn = CodebookLearner(codebook, CodebookLearning(update="gradient"))
    learn.uses_V[0] = 16.0
    optimizer = torch.optim.AdamW([codebook], lr=0.0)
    codebook.grad = torch.ones_like(codebook)
    optimizer.step()
    learn.update(learn(torch.zeros(2, 1, 4, 4)), KEEP, optimizer)
    assert optimizer.state[codebook]["exp_avg"].flatten().tolist() == pytest.approx([0.1, 0.0])


def test_a_bad_step_changes_no_code() -> None:
    learn, codebook = learner()
    before = [t.clone() for t in (codebook.detach(), learn.uses_V, learn.sums_VC)]
    learn.update(learn(vectors()), ~KEEP)
    assert all(torch.equal(a, b) for a, b in zip(before, (codebook.detach(), learn.uses_V, learn.sums_VC), strict=True))
    no_number = torch.full((32, 3), float("nan"))
    nan = Quantised(vectors(), no_number.sum(), no_number, torch.zeros(32, dtype=torch.int64))
    learn.update(nan, ~KEEP)
    assert torch.isfinite(codebook).all()
    assert torch.isfinite(learn.sums_VC).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_usage_is_share_and_perplexity(counts: list[int]) -> None:
    used, perplexity = usage(torch.tensor(counts, dtype=torch.float32))
    total = sum(counts)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c)
    assert used == pytest.approx(sum(c > 0 for c in counts) / len(counts))
    assert perplexity == pytest.approx(math.exp(entropy) if total else 0.0)
