"""The fast step equals the plain one, in loss and in every gradient."""

import dataclasses

import pytest
import torch
from torch._inductor import config as inductor

from continuar.backbones import MAEConfig
from continuar.heads import DiffusionHeadConfig
from continuar.orders import MAROrderConfig
from continuar.tokenizers import PixelConfig
from continuar.training.config import LoopConfig, Run
from continuar.training.step import TrainStep


def tiny_run(**train) -> Run:
    return Run(
        tokenizer=PixelConfig(image_size=8, patch=2, std=1.0),
        order=MAROrderConfig(mask_granularity=4),
        backbone=MAEConfig(width=32, encoder_depth=1, heads=2, decoder_depth=1, buffer=2),
        head=DiffusionHeadConfig(width=32, depth=1, prediction="velocity"),
        train=LoopConfig(batch_size=4, **train),
        sampling=dataclasses.replace(Run().sampling, steps=4),
    )


def test_compiled_loss_equals_the_plain_one_in_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "fallback_random", True)
    torch.manual_seed(0)
    run = tiny_run(compile="default")
    model = run.model_config(3).build().train()
    # The output and adaLN layers start at zero, which would hide most gradients.
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    step = TrainStep(model, run)
    tokens, labels = torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
    results = []
    for loss_of in (model.loss, step._loss):
        torch.manual_seed(7)
        view = model.order.training_view(4, torch.device("cpu"))
        loss = loss_of(tokens, labels, view, 0.1).mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (plain, plain_gradients), (fast, fast_gradients) = results
    assert torch.allclose(plain, fast, rtol=1e-5)
    assert plain_gradients.keys() == fast_gradients.keys()
    assert sum(bool(g.any()) for g in plain_gradients.values()) > 0.9 * len(plain_gradients)
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max()
        assert (gradient - fast_gradients[name]).abs().max() <= 1e-4 * scale + 1e-8, name
