"""The fast engine equals the eager one for every model of the tables, with and without guidance and known tokens."""

import dataclasses
import logging

import pytest
import torch

from continuar import cuda_graphs as capture
from continuar.errors import UserError
from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models.autoregressive import ModelConfig
from continuar.noise import KeyedNoise
from continuar.pipeline import make_engine
from continuar.sampling.fast.engine import MAX_IDLE, FastEngine, unsupported_reason
from continuar.sampling.generate import SamplingInput, generate, make_plan
from continuar.sampling.memory import bytes_per_image, check_fits
from tests.tiny import model_configs, name, options_of, random_tokens, shaken

CONFIGS = [c for c in model_configs() if not c.order.needs_log_prob and c.backbone.positions == "learned"]
DIFFUSION = [c for c in CONFIGS if isinstance(c.head, DiffusionHeadConfig) and c.head.prediction == "v_prediction"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]
LEVEL = 1 / 255 * 2
"""One of 255 levels of an image in [-1, 1]."""


def make_inputs(config: ModelConfig, batch: int, known: int, device: str = "cpu") -> SamplingInput:
    """Labels and seeds of a batch whose images know ``known`` tokens, each its own."""
    seeds = torch.arange(batch, device=device) + 7
    inputs = SamplingInput.blank(config.tokens, seeds, torch.arange(batch, device=device) % 3)
    if not known:
        return inputs
    count = config.tokens.seq_len
    places = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    if config.order.fixed:
        places = torch.arange(count).expand(batch, -1)
    mask = torch.zeros(batch, count, dtype=torch.bool).scatter_(1, places[:, :known], True)
    return dataclasses.replace(inputs, tokens=random_tokens(config, batch, 1).to(device), known_BN=mask.to(device))


def assert_equal(config: ModelConfig, fast: torch.Tensor, eager: torch.Tensor) -> None:
    """Ids to the bit; vectors within half a level of an image, or that share of values as large as an untrained eps head's are."""
    if config.tokens.kind == "id":
        assert torch.equal(fast, eager)
    else:
        assert (fast - eager).abs().max() <= 0.5 * LEVEL * max(1.0, eager.abs().max().item() / 100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scale", "known"), [(1.0, 5), (2.0, 0)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_fast_engine_equals_eager(config: ModelConfig, scale: float, known: int, device: str) -> None:
    model = shaken(config).to(device)
    options, engine = options_of(config, guidance_scale=scale), FastEngine(model, strict=True)
    for batch in (3, 1, 3) if device == "cuda" else (3,):  # a shape that comes again is replayed
        start = make_inputs(config, batch, known, device)
        fast = engine.generate(start, options)
        assert_equal(config, fast, generate(model, start, options))
        assert torch.equal(fast[start.known_BN], start.tokens[start.known_BN])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_equals_eager(sampler: str, prediction: str, device: str) -> None:
    config = dataclasses.replace(DIFFUSION[0], head=dataclasses.replace(DIFFUSION[0].head, prediction=prediction))
    model, start = shaken(config).to(device), make_inputs(config, 2, 0, device)
    # Of fewer steps, eager's own x_0 of a velocity is a difference of numbers 20,000 times as large, rounded.
    for steps in (4, 9):
        options = options_of(config, sampler=sampler, diffusion_steps=steps)
        assert_equal(config, FastEngine(model, strict=True).generate(start, options), generate(model, start, options))


def test_fast_engine_yields_what_eager_yields() -> None:
    config = DIFFUSION[0]
    model, start, options = shaken(config), make_inputs(config, 2, 3), options_of(config)
    ours, theirs = (make_engine(model, name).stream(start, options) for name in ("fast", "eager"))
    for fast, slow in zip(ours, theirs, strict=True):
        assert torch.equal(fast.known_BN, slow.known_BN)
        assert (fast.step, fast.steps) == (slow.step, slow.steps)
        assert_equal(config, fast.tokens, slow.tokens)
        assert not fast.tokens[~fast.known_BN].any()


def test_temperature_and_guidance_are_not_baked_in() -> None:
    config = DIFFUSION[0]
    model, start = shaken(config), make_inputs(config, 2, 0)
    engine = FastEngine(model)
    for values in ({"guidance_scale": 3.0}, {"guidance_scale": 1.5}, {"temperature": 0.5}, {"guidance_schedule": "constant"}):
        options = options_of(config, **values)
        assert_equal(config, engine.generate(start, options), generate(model, start, options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DIFFUSION[0], DIFFUSION[-1]], ids=name)
@pytest.mark.parametrize("how", ["copied", "through .data", "assigned"])
def test_changed_weights_are_used(config: ModelConfig, precision: str, device: str, how: str) -> None:
    model, other = shaken(config, 0).to(device), shaken(config, 1).to(device)
    start, options = make_inputs(config, 2, 0, device), options_of(config)
    engine = FastEngine(model, precision, strict=True)
    before = engine.generate(start, options)
    if how == "through .data":  # which leaves a tensor's version counter as it was
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.data.copy_(theirs)
    else:
        model.load_state_dict(other.state_dict(), assign=how == "assigned")
    after = engine.generate(start, options)
    assert not torch.allclose(before, after, atol=0.1)
    torch.testing.assert_close(after, FastEngine(other, precision).generate(start, options))


def test_two_generations_at_a_time_do_not_mix() -> None:
    config = DIFFUSION[0]
    model, options = shaken(config), options_of(config)
    engine = FastEngine(model)
    starts = [make_inputs(config, 2, known) for known in (0, 0, 4)]
    starts[1] = dataclasses.replace(starts[1], seeds_B=starts[1].seeds_B + 100)
    alone = [engine.generate(start, options) for start in starts]
    streams = [engine.stream(start, options) for start in starts]
    last = [None] * len(starts)
    for _ in range(5):
        for i, stream in enumerate(streams):
            progress = next(stream, None)
            last[i] = last[i] if progress is None else progress.tokens
    for one, tokens in zip(alone, last, strict=True):
        assert torch.equal(one, tokens)


def test_an_abandoned_generation_leaves_nothing_behind() -> None:
    config = DIFFUSION[0]
    model, start, options = shaken(config), make_inputs(config, 2, 0), options_of(config)
    engine = FastEngine(model)
    expected = engine.generate(start, options)
    stream = engine.stream(start, options)
    next(stream)
    stream.close()
    assert torch.equal(engine.generate(start, options), expected)
    for batch in range(1, MAX_IDLE + 3):
        engine.generate(make_inputs(config, batch, 0), options)
    assert len(engine._idle) == MAX_IDLE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [DIFFUSION[0], DIFFUSION[-1]], ids=name)
