"""Tokenizers trained end to end at tiny size: the loss falls, runs resume to the same bits, bad steps change nothing."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from continuar.checkpoints.tokenizers import load_tokenizer
from continuar.config import from_json, to_json
from continuar.data.loader import load_images
from continuar.data.sources import find_source
from continuar.errors import UserError
from continuar.evaluation.networks import SqueezeNet
from continuar.io import read_tensors
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from continuar.training.autoencoder import (
    DecodedBatches,
    MemoryBatches,
    TokenizerStep,
    open_images,
    train_tokenizer,
)
from continuar.training.checkpoint import run_checkpoints
from continuar.training.config import CodebookLearning, DiscriminatorConfig, ImagesConfig, LossConfig, OptimConfig, TokenizerRun
from continuar.training.gan_losses import Perceptual, SqueezeNetPerceptual
from continuar.training.trainer import Interrupted, Report
from tests.tiny import write_images
from tests.tokenizers.networks import TINY, images
from tests.training.tiny_tokenizers import TOKENIZERS, tiny_run

CPU = torch.device("cpu")
GRADIENT = CodebookLearning(update="gradient")
VARIANTS = [("kl", None), ("vq", CodebookLearning()), ("vq", GRADIENT)]
every_variant = pytest.mark.parametrize(("kind", "codebook"), VARIANTS, ids=["kl", "ema", "gradient"])
NO_DISCRIMINATOR = DiscriminatorConfig(weight=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", per_class=8)


def trainer_of(run: TokenizerRun, seed: int = 0) -> TokenizerStep:
    torch.manual_seed(seed)
    return TokenizerStep(run.tokenizer.build(), run, None)


class Flat(Perceptual):
    """A perceptual network of one layer, which is a pooling."""

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        return [functional.avg_pool2d(images_B3HW, 4) + 2]


def parts_of(trainer: TokenizerStep) -> list[nn.Module]:
    return [m for m in (trainer.tokenizer, trainer.discriminator, trainer.codebook) if m is not None]


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@every_variant
def test_the_loss_falls_and_every_weight_learns(kind: str, codebook: CodebookLearning | None) -> None:
    run = tiny_run("", kind, codebook=codebook, images=8 * 60, optim=OptimConfig(lr=5e-3, weight_decay=0.0))
    trainer = trainer_of(run)
    before = {k: v.clone() for k, v in trainer.tokenizer.state_dict().items()}
    flat = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = flat.expand(8, 3, 8, 8) + 0.1 * images(8)
    seen = []
    for step in range(60):
        trainer.seed(step)
        trainer(step, batch)
        averages = trainer.meter.read()
        assert averages.skipped == 0
        seen.append(averages.means)
    assert np.mean([m["l1"] for m in seen[-10:]]) < 0.75 * np.mean([m["l1"] for m in seen[:10]])
    assert [k for k, v in trainer.tokenizer.state_dict().items() if torch.equal(v, before[k])] == []
    assert ("discriminator" in seen[1], "discriminator" in seen[2]) == (False, True)
    assert seen[-1]["adaptive_weight"] > 0


def test_the_kl_is_that_of_gaussians_and_is_weighted_per_value() -> None:
    run = tiny_run("", discriminator=NO_DISCRIMINATOR, loss=LossConfig(kl_weight=0.5))
    trainer = trainer_of(run)
    batch = images(4)
    torch.manual_seed(0)
    decoded = trainer.autoencode(batch)
    mean, log_variance = trainer.network.encode(batch).latent_dist.parameters.chunk(2, 1)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    torch.testing.assert_close(decoded.regularisation, divergence)
    torch.testing.assert_close(decoded.penalty, 0.5 * divergence / (3 * 8 * 8))


@every_variant
@pytest.mark.parametrize("joined", [False, True])
def test_gradients_are_those_of_one_sum(kind: str, codebook: CodebookLearning | None, joined: bool) -> None:
    """The loss as LDM writes it, differentiated at once, against the step's way through the images."""
    discriminator = DiscriminatorConfig(weight=0.3, start_images=0 if joined else 10**6, width=8, layers=1)
    run = tiny_run("", kind, codebook=codebook, discriminator=discriminator, optim=OptimConfig(clip=0.0))
    perceptual = Flat()
    torch.manual_seed(0)
    trainer, truth = (TokenizerStep(run.tokenizer.build(), run, perceptual) for _ in range(2))
    for module, other in zip(parts_of(truth), parts_of(trainer), strict=True):
        module.load_state_dict(other.state_dict())
    batch = images(8)
    trainer.seed(0)
    trainer(0, batch)

    truth.seed(0)
    decoded = truth.autoencode(batch)
    made = decoded.images_B3HW
    others = (made - batch).abs().mean() + run.loss.perceptual_weight * perceptual(made, batch).mean()
    loss = others + decoded.penalty
    if joined:
        assert truth.discriminator is not None
        adversarial = -truth.discriminator(made).mean()
        last = truth.network.decoder.conv_out.weight
        a, b = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (others, adversarial))
        loss = loss + 0.3 * (a / (b + 1e-4)).detach() * adversarial
    loss.backward()
    for (name, ours), theirs in zip(trainer.tokenizer.named_parameters(), truth.tokenizer.parameters(), strict=True):
        if ours.requires_grad and "embedding" not in name:  # codes that moved lose their gradient's meaning
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@every_variant
def test_a_compiled_step_equals_the_plain_one(kind: str, codebook: CodebookLearning | None) -> None:
    discriminator = DiscriminatorConfig(weight=0.3, start_images=0, width=8, layers=1)
    run = tiny_run("", kind, codebook=codebook, discriminator=discriminator)
    plain = trainer_of(run)
    compiled = trainer_of(replace(run, train=replace(run.train, engine="compile")))
    for trainer in (plain, compiled):
        trainer.seed(0)
        trainer(0, images(8))
    assert compiled.meter.read().means == pytest.approx(plain.meter.read().means, rel=1e-3)
    for module, other in zip(parts_of(compiled), parts_of(plain), strict=True):
        assert [*module.state_dict()] == [*other.state_dict()]
        for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@every_variant
