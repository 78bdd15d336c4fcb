"""Closed forms of the training parts: learning rate, average, streams, augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continuar.data.loader import ImageSet
from continuar.errors import UserError
from continuar.tokenizers import PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig
from continuar.training.data import ImageStream, IndexStream, augment, measure_std
from continuar.training.step import EMA, learning_rate
from tests.tiny import model_configs, shaken


@given(st.integers(0, 1000), st.sampled_from(["constant", "cosine", "linear"]))
def test_learning_rate_rises_linearly_then_decays_to_its_end(images: int, decay: str) -> None:
    config = OptimConfig(lr=2.0, warmup_images=100, decay=decay, final_lr=0.1)
    rate = learning_rate(config, images, 1000)
    if images < 100:
        assert rate == pytest.approx(2.0 * images / 100)
    elif decay == "constant":
        assert rate == 2.0
    else:
        assert 0.2 - 1e-9 <= rate <= 2.0
        assert learning_rate(config, images + 1, 1000) <= rate
        assert learning_rate(config, 1000, 1000) == pytest.approx(0.2)


def test_linear_decay_can_be_the_last_stretch_only() -> None:
    config = OptimConfig(lr=1.0, decay="linear", decay_images=200)
    assert [learning_rate(config, i, 1000) for i in (0, 799, 800, 900, 1000)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_average_follows_its_closed_form_with_and_without_warmup() -> None:
    for warmup in (True, False):
        model = shaken(model_configs()[0])
        average = EMA(model, EMAConfig(decay=0.9, warmup=warmup))
        first = model.token_embedding.weight.detach().clone()
        expected = first.clone()
        for step in range(20):
            with torch.no_grad():
                model.token_embedding.weight.copy_(first * (step + 2))
            average.update(step)
            decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
            expected = decay * expected + (1 - decay) * first * (step + 2)
        torch.testing.assert_close(average.model.token_embedding.weight, expected)
        assert not any(p.requires_grad for p in average.model.parameters())


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_index_stream_is_permutations_laid_end_to_end(count: int, batch: int, seed: int) -> None:
    stream = IndexStream(count, batch, seed)
    steps = -(-3 * count // batch)
    drawn = np.concatenate([stream.batch(s) for s in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = IndexStream(count, batch, seed)
    assert np.array_equal(again.batch(steps - 1), stream.batch(steps - 1))


def test_index_stream_depends_on_seed_and_epoch() -> None:
    a, b = IndexStream(100, 100, 0), IndexStream(100, 100, 1)
    assert not np.array_equal(a.batch(0), a.batch(1))
    assert not np.array_equal(a.batch(0), b.batch(0))
    with pytest.raises(UserError, match="empty"):
        IndexStream(0, 4, 0)


def picture() -> torch.Tensor:
    return torch.arange(3 * 6 * 6, dtype=torch.uint8).reshape(1, 3, 6, 6).expand(64, -1, -1, -1)


def test_augment_mirrors_about_half_of_the_images_and_nothing_else() -> None:
    torch.manual_seed(0)
    out = augment(picture(), DataConfig(flip=True))
    same, mirrored = (out == picture()).flatten(1).all(1), (out == picture().flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48

    assert torch.equal(augment(picture(), DataConfig()), picture())


def test_augment_shifts_repeat_edges() -> None:
    torch.manual_seed(0)
    out = augment(picture(), DataConfig(crop_padding=2))
    padded = torch.nn.functional.pad(picture()[:1].float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    allowed = [padded[0, :, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    hits = {next(i for i, a in enumerate(allowed) if torch.equal(image, a)) for image in out}
    assert len(hits) > 10


def images(count: int = 50) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 256, (count, 8, 8, 3), np.uint8), rng.integers(0, 3, count), ("a", "b", "c"))


def test_measured_std_is_that_of_numpy() -> None:
    data = images()
    values = data.images.astype(np.float64) / 127.5 - 1
    mean, std = measure_std(data, lambda x: x, block=7)
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert std == pytest.approx(values.std(), rel=1e-6)


def test_image_stream_gives_tokens_of_unit_std_with_their_labels() -> None:
    data = images()
    _, std = measure_std(data, lambda x: x)
    stream = ImageStream(data, PixelConfig(image_size=8, patch=4, std=std).build(), DataConfig(), 50, 0, torch.device("cpu"))
    tokens, labels = stream.batch(0)
    assert tokens.shape == (50, 4, 48)
    assert tokens.std().item() == pytest.approx(1, abs=0.01)
    assert sorted(labels.tolist()) == sorted(data.labels.tolist())


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (LoopConfig, {"batch_size": 0}),
        (LoopConfig, {"label_dropout": 1.0}),
        (OptimConfig, {"lr": 0.0}),
        (OptimConfig, {"lr": float("nan")}),
        (OptimConfig, {"betas": (0.9, 1.0)}),
        (EMAConfig, {"decay": 1.0}),
        (DataConfig, {"max_skipped_share": 2.0}),
    ],
)
def test_configs_refuse_values_out_of_range(build: type, values: dict) -> None:
    (field,) = values
    with pytest.raises(UserError, match=f"{field} is .*; allowed"):
        build(**values)
