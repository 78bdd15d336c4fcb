"""The fast step equals the plain one, in loss and in every gradient."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from continuar.distributed import joined, local_device
from continuar.errors import UserError
from continuar.heads import DiffusionHeadConfig
from continuar.models import MAEConfig
from continuar.models import transformer as blocks
from continuar.models.transformer import Block
from continuar.orders import View
from continuar.tokenizers import PixelConfig
from continuar.training.config import LoopConfig, Run
from continuar.training.engines import MAX_COMPILED, CompiledEngine, EagerEngine, GraphEngine, collect_gradients, flat_gradients
from continuar.training.step import TrainStep
from tests.processes import group


def tiny_run(**train) -> Run:
    return Run(
        tokenizer=PixelConfig(image_size=8, patch=2, std=1.0),
        backbone=MAEConfig(width=32, encoder_depth=1, heads=2, decoder_depth=1, buffer=2, mask_granularity=4),
        head=DiffusionHeadConfig(width=32, depth=1, prediction="v_prediction"),
        train=LoopConfig(batch_size=4, **train),
        sampling=dataclasses.replace(Run().sampling, steps=4),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@inductor.patch(fallback_random=True)
def test_compiled_loss_equals_the_plain_one_in_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "is_compiling", lambda: True)  # the plain one is to draw as the compiled one does
    torch.manual_seed(0)
    run = tiny_run(engine="compile")
    model = run.model_config(3).build().train()
    # The output and adaLN layers start at zero, which would hide most gradients.
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens, labels = torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
    results = []
    by_time = []
    for engine in (EagerEngine, CompiledEngine):
        torch.manual_seed(7)
        model.head.time_losses = torch.zeros(2, 4)
        by_time.append(model.head.time_losses)
        view = model.training_view(4, torch.device("cpu"))
        loss = engine(model, 0.1, False)(tokens, labels, view)
        results.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, plain_gradients), (fast, fast_gradients) = results
    assert torch.allclose(plain, fast, rtol=1e-5)
    torch.testing.assert_close(*by_time)
    assert by_time[0][1].sum() > 0
    assert plain_gradients.keys() == fast_gradients.keys()
    assert sum(bool(g.any()) for g in plain_gradients.values()) > 0.9 * len(plain_gradients)
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max()
        assert (gradient - fast_gradients[name]).abs().max() <= 1e-4 * scale + 1e-8, name


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_recomputed_blocks_give_the_same_loss_and_gradients_with_dropout(positions: str, bf16: bool) -> None:
    run, results = tiny_run(activation_checkpointing=True), []
    run = dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, positions=positions, dropout=0.3))
    for train in (dataclasses.replace(run.train, activation_checkpointing=False), run.train):
        torch.manual_seed(0)
        model = run.model_config(3).build()
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        trainer = TrainStep(model, dataclasses.replace(run, train=train))
        assert {m.activation_checkpointing for m in model.modules() if isinstance(m, Block)} == {train.activation_checkpointing}
        assert not any(m.activation_checkpointing for m in trainer.ema.model.modules() if isinstance(m, Block))
        torch.manual_seed(7)
        loss = EagerEngine(model, 0.1, bf16)(
            torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), View(torch.rand(4, 16).argsort(1), 4)
        )
        results.append((loss, torch.rand(3), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, drawn, gradients), (again, drawn_again, gradients_again) = results
    assert torch.equal(plain, again)
    assert torch.equal(drawn, drawn_again)  # the generators end where they would have
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-7)


def test_recomputing_is_refused_where_graphs_are_captured() -> None:
    for engine in ("graphs", "compile-graphs"):
        with pytest.raises(UserError, match=f"train.engine {engine} cannot capture; allowed: eager, compile"):
            LoopConfig(activation_checkpointing=True, engine=engine)


@pytest.mark.parametrize(("positions", "activation_checkpointing"), [("learned", False), ("rotary", True)])
def test_no_shape_of_as_many_masked_counts_as_are_allowed_falls_back_to_eager(
    positions: str, activation_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()  # shapes that other tests compiled count too
    compiler = nn.Module.compile  # traced and counted as always, but no code is generated
    monkeypatch.setattr(nn.Module, "compile", lambda part, **given: compiler(part, backend="eager", **given))
    run = tiny_run(engine="compile")
    backbone = dataclasses.replace(run.backbone, decoder_depth=2, mask_ratio_min=0.15, mask_granularity=2, positions=positions)
    run = dataclasses.replace(run, backbone=backbone)
    model = run.model_config(3).build().train()
    assert len(model.num_masked_distribution()) == MAX_COMPILED
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.activation_checkpointing = activation_checkpointing
    engine = CompiledEngine(model, 0.1, False)
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        for queried in model.num_masked_distribution():
            engine(torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), model.training_view(4, torch.device("cpu"), queried))


def test_compiling_too_many_shapes_is_refused() -> None:
    run = tiny_run()
    run = dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, mask_ratio_min=0.1, mask_granularity=1))
    with pytest.raises(UserError, match="compiles 15 masked counts; allowed: 7"):
        CompiledEngine(run.model_config(3).build(), 0.1, False)


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="a cpu device does not have"):
        GraphEngine(tiny_run().model_config(3).build(), 0.1, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("engine", [EagerEngine, CompiledEngine])
def test_graph_engine_equals_the_one_it_captures_for_several_masked_counts(engine: type[EagerEngine], bf16: bool) -> None:
    torch.manual_seed(0)
    model = tiny_run().model_config(3).build().train().to("cuda")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens, labels = torch.randn(4, 16, 12, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    one, graphs = engine(model, 0.1, bf16), GraphEngine(model, 0.1, bf16)  # compiled parts stay compiled
    for seed in range(8):
        results = []
        for run in (one, graphs):
            torch.manual_seed(seed)
            view = model.training_view(4, torch.device("cuda"))
            loss = run(tokens, labels, view).clone()
            results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert torch.allclose(results[0][0], results[1][0], rtol=1e-3 if bf16 else 1e-5)
        for plain, fast in zip(results[0][1], results[1][1], strict=True):
            assert (plain - fast).abs().max() <= (2e-2 if bf16 else 1e-4) * plain.abs().max() + 1e-7
    assert len(graphs._graphs) == len(model.num_masked_distribution())  # none failed and fell back


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_graph_engine_accumulates_the_gradients_of_micro_batches_as_the_eager_one_does() -> None:
    torch.manual_seed(0)
    model = tiny_run().model_config(3).build().train().to("cuda")
    tokens, labels = torch.randn(2, 4, 16, 12, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    engines = [engine(model, 0.1, False, micro_batches=2) for engine in (EagerEngine, GraphEngine)]
    for seed in range(4):
        gradients = []
        for engine in engines:
            for number in range(2):
                torch.manual_seed(100 * seed + number)
                engine(tokens[number], labels, model.training_view(4, torch.device("cuda")), number)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for plain, fast in zip(*gradients, strict=True):
            assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max() + 1e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_graph_engine_captures_a_masked_count_that_was_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_run().model_config(3).build().train().to("cuda")
    counts = model.num_masked_distribution()
    surprise = max(counts)
    monkeypatch.setattr(model, "num_masked_distribution", lambda: {k: v for k, v in counts.items() if k != surprise})
    tokens, labels = torch.randn(4, 16, 12, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    eager, graphs = EagerEngine(model, 0.1, False), GraphEngine(model, 0.1, False)
    for seed in range(3):
        gradients = []
        for engine in (eager, graphs):
            torch.manual_seed(seed)
            engine(tokens, labels, model.training_view(4, torch.device("cuda"), surprise))
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for plain, fast in zip(*gradients, strict=True):
            assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max() + 1e-7
    assert len(graphs._graphs) == len(counts)


def test_flat_gradients_are_what_backward_adds_to() -> None:
    model = tiny_run().model_config(3).build().train()
    flat, parts = flat_gradients(model)
    for parameter, part in zip(model.parameters(), parts, strict=True):
        assert part.shape == parameter.shape
        assert (part.data_ptr() - flat.data_ptr()) % 64 == 0
        parameter.grad = part
    for _ in range(2):
        sum((3 * p).sum() for p in model.parameters()).backward()
    assert all(torch.equal(part, torch.full_like(part, 6)) for part in parts)
    # What lies between the parts stays zero, so that the buffer's sum is the gradients'.
    assert flat.sum() == 6 * sum(p.numel() for p in model.parameters())


def test_gradients_are_collected_into_or_onto_their_places_whatever_their_type() -> None:
    places = [torch.full((2, 3), 5.0) for _ in range(4)]
    found = [torch.full((2, 3), 2.0), None, torch.full((2, 3), 3.0, dtype=torch.bfloat16), torch.full((2, 3), 4.0)]
    collect_gradients(places, found, replace=True)
    assert [p.unique().item() for p in places] == [2, 0, 3, 4]
    collect_gradients(places, found, replace=False)
    assert [p.unique().item() for p in places] == [4, 0, 6, 8]
    assert {p.dtype for p in places} == {torch.float32}


def graphs_of_two(micro_batches: int) -> None:
    """In each of two processes: half of the micro-batches by graphs give the gradients of all of them by one eager process."""
    device = local_device(torch.device("cuda"))
    torch.manual_seed(0)
    model = tiny_run().model_config(3).build().train().to(device)
    data = torch.Generator().manual_seed(1)
    tokens, labels = torch.randn(2 * micro_batches, 4, 16, 12, generator=data).to(device), torch.tensor([0, 1, 2, 0], device=device)
    with joined("ddp", device) as parallel:
        eager = EagerEngine(model, 0.1, False, micro_batches=2 * micro_batches)
        graphs = GraphEngine(model, 0.1, False, parallel, micro_batches)
        for seed in range(3):
            gradients = []
            for engine, slots in ((eager, range(2 * micro_batches)), (graphs, parallel.slots(2 * micro_batches))):
                for number, slot in enumerate(slots):
                    torch.manual_seed(100 * seed + slot)
                    order = torch.rand(4, 16, device=device).argsort(1)
                    engine(tokens[slot], labels, View(order, 4), number)
                gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            for plain, fast in zip(*gradients, strict=True):
                assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max() + 1e-7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_graphs_of_two_processes_average_their_gradients(micro_batches: int) -> None:
    assert group(2, graphs_of_two, micro_batches) == [0, 0]
