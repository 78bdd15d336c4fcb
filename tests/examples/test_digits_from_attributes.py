"""What the model is told can be read back, attributes are what they are called; training, saving and sampling for real, small."""

from pathlib import Path

import pytest
import torch

from continuar.checkpoints.store import PipelineConfig
from continuar.heads import DiffusionOptions
from continuar.pipeline import Pipeline
from continuar.sampling.options import SamplingOptions
from tests.examples import load_example

example = load_example("digits_from_attributes")


def test_descriptions_spell_the_words_and_carry_the_attributes() -> None:
    attributes = torch.randn(10, 2)
    told = example.describe(torch.arange(10), attributes)
    assert told.shape == (10, 6, 28)
    letters = told[:, :5, :26]
    spelled = ["".join(example.LETTERS[int(v.argmax())] for v in word if v.any()) for word in letters]
    assert tuple(spelled) == example.WORDS
    assert torch.equal(told[:, 5, 26:], attributes)
    assert told[:, 5, :26].abs().sum() == told[:, :5, 26:].abs().sum() == 0


@pytest.mark.parametrize("slant", [-0.5, 0.0, 0.5])
def test_slant_is_the_shear_of_an_image_and_ink_its_mean(slant: float) -> None:
    # Each row has its whole mass at 3.5 + slant (3.5 - row), shared linearly by the two pixels beside it.
    image = torch.zeros(1, 8, 8)
    for row in range(8):
        place = 3.5 + slant * (3.5 - row)
        left = int(place)
        image[0, row, left], image[0, row, left + 1] = 1 - (place - left), place - left
    ink, measured = example.measure(image)[0].tolist()
    assert ink == pytest.approx(1 / 8)
    assert measured == pytest.approx(slant, abs=1e-5)
    assert example.measure(image / 2)[0].tolist() == pytest.approx([1 / 16, slant], abs=1e-5)


def test_pieces_train_save_sample_report_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    data = example.load()
    relative = data.relative(example.measure(data.images_BHW), data.digits_B)
    for digit in range(10):
        mine = relative[data.digits_B == digit]
        torch.testing.assert_close(mine.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(mine.std(0), torch.ones(2), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    model, tokenizer = example.build(0.7, width=16, depth=1)
    example.train(model, tokenizer, data, images=12, batch=4)
    options = SamplingOptions(steps=2, guidance_scale=2.0, head=DiffusionOptions(diffusion_steps=2))
    pipe = Pipeline(PipelineConfig(model.config, tokenizer.config, (), options), model, tokenizer)
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "model"), device="cpu")
    told, seeds = example.describe(torch.arange(4), torch.zeros(4, 2)), torch.arange(4)
    drawn = example.sample(pipe, told, seeds)
    assert drawn.shape == (4, 8, 8)
    assert torch.equal(drawn, example.sample(again, told, seeds))
    example.report(pipe, data, 20)
    assert "correlation of asked and measured ink" in capsys.readouterr().out
    example.plot(pipe, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
