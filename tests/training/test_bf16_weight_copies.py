"""Copies of weights in bfloat16 change nothing: neither the loss nor a gradient."""

import dataclasses

import pytest
import torch

from continuar.training.engines import Bf16WeightCopies, MeanLoss
from tests.training.test_engines import tiny_run


@pytest.mark.parametrize("backbone", [{}, {"positions": "rotary"}], ids=["learned", "rotary"])
def test_the_same_loss_and_gradients_as_autocast_gives(backbone: dict[str, str]) -> None:
    run = tiny_run()
    run = dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, **backbone))
    torch.manual_seed(0)
    model = run.model_config(3).build().train()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    objective, tokens, labels = MeanLoss(model, 0.1), torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
    rounded = Bf16WeightCopies(objective, bf16=True)
    with torch.no_grad():
        model.backbone.encoder[0].mlp[0].weight.mul_(1.5)  # as a step of training would: the copies follow
    rounded.round()
    results = []
    for compute, leaves in ((objective, [*model.parameters()]), (rounded, rounded.leaves)):
        torch.manual_seed(7)
        view = model.training_view(4, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(tokens, labels, view)
        results.append((loss, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (plain, gradients), (fast, same) = results
    assert torch.equal(plain, fast)
    kinds = [g.dtype for g in same if g is not None]
    assert kinds.count(torch.bfloat16) == 8  # qkv, projection and two of the MLP, in two blocks
    for gradient, other in zip(gradients, same, strict=True):
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other.float())


def test_without_autocast_there_are_no_copies() -> None:
    objective = MeanLoss(tiny_run().model_config(3).build(), 0.1)
    rounded = Bf16WeightCopies(objective, bf16=False)
    rounded.round()
    assert all(a is b for a, b in zip(rounded.leaves, objective.parameters(), strict=True))
