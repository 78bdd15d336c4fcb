"""The baseline DiT is trained, resumed, saved, loaded and sampled as every model is; what it cannot do is refused."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from continuar.checkpoints.mar import export_official
from continuar.cli.main import main
from continuar.diffusion.samplers import SAMPLERS
from continuar.errors import UserError
from continuar.heads import DiffusionOptions, FlowOptions
from continuar.models.dit import DiT, DiTNetworkConfig
from continuar.pipeline import Pipeline, load, newest_checkpoints
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import CodebookConfig
from continuar.training.config import DiTRun
from continuar.training.engines import CompiledEngine, EagerEngine
from continuar.training.estimate import generation_flops, training_flops
from continuar.training.trainer import Interrupted, Report, train
from tests.tiny import tiny_run, write_images

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
CPU = torch.device("cpu")


def dit_run(path: Path | str, **loop) -> DiTRun:
    """The run of `tiny_run` with another model."""
    base = tiny_run(path, **loop)
    return DiTRun(
        data=base.data,
        tokenizer=base.tokenizer,
        network=DiTNetworkConfig(width=16, depth=2, heads=2, prediction="v_prediction"),
        optim=base.optim,
        ema=base.ema,
        train=base.train,
        sampling=SamplingOptions(guidance_scale=2.0, guidance_schedule="constant", head=DiffusionOptions(diffusion_steps=4)),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "dit"
    train(dit_run(images, sample_images=48), directory, device=CPU)
    return directory


def test_a_run_writes_what_every_run_does_and_resumes_to_the_same_bits(images: Path, trained: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["loss"] > 0 and any(key.startswith("loss_by_time/") for key in line) for line in lines)
    assert {p.name for p in (trained / "samples").iterdir()} == {"step-00000006-ema.png", "step-00000006-raw.png"}

    def stop(report: Report) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(dit_run(images), tmp_path / "r", device=CPU, on_report=stop)
    train(dit_run(images), tmp_path / "r", device=CPU, resume=True)
    ours, theirs = newest_checkpoints(tmp_path / "r")[0], newest_checkpoints(trained)[0]
    assert ours.name == theirs.name == "step-00000006"
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(p / f"{name}.safetensors") for p in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_both_weights_load_and_sample_by_every_sampler_at_any_batch_size(trained: Path, tmp_path: Path) -> None:
    pipes = {weights: load(trained, weights=weights, device="cpu") for weights in ("ema", "raw")}
    assert all(isinstance(pipe.model, DiT) for pipe in pipes.values())
    images = {weights: pipe(["ant", "bee", 1], seeds=5) for weights, pipe in pipes.items()}
    assert images["ema"].shape == (3, 8, 8, 3)
    assert not np.array_equal(images["ema"], images["raw"])
    again = load(pipes["ema"].save_pretrained(tmp_path / "saved"), device="cpu")
    assert np.array_equal(again(["ant", "bee", 1], seeds=5), images["ema"])
    alone = again(["ant", "bee", 1], seeds=5, batch_size=1)
    assert np.abs(alone.astype(int) - images["ema"]).max() <= 1
    for name in SAMPLERS:
        few, many = (again([0, 1], sampler=name, diffusion_steps=steps) for steps in (3, 9))
        assert not np.array_equal(few, many)
    unguided, guided = again([0], guidance_scale=1.0), again([0], guidance_scale=4.0)
    assert not np.array_equal(unguided, guided)
    assert np.array_equal(again(seeds=[3], guidance_scale=4.0), again(seeds=[3], guidance_scale=1.0))  # no class, no guidance
    shots = list(again.stream([0, 1], batch_size=1))
    assert [(shot.step, shot.steps) for shot in shots] == [(1, 1)]
    assert np.abs(shots[0].image().astype(int) - again([0, 1])).max() <= 1


def test_known_tokens_are_refused_unless_all_are_known(trained: Path) -> None:
    pipe = load(trained, device="cpu")
    tokens = torch.randn(1, 4, 48)
    with pytest.raises(UserError, match="1 tokens are known; the model makes whole images; allowed: none, or all"):
        pipe([0], known_tokens=tokens, known_mask=torch.tensor([True, False, False, False]))
    kept = pipe.tokens([0], known_tokens=tokens, known_mask=torch.ones(4, dtype=torch.bool))
    assert torch.equal(kept, tokens)


def test_commands_sample_it_and_say_what_it_cannot_do(trained: Path, images: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "samples"
    fixed = ["--device", "cpu", "--out", str(out)]
    assert main(["sample", str(trained), "--per-class", "1", "--diffusion-steps", "3", "--sampler", "dpmpp_2m", *fixed]) == 0
    entries = json.loads((out / "samples.json").read_text())
    assert [(e["class_name"], e["diffusion_steps"], e["sampler"]) for e in entries] == [
        ("ant", 3, "dpmpp_2m"),
        ("bee", 3, "dpmpp_2m"),
    ]
    picture = str(images / "ant" / "0.png")
    refused = {
        "the model makes all tokens of an image in one; allowed: 1": ["sample", str(trained), "--steps", "3", *fixed],
        "is a DiT, which makes whole images": ["edit", str(trained), picture, "--mask", picture, *fixed],
        "flow_steps is 3, an option that the diffusion head does not have": ["sample", str(trained), "--flow-steps", "3", *fixed],
    }
    for expected, command in refused.items():
        assert main(command) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(UserError, match="model is 'dit', which the official MAR layout has no place for"):
        export_official(newest_checkpoints(trained)[0], tmp_path / "official.pth")


def test_a_directory_holds_one_kind_of_run(images: Path, trained: Path) -> None:
    with pytest.raises(UserError, match=r"unknown field of .*config\.json 'network'"):
        train(tiny_run(images), trained, device=CPU, resume=True)


def test_runs_that_cannot_work_are_refused_when_they_are_made(images: Path) -> None:
    run = dit_run(images)
    with pytest.raises(UserError, match="steps is 2; the model makes all tokens of an image in one"):
        dataclasses.replace(run, sampling=SamplingOptions(steps=2))
    with pytest.raises(UserError, match="sampling options are of a flow head, the model's is diffusion"):
        dataclasses.replace(run, sampling=SamplingOptions(head=FlowOptions()))
    with pytest.raises(UserError, match="DiT takes vector tokens; these are ids"):
        dataclasses.replace(run, tokenizer=CodebookConfig(image_size=8, patch=4))
    assert dataclasses.replace(run, sampling=SamplingOptions()).sampling.head == DiffusionOptions(diffusion_steps=250)


def test_flops_are_those_of_its_passes(images: Path) -> None:
    run = dit_run(images)
    config = run.model_config(2)
    once = generation_flops(config, SamplingOptions(head=DiffusionOptions(diffusion_steps=1)))
    assert training_flops(config) == 3 * once
    assert generation_flops(config, run.sampling) == 4 * 2 * once
    # A multiply-add is two. Of a block: q, k, v, output and MLP of each token, attention between them, adaLN of the image.
    width, tokens, dim = 16, 4, 48
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    outside = tokens * dim * width + (256 + width) * width + 2 * width**2 + tokens * 2 * dim * width
    assert once == 2 * (2 * block + outside)


@pytest.mark.slow
def test_compiled_blocks_give_the_loss_and_gradients_of_plain_ones(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dit_run(images)
    results = []
    for engine in (EagerEngine, CompiledEngine):
        torch.manual_seed(0)
        model = run.model_config(2).build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        tokens, labels = torch.randn(4, 4, 48), torch.tensor([0, 1, 1, 0])
        step, view = engine(model, 0.1, False), model.training_view(4, CPU)
        torch.manual_seed(7)
        results.append((step(tokens, labels, view), {n: p.grad for n, p in model.named_parameters()}))
    (plain, plain_gradients), (fast, fast_gradients) = results
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(fast_gradients, plain_gradients, rtol=1e-3, atol=1e-5)


def test_the_average_is_what_a_finished_run_returns(images: Path, tmp_path: Path) -> None:
    pipe = train(dit_run(images), tmp_path / "r", device=CPU)
    assert isinstance(pipe, Pipeline)
    assert np.array_equal(pipe([0, 1]), load(tmp_path / "r", device="cpu")([0, 1]))
