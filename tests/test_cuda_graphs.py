"""Captured functions give the results of plain ones, and a capture that fails leaves the process as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from continuar.cuda_graphs import GraphPool, Graphs, renew_accumulators

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def accumulator(parameter: nn.Parameter) -> object:
    function = parameter.expand_as(parameter).grad_fn
    assert function is not None
    return function.next_functions[0][0]


def test_without_a_pool_functions_are_called() -> None:
    calls: list[int] = []
    graphs = Graphs(None)
    assert [graphs.run(("key",), lambda: len(calls) if calls.append(1) is None else 0) for _ in range(3)] == [1, 2, 3]
    assert len(graphs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_renewed_accumulators_are_others_though_a_copy_holds_the_old_ones(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    copy, place = parameter.clone(), parameter.data_ptr()
    old = accumulator(parameter)
    assert accumulator(parameter) is old
    renew_accumulators([parameter])
    assert accumulator(parameter) is not old
    assert (parameter.data_ptr(), parameter.dtype) == (place, dtype)
    copy.sum().backward()  # the old graph still works
    assert parameter.grad is not None


@needs_cuda
def test_runs_are_warmed_up_captured_and_replayed_with_draws_of_the_generator() -> None:
    graphs, x = Graphs(GraphPool(torch.device("cuda")), strict=True, warm_up=2), torch.zeros(3, device="cuda")
    found = []
    for run in (lambda: graphs.run(("key",), lambda: x + torch.rand_like(x)), lambda: x + torch.rand_like(x)):
        results = []
        for step in range(6):
            torch.manual_seed(step)
            x.fill_(step)
            results.append((run().clone(), torch.rand(2, device="cuda")))
        found.append(results)
    assert len(graphs) == 1
    for captured, plain in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))


@needs_cuda
@pytest.mark.parametrize("strict", [False, True])
def test_a_failed_capture_gives_stream_and_generator_back(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 0)
    good = Graphs(GraphPool(device), strict=True)
    draw = lambda: torch.rand(4, device=device)  # noqa: E731
    good.run(("draw",), draw)
    stream, bad, out = torch.cuda.current_stream(), Graphs(GraphPool(device), strict), torch.zeros(2, device=device)

    def reads_back() -> None:
        out.add_(torch.rand(2, device=device))
        if out.sum().item() > 1e9:
            out.zero_()

    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        if strict:
            with pytest.raises(RuntimeError):
                bad.run(("key",), reads_back)
        else:
            for _ in range(3):
                bad.run(("key",), reads_back)
    assert len([r for r in caplog.records if "no CUDA graph" in r.message]) == (0 if strict else 1)
    assert torch.cuda.current_stream() == stream
    # What was captured before still follows the seed, drawing goes on, and new captures succeed.
    torch.manual_seed(5)
    replayed = good.run(("draw",), draw).clone()
    torch.manual_seed(5)
    assert torch.equal(replayed, draw())
    again = Graphs(GraphPool(device), strict=True)
    for _ in range(3):
        torch.manual_seed(5)
        assert torch.equal(again.run(("draw",), draw), replayed)


@needs_cuda
def test_backward_is_captured_though_copies_of_parameters_were_made_on_another_stream() -> None:
    layer, x = nn.Linear(3, 2).cuda(), torch.randn(4, 3, device="cuda")

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()

    graphs = Graphs(GraphPool(torch.device("cuda")), strict=True, warm_up=2, parameters=layer.parameters())
    for _ in range(4):
        copies = [p.clone() for p in layer.parameters()]
        graphs.run(("step",), step)
        found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        del copies
    assert len(graphs) == 1
    step()
    for parameter, gradient in zip(layer.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