def test_bfloat16_is_near_in_every_z_and_in_every_token(config: ModelConfig, device: str) -> None:
    """From the same known tokens, one step: its z, and the token drawn from it."""
    model = shaken(config).to(device)
    noise = {}

    def recorded(key: str):
        def of(seeds: torch.Tensor, positions: torch.Tensor) -> KeyedNoise:
            noise.setdefault(key, []).append(positions)
            return KeyedNoise(seeds, positions)

        return of

    for known in (0, 6):
        start = make_inputs(config, 3, known, device)
        options = options_of(config)
        low = next(iter(FastEngine(model, "bfloat16", strict=True).stream(start, options, noise_of=recorded("low"))))
        exact = next(iter(FastEngine(model).stream(start, options, noise_of=recorded("exact"))))
        drawn = exact.known_BN & ~start.known_BN
        error = (low.tokens - exact.tokens)[drawn].square().mean().sqrt()
        assert 0 < error < 0.02 * exact.tokens[drawn].square().mean().sqrt()
    assert all(torch.equal(a, b) for a, b in zip(noise["low"], noise["exact"], strict=True))


def test_user_errors_of_the_engine() -> None:
    chooses = next(c for c in model_configs() if c.order.needs_log_prob)
    model = shaken(chooses)
    assert "confidence" in (unsupported_reason(model) or "")
    with pytest.raises(UserError, match=r"engine is 'fast', but the confidence order .*allowed: eager"):
        make_engine(model, "fast")
    with pytest.raises(UserError, match="precision is 'bfloat16' with the eager engine, for the confidence order"):
        make_engine(model, "auto", "bfloat16")
    assert make_engine(model, "auto").model is model
    backbone = dataclasses.replace(DIFFUSION[0].backbone, positions="rotary")
    assert unsupported_reason(shaken(dataclasses.replace(DIFFUSION[0], backbone=backbone))) == "rotary positions have no fast form"
    with pytest.raises(UserError, match="engine is 'quick'; allowed: auto, eager, fast"):
        make_engine(model, "quick")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="precision is 'half'; allowed: float32, bfloat16"):
        make_engine(shaken(CONFIGS[0]), "fast", "half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="training mode"):
        FastEngine(shaken(CONFIGS[0]).train()).generate(make_inputs(CONFIGS[0], 1, 0), options_of(CONFIGS[0]))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_memory_estimate_names_the_batch_that_fits(config: ModelConfig) -> None:
    model, options = shaken(config), options_of(config)
    plan = make_plan(model.order, options, 16)
    assert options.head is not None
    one, guided, low = (
        bytes_per_image(model, plan, options.head, copies, dtype)
        for copies, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16))
    )
    assert one < guided <= 2 * one
    assert low < guided
    free = 2**30
    message = r"a batch of 10000000 images needs about .* GiB, and 1.0 GiB are free; allowed: 1 to \d+"
    with pytest.raises(UserError, match=message) as e:
        check_fits(10_000_000, one, free)
    fits = int(str(e.value).rsplit(" ", 1)[1])
    check_fits(fits, one, free)
    with pytest.raises(UserError, match="allowed: 1 to"):
        check_fits(fits + 1, one, free)
    with pytest.raises(UserError, match="not even one image fits"):
        check_fits(1, one, 2**20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_goes_on_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    graphs, out = capture.Graphs(capture.GraphPool(torch.device("cuda"))), torch.zeros(2, device="cuda")

    def reads_back() -> None:
        out.add_(1)
        if out.sum().item() > 1e9:
            out.zero_()

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            graphs.run(("key",), reads_back)
    assert out[0].item() >= 3
    assert sum("no CUDA graph" in record.message for record in caplog.records) == 1


def test_diffusion_options_are_part_of_what_is_captured() -> None:
    config = DIFFUSION[0]
    model, start = shaken(config), make_inputs(config, 1, 0)
    engine = FastEngine(model)
    for steps in (3, 9, 3):
        options = dataclasses.replace(options_of(config), head=DiffusionOptions(diffusion_steps=steps))
        assert_equal(config, engine.generate(start, options), generate(model, start, options))
