"""Position embeddings at another grid: laws of the interpolation, and models that live at the new grid."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.checkpoints.mar import write_official
from continuar.checkpoints.store import PipelineConfig
from continuar.cli.main import main
from continuar.errors import UserError
from continuar.heads import FlowHeadConfig
from continuar.models.autoregressive import ModelConfig
from continuar.models.positions import resize_rows
from continuar.orders import RandomOrderConfig
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.sampling.generate import SamplingInput, generate
from continuar.tokenizers import CodebookConfig, LatentConfig, PixelConfig
from continuar.training.config import Run
from continuar.training.finetune import at_grid, begin_from
from continuar.training.trainer import train
from tests.tiny import SMALL, TOKENIZER, model_configs, options_of, pipeline, random_tokens, shaken, tiny_run, write_images

CPU = torch.device("cpu")
grids = st.tuples(st.integers(2, 9), st.integers(2, 9))
PAIRS = [c for c in model_configs() if c.head.kind in ("flow", "categorical")]
every_pair = pytest.mark.parametrize("config", PAIRS, ids=lambda c: f"{c.backbone.kind}-{c.order.kind}-{c.head.kind}")


@given(grids, st.integers(0, 3))
def test_the_same_grid_is_the_identity_to_the_bit(grid: tuple[int, int], before: int) -> None:
    rows = torch.randn(before + grid[0] * grid[1], 5)
    assert torch.equal(resize_rows(rows, grid, grid, before), rows)


@given(grids, grids, st.integers(0, 3))
def test_a_constant_stays_constant_and_rows_before_the_grid_stay_to_the_bit(
    old: tuple[int, int], new: tuple[int, int], before: int
) -> None:
    rows = torch.cat((torch.randn(before, 4), torch.tensor([[1.5, -2.0, 0.0, 100.0]]).expand(old[0] * old[1], -1)))
    out = resize_rows(rows, old, new, before)
    assert out.shape == (before + new[0] * new[1], 4)
    assert torch.equal(out[:before], rows[:before])
    torch.testing.assert_close(out[before:], rows[before:][:1].expand(new[0] * new[1], -1), rtol=1e-5, atol=1e-5)


@given(grids, grids)
def test_a_ramp_keeps_its_order_in_both_directions(old: tuple[int, int], new: tuple[int, int]) -> None:
    y, x = torch.meshgrid(torch.arange(old[0]).float(), torch.arange(old[1]).float(), indexing="ij")
    out = resize_rows(torch.stack((y, x, 2 * y + x), -1).flatten(0, 1), old, new).view(*new, 3)
    assert (out[..., 0].diff(dim=0) > 0).all()
    assert (out[..., 1].diff(dim=1) > 0).all()
    assert (out[..., 2].diff(dim=0) > 0).all()
    assert (out[..., 2].diff(dim=1) > 0).all()
    # Rows do not leak into columns.
    torch.testing.assert_close(out[..., 0], out[:, :1, 0].expand(new), rtol=1e-4, atol=1e-4)


def test_a_smooth_table_keeps_its_values_where_the_new_tokens_lie() -> None:
    def wave(side: int) -> torch.Tensor:
        centres = (torch.arange(side).double() + 0.5) / side
        return torch.sin(3 * centres[:, None] + 2 * centres).float().reshape(-1, 1)

    for old, new in ((16, 32), (32, 16)):
        error = (resize_rows(wave(old), (old, old), (new, new)) - wave(new)).view(new, new)[2:-2, 2:-2].abs().max()
        assert error < 0.015  # half a token's shift would be 0.05


def test_a_series_is_resized_along_its_length_and_is_no_picture() -> None:
    rows = torch.arange(6.0)[:, None]
    assert (resize_rows(rows, (1, 6), (1, 9)).diff(dim=0) > 0).all()
    for old, new in (((1, 6), (2, 3)), ((2, 3), (1, 6))):
        with pytest.raises(UserError, match=r"have no meaning at .* x .*; allowed: "):
            resize_rows(rows, old, new)
    with pytest.raises(UserError, match="6 position embeddings; allowed: 9, a grid of 3 x 3"):
        resize_rows(rows, (3, 3), (4, 4))


@every_pair
def test_a_model_at_another_grid_generates_and_comes_home(config: ModelConfig) -> None:
    model = shaken(config)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in at_grid(model, (4, 4)).state_dict().items())
    larger = at_grid(model, (6, 5))
    assert larger.config.tokens.seq_len == 30
    assert not larger.training
    tables = {f"backbone.{name}" for name in model.backbone.position_tables()}
    same = {k for k, v in larger.state_dict().items() if torch.equal(v, model.state_dict().get(k, v * 0))}
    assert same == model.state_dict().keys() - tables
    out = generate(
        larger, SamplingInput.blank(larger.config.tokens, torch.tensor([1, 2]), torch.tensor([0, 1])), options_of(config)
    )
    assert out.shape[:2] == (2, 30)
    assert not out.is_floating_point() or out.isfinite().all()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 8 x 8 images, 2 x 2 tokens, and beside it images of 16 x 16 with one class more."""
    root = tmp_path_factory.mktemp("grids")
    train(tiny_run(write_images(root / "eight"), images=24), root / "small", device=CPU)
    write_images(root / "sixteen", size=16)
    write_images(root / "three", size=16, classes=("ant", "bee", "cat"))
    return root