def test_captured_steps_are_the_plain_ones_while_the_rate_changes_and_a_discriminator_joins(
    kind: str, codebook: CodebookLearning | None
) -> None:
    discriminator = DiscriminatorConfig(weight=0.3, start_images=8 * 8, width=8, layers=1)
    optim = OptimConfig(lr=3e-3, warmup_images=8 * 10, weight_decay=0.0)
    run = tiny_run("", kind, codebook=codebook, discriminator=discriminator, optim=optim, images=8 * 16, precision="float32")
    measured, broken = [], 14  # a step that is replayed
    for engine in ("eager", "graphs"):
        torch.manual_seed(0)
        trainer = TokenizerStep(run.tokenizer.build().cuda(), replace(run, train=replace(run.train, engine=engine)), None)
        measured.append([])
        for step in range(16):
            trainer.seed(step)
            before = [p.clone() for p in trainer.tokenizer.parameters()]
            trainer(step, images(8, seed=step).cuda() * (math.nan if step == broken else 1))
            averages = trainer.meter.read()
            means = averages.means
            assert averages.skipped == (step == broken)
            if step == broken:
                assert all(torch.equal(p, old) for p, old in zip(trainer.tokenizer.parameters(), before, strict=True))
            else:
                measured[-1].append(means)
    assert len(trainer._graphs) == 1  # the capture has not failed
    for plain, captured in zip(*measured, strict=True):
        assert captured == pytest.approx(plain, rel=1e-2, abs=1e-5)


def test_graphs_are_refused_on_a_cpu() -> None:
    run = tiny_run("", engine="graphs")
    with pytest.raises(UserError, match=r"train\.engine is 'graphs', CUDA graphs, which a cpu device does not have"):
        trainer_of(run)


def test_a_compiled_perceptual_distance_has_the_plain_ones_gradient() -> None:
    """Small images are enlarged before they are convolved, which compilers may get wrong."""
    torch.manual_seed(0)
    network = SqueezeNetPerceptual(SqueezeNet()).eval().requires_grad_(False)
    made, real = images(2).requires_grad_(), images(2, seed=1)
    (wanted,) = torch.autograd.grad(network(made, real).sum(), made)
    network.compile(dynamic=False)
    (found,) = torch.autograd.grad(network(made, real).sum(), made)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@every_variant
def test_a_step_that_is_not_finite_changes_nothing(kind: str, codebook: CodebookLearning | None) -> None:
    trainer = trainer_of(tiny_run("", kind, codebook=codebook))
    for step in range(3):
        trainer.seed(step)
        trainer(step, images(8))
    kept = parts_of(trainer)
    before = [{k: v.clone() for k, v in m.state_dict().items() if k != "seen_V"} for m in kept]
    trainer.meter.read()
    bad = images(8)
    bad[0, 0, 0, 0] = float("nan")
    trainer(3, bad)
    averages = trainer.meter.read()
    assert (averages.skipped, averages.bad_in_a_row) == (1, 1)
    assert math.isnan(averages.means["l1"])
    for module, old in zip(kept, before, strict=True):
        assert [k for k, v in old.items() if not torch.equal(v, module.state_dict()[k])] == []