def larger_run(small: Path, data: str = "sixteen", **values: Any) -> Run:
    run = tiny_run(small / data)
    return replace(run, tokenizer=PixelConfig(image_size=16, patch=4), init=str(small / "small"), **values)


def test_a_run_begins_with_the_weights_of_another_grid_and_resumes_to_the_same_bits(small: Path, tmp_path: Path) -> None:
    run = larger_run(small)
    trained = train(run, tmp_path / "whole", device=CPU)
    assert trained(["ant"], [0]).shape == (1, 16, 16, 3)
    steps = iter(range(9))
    train(run, tmp_path / "r", device=CPU, should_stop=lambda: next(steps) == 2)
    train(run, tmp_path / "r", device=CPU, resume=True)
    a, b = (Pipeline.from_pretrained(tmp_path / name, device="cpu").model.state_dict() for name in ("whole", "r"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert json.loads((tmp_path / "r" / "config.json").read_text())["init"] == str(small / "small")


def test_the_first_weights_are_the_averaged_ones_of_the_source(small: Path) -> None:
    run, source = larger_run(small), Pipeline.from_pretrained(small / "small", device="cpu").model
    model = run.model_config(2).build()
    begin_from(model, run.init, TOKENIZER.build())
    expected = at_grid(source, (4, 4)).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_other_classes_begin_anew_and_no_class_is_kept(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, source = larger_run(small, "three"), Pipeline.from_pretrained(small / "small", device="cpu").model
    model = run.model_config(3).build()
    begin_from(model, run.init, TOKENIZER.build())
    assert "has 2 classes, the data 3: embeddings of classes begin anew" in caplog.text
    torch.testing.assert_close(model.condition.null(1), source.condition.null(1), rtol=0, atol=0)
    assert train(run, tmp_path / "r", device=CPU)(["cat"], [0]).shape == (1, 16, 16, 3)


def test_an_order_of_another_kind_goes_on_with_the_weights(small: Path, tmp_path: Path) -> None:
    one_by_one = replace(tiny_run("").sampling, steps=None)
    run = larger_run(small, order=RandomOrderConfig(), sampling=one_by_one)
    assert train(run, tmp_path / "r", device=CPU)(["bee"], [0]).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, backbone=replace(r.backbone, width=32)), r"another model \(backbone.width: 16 -> 32.*; allowed: the"),
        (
            lambda r: replace(r, backbone=replace(r.backbone, heads=4)),
            "heads: 2 -> 4; backbone.decoder_heads: 2 -> 4",
        ),
        (lambda r: replace(r, head=replace(r.head, prediction="v_prediction")), r'head.prediction: "epsilon" -> "v_prediction"'),
        (lambda r: replace(r, tokenizer=PixelConfig(image_size=16, patch=2)), r"\(tokens.dim: 48 -> 12\)"),
        (lambda r: replace(r, head=FlowHeadConfig(**SMALL[FlowHeadConfig]), sampling=replace(r.sampling, head=None)), "head.kind"),
        (lambda r: replace(r, init="nowhere"), "unknown model 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as problem:
        train(change(larger_run(small)), tmp_path / "r", device=CPU)
    assert "\n" not in str(problem.value)
    assert len(str(problem.value)) < 400
    assert not (tmp_path / "r").exists()


def test_ids_keep_the_meaning_they_had(small: Path, tmp_path: Path) -> None:
    config = next(c for c in model_configs() if c.head.kind == "categorical" and c.order.kind == "mar")
    options = options_of(config, steps=2)
    run = tiny_run(small / "eight", images=8)
    run = replace(run, tokenizer=CodebookConfig(image_size=8, patch=4, vocabulary=8), head=config.head, sampling=options)
    first = train(run, tmp_path / "a", device=CPU)
    data = replace(run.data, path=str(small / "sixteen"))
    larger = replace(run, data=data, tokenizer=replace(run.tokenizer, image_size=16), init=str(tmp_path / "a"))
    second = train(larger, tmp_path / "b", device=CPU)
    assert torch.equal(second.tokenizer.codebook, first.tokenizer.codebook)


def test_the_command_line_fine_tunes_at_twice_the_size(small: Path, tmp_path: Path) -> None:
    run = json.loads((small / "small" / "config.json").read_text())
    flags = ["--backbone.width", "16", "--backbone.encoder-depth", "1", "--backbone.heads", "2", "--backbone.decoder-depth", "1"]
    flags += ["--backbone.buffer", "2", "--head.width", "16", "--head.depth", "1", "--head.prediction", run["head"]["prediction"]]
    flags += ["--tokenizer.image-size", "16", "--train.images", "8", "--train.batch-size", "8", "--train.sample-images", "0"]
    flags += ["--sampling.steps", "2", "--sampling.head.diffusion-steps", "2"]
    command = ["train", "folder", "--data.path", str(small / "sixteen"), "--init", str(small / "small"), "--device", "cpu"]
    assert main([*command, *flags, "--out", str(tmp_path / "r")]) == 0
    assert newest_checkpoints(tmp_path / "r")[0].name == "step-00000001"
    assert np.asarray(Pipeline.from_pretrained(tmp_path / "r", device="cpu")(["ant"], [0], steps=2, diffusion_steps=2)).any()


def test_ids_of_another_codebook_are_refused(tmp_path: Path) -> None:
    config = next(c for c in model_configs() if c.tokens.kind == "id")
    pipe = pipeline(config, shaken(config))
    saved, new = pipe.save_pretrained(tmp_path / "m"), config.build()
    begin_from(new, str(saved), pipe.tokenizer)
    assert all(torch.equal(v, pipe.model.state_dict()[k]) for k, v in new.state_dict().items())
    with torch.no_grad():
        pipe.tokenizer.state_dict()["codebook"][3] += 0.1
    with pytest.raises(UserError, match="was trained on ids of another codebook"):
        begin_from(config.build(), str(saved), pipe.tokenizer)


def test_an_official_checkpoint_begins_a_run_at_another_grid(tmp_path: Path) -> None:
    config = next(
        c for c in model_configs() if c.head.kind == "diffusion" and c.order.kind == "mar" and c.head.prediction == "epsilon"
    )
    config = replace(config, tokens=replace(config.tokens, dim=16))
    model = shaken(config)
    file = PipelineConfig(config, LatentConfig(image_size=64), ("a", "b", "c"), options_of(config))
    write_official(tmp_path / "m.pth", file, model.state_dict(), model.state_dict())
    new = replace(config, tokens=replace(config.tokens, grid=(8, 8))).build()
    begin_from(new, str(tmp_path / "m.pth"), TOKENIZER.build())
    expected = at_grid(model, (8, 8)).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in new.state_dict().items())
    loss = new.loss(random_tokens(new.config, 2, 0), torch.tensor([0, 1]), new.training_view(2, CPU))
    assert loss.isfinite().all()