def test_the_discriminator_learns_and_the_autoencoder_does_not_train_it() -> None:
    run = tiny_run("", discriminator=DiscriminatorConfig(weight=1.0, start_images=0, width=8, layers=1), images=8 * 40)
    trainer = trainer_of(run)
    losses = []
    for step in range(40):
        trainer.seed(step)
        trainer(step, images(8, seed=step))
        losses.append(trainer.meter.read().means["discriminator"])
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert losses[0] == pytest.approx(1, abs=0.1)


@every_variant
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str, codebook: CodebookLearning | None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(root, kind, codebook=codebook)
    train_tokenizer(run, tmp_path / "whole", device=CPU)

    def stop(report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(run, tmp_path / "torn", device=CPU, on_report=stop)
    assert [p.name for p in run_checkpoints(tmp_path / "torn")] == ["step-00000002"]
    train_tokenizer(run, tmp_path / "torn", device=CPU, resume=True)
    whole, torn = (run_checkpoints(tmp_path / name)[0] for name in ("whole", "torn"))
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in torn.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            a, b = read_tensors(whole / name), read_tensors(torn / name)
            assert a.keys() == b.keys()
            assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert ("codebook.safetensors" in names) == (kind == "vq")
    timeless = [
        [{k: v for k, v in m.items() if k not in ("images_per_second", "seconds_left")} for m in metrics_of(tmp_path / name)]
        for name in ("whole", "torn")
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_kl_run_has_a_scale_that_gives_tokens_of_unit_deviation(root: Path, tmp_path: Path) -> None:
    finished = train_tokenizer(tiny_run(root, sample_images=24), tmp_path / "run", device=CPU)
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.config == finished.config
    assert tokenizer.config.scale > 0
    x = torch.from_numpy(load_images(root, size=8).images).permute(0, 3, 1, 2) / 127.5 - 1
    torch.manual_seed(0)
    tokens = torch.cat([tokenizer.tokenize(tokenizer.encode(x)) for _ in range(30)])
    assert tokens.std().item() == pytest.approx(1, abs=0.02)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    last = metrics_of(tmp_path / "run")[-1]
    assert last["images"] == 48
    assert last["psnr"] == pytest.approx(10 * math.log10(4 / last["mse"]))


def test_a_compiled_run_draws_and_measures_uncompiled(root: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = tiny_run(root, engine="compile", sample_images=24)
    train_tokenizer(run, tmp_path / "run", device=CPU)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_tokenizer(replace(run, train=replace(run.train, sample_images=0)), tmp_path / "other", device=CPU)
    assert first == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_vq_run_reports_the_codebooks_usage(root: Path, tmp_path: Path) -> None:
    train_tokenizer(tiny_run(root, "vq"), tmp_path / "run", device=CPU)
    last = metrics_of(tmp_path / "run")[-1]
    assert 0 < last["codes_used"] <= 1
    assert 1 <= last["perplexity"] <= 16
    assert load_tokenizer(tmp_path / "run").spec.vocabulary == 16


def test_damaged_checkpoints_are_passed_over(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(root)
    train_tokenizer(run, tmp_path / "run", device=CPU)
    expected = read_tensors(run_checkpoints(tmp_path / "run")[0] / "tokenizer.safetensors")
    newest = run_checkpoints(tmp_path / "run")[0] / "discriminator.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING, "continuar"):
        train_tokenizer(run, tmp_path / "run", device=CPU, resume=True)
    assert "is damaged and passed over" in caplog.text
    again = read_tensors(run_checkpoints(tmp_path / "run")[0] / "tokenizer.safetensors")
    assert all(torch.equal(expected[k], v) for k, v in again.items())
    for checkpoint in run_checkpoints(tmp_path / "run"):
        (checkpoint / "tokenizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        train_tokenizer(run, tmp_path / "run", device=CPU, resume=True)


def test_runs_are_not_mixed(root: Path, tmp_path: Path) -> None:
    run = tiny_run(root)
    train_tokenizer(run, tmp_path / "run", device=CPU)
    with pytest.raises(UserError, match="already holds a run; --resume continues it"):
        train_tokenizer(run, tmp_path / "run", device=CPU)
    other = replace(run, loss=LossConfig(kl_weight=0.5))
    with pytest.raises(UserError, match=r"has another config \(loss.kl_weight: 0.001 -> 0.5\); --force"):
        train_tokenizer(other, tmp_path / "run", device=CPU, resume=True)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="is a file; allowed: a directory"):
        train_tokenizer(run, tmp_path / "file", device=CPU)


def test_a_run_that_diverges_stops_with_advice(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBatches, "batch", lambda self, step: torch.full((8, 3, 8, 8), float("nan")))
    with pytest.raises(UserError, match=r"2 steps in a row had a non-finite loss or gradient; .*there is no checkpoint yet"):
        train_tokenizer(tiny_run(root, max_bad_steps=2, save_images=0), tmp_path / "run", device=CPU)


def test_bad_steps_in_a_row_go_back_to_a_checkpoint_with_other_draws(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, batch, broken = tiny_run(root, log_images=8, max_bad_steps=2), MemoryBatches.batch, [4, 5]

    def batch_of(self: MemoryBatches, step: int) -> Tensor:
        if broken and step == broken[0]:
            return torch.full_like(batch(self, step), math.nan * broken.pop(0))
        return batch(self, step)

    monkeypatch.setattr(MemoryBatches, "batch", batch_of)
    train_tokenizer(run, tmp_path / "run", device=CPU)
    assert "2 steps in a row had a non-finite loss or gradient: back to step 4, with other draws from there (rollback 1 of 3)" in (
        caplog.text
    )
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    newest = run_checkpoints(tmp_path / "run")[0]
    assert json.loads((newest / "state.json").read_text())["rollbacks"] == 1
    train_tokenizer(run, tmp_path / "plain", device=CPU)
    a, b = (read_tensors(run_checkpoints(tmp_path / name)[0] / "tokenizer.safetensors") for name in ("run", "plain"))
    assert not all(torch.equal(a[k], b[k]) for k in a)
    # The way it took is kept: a resumed run takes it, too.
    shutil.rmtree(newest)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").write_text(
        (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text().replace('"rollbacks": 0', '"rollbacks": 1')
    )
    train_tokenizer(run, tmp_path / "run", device=CPU, resume=True)
    again = read_tensors(run_checkpoints(tmp_path / "run")[0] / "tokenizer.safetensors")
    assert all(torch.equal(a[k], again[k]) for k in a)


def test_weights_that_are_not_finite_are_never_saved(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, poisoned = TokenizerStep.__call__, []

    def step(self: TokenizerStep, number: int, batch: Tensor) -> None:
        take(self, number, batch)
        if number == 3 and not poisoned:
            poisoned.append(number)
            with torch.no_grad():
                next(self.tokenizer.parameters()).view(-1)[3] = torch.nan

    monkeypatch.setattr(TokenizerStep, "__call__", step)
    train_tokenizer(tiny_run(root), tmp_path / "run", device=CPU)
    assert [p.name for p in run_checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000004"]
    for checkpoint in run_checkpoints(tmp_path / "run"):
        assert all(v.isfinite().all() for v in read_tensors(checkpoint / "tokenizer.safetensors").values())


def test_milestones_are_kept_beside_the_newest(root: Path, tmp_path: Path) -> None:
    train_tokenizer(tiny_run(root, keep=1, milestone_images=24), tmp_path / "run", device=CPU)
    assert [p.name for p in run_checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000003"]


def test_a_stopped_run_returns_without_a_scale_and_resumes_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    run, calls = tiny_run(root), iter(range(10))
    stopped = train_tokenizer(run, tmp_path / "run", device=CPU, should_stop=lambda: next(calls) >= 2)
    assert stopped.config.scale == 0
    assert [p.name for p in run_checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000002"]
    assert not (tmp_path / "run" / "tokenizer").exists()
    finished = train_tokenizer(run, tmp_path / "run", device=CPU, resume=True)
    expected = train_tokenizer(run, tmp_path / "whole", device=CPU)
    assert finished.config == expected.config
    assert all(torch.equal(v, finished.state_dict()[k]) for k, v in expected.state_dict().items())


def test_sigint_keeps_a_checkpoint_and_interrupts(root: Path, tmp_path: Path) -> None:
    def report(now: Report) -> None:
        if now.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="step-00000004"):
        train_tokenizer(tiny_run(root), tmp_path / "run", device=CPU, on_report=report)


def test_a_run_of_an_older_version_is_resumed(root: Path, tmp_path: Path) -> None:
    """Its config lacks the fields that are newer, and its checkpoints hold no rollbacks."""
    run, directory = tiny_run(root), tmp_path / "run"
    calls = iter(range(10))
    train_tokenizer(run, directory, device=CPU, should_stop=lambda: next(calls) >= 3)
    config = json.loads((directory / "config.json").read_text())
    del config["train"]["max_rollbacks"], config["train"]["milestone_images"]
    (directory / "config.json").write_text(json.dumps(config))
    for checkpoint in run_checkpoints(directory):
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps({k: state[k] for k in ("step", "checksums")}))
    finished = train_tokenizer(run, directory, device=CPU, resume=True)
    expected = train_tokenizer(run, tmp_path / "whole", device=CPU)
    assert all(torch.equal(v, finished.state_dict()[k]) for k, v in expected.state_dict().items())


def test_graphs_are_refused_before_images_are_read(tmp_path: Path) -> None:
    run = tiny_run("/nothing", engine="graphs")
    with pytest.raises(UserError, match=r"train\.engine is 'graphs', CUDA graphs, which a cpu device does not have"):
        train_tokenizer(run, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_images_decoded_when_needed_are_those_in_memory(root: Path, tmp_path: Path) -> None:
    config = ImagesConfig(path=str(root), flip=True)
    options: dict[str, Any] = {"batch_size": 6, "seed": 3, "device": CPU}
    memory = open_images(config, 8, **options)
    decoded = open_images(replace(config, max_memory_gib=0.0), 8, **options)
    assert isinstance(memory, MemoryBatches)
    assert isinstance(decoded, DecodedBatches)
    for step in (0, 1, 2, 7, 3):
        assert torch.equal(memory.pixels(step), decoded.pixels(step))
        torch.manual_seed(step)
        one = memory.batch(step)
        torch.manual_seed(step)
        assert torch.equal(one, decoded.batch(step))
    assert torch.equal(memory.first(4), decoded.first(4))


def test_broken_images_give_their_place_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "data")
    good = load_images(root, size=8).images
    broken = sorted((root / "ant").iterdir())[2]
    broken.write_bytes(b"no image")
    source = find_source(root, "train")
    batches = DecodedBatches(source, 8, 12, 0, False, 0.1, CPU)
    with caplog.at_level(logging.WARNING, "continuar"):
        for step in range(3):
            pixels = batches.pixels(step)
    assert caplog.text.count(str(broken)) == 1
    rows = np.random.default_rng((0, 2)).permutation(12)
    expected = good[np.where(rows == 2, 3, rows)]
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), expected)
    with pytest.raises(UserError, match="1 of 12 images cannot be used"):
        DecodedBatches(source, 8, 12, 0, False, 0.01, CPU).pixels(0)


@pytest.mark.parametrize("name", TOKENIZER_RECIPES)
def test_every_recipe_builds_and_survives_json(name: str) -> None:
    run = TOKENIZER_RECIPES[name]()
    assert from_json(TokenizerRun, json.loads(json.dumps(to_json(run)))) == run
    with torch.device("meta"):
        tokenizer = run.tokenizer.build()
    assert tokenizer.spec.grid == {32: (8, 8), 128: (8, 8), 256: (16, 16)}[run.tokenizer.image_size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: LossConfig(kl_weight=-1), "loss.kl_weight is -1; allowed: 0 or more"),
        (lambda: DiscriminatorConfig(width=12), "discriminator.width is 12; allowed: multiples of 8"),
        (lambda: DiscriminatorConfig(layers=0), "discriminator.layers is 0; allowed: 1 or more"),
        (lambda: DiscriminatorConfig(weight=float("nan")), "discriminator.weight is nan; allowed: 0 or more"),
        (lambda: CodebookLearning(decay=1.0), "codebook.decay is 1.0; allowed: 0 up to below 1"),
        (lambda: CodebookLearning(revive_below=1.0), "codebook.revive_below is 1.0; allowed: 0 up to below 1"),
        (lambda: tiny_run("", batch_size=0), "train.batch_size is 0; allowed: 1 or more"),
        (lambda: tiny_run("", save_images=-1), "train.save_images is -1; allowed: 0 or more"),
        (lambda: replace(tiny_run(""), seed=-1), "seed is -1; allowed: 0 or more"),
        (lambda: tiny_run("", discriminator=DiscriminatorConfig(layers=2, width=8)), "image size 8 is too small for"),
        (lambda: ImagesConfig(max_skipped_share=2.0), "data.max_skipped_share is 2.0; allowed: 0 to 1"),
        (lambda: train_tokenizer(tiny_run(""), Path("nowhere"), device=CPU), "data.path is empty"),
        (lambda: train_tokenizer(tiny_run("/nothing"), Path("nowhere"), device=CPU), "data path /nothing does not exist"),
    ],
)
def test_run_refuses(change: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        change()
    assert message in str(error.value)


def test_only_kl_and_vq_are_trained() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.network is of kind 'tiny', which is not trained here"):
        replace(tiny_run(""), tokenizer=replace(TOKENIZERS["kl"], network=TINY))
