"""Editing: what is unknown, how image and mask are read, and that nothing outside the mask changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from continuar.errors import UserError
from continuar.inpainting import Picture, edit, read_picture, tokenize_picture, unknown_tokens
from continuar.models.autoregressive import ModelConfig
from continuar.pipeline import Pipeline
from tests.tiny import model_configs, name, options_of, pipeline

CONFIGS = model_configs()
every_model = pytest.mark.parametrize("config", CONFIGS, ids=name)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def picture(rows: slice = slice(1, 4), columns: slice = slice(5, 7)) -> Picture:
    mask = np.zeros((8, 8), bool)
    mask[rows, columns] = True
    return Picture(noise(8, 8), mask)


def quick(config: ModelConfig) -> Pipeline:
    names = [k for k in ("diffusion_steps", "flow_steps") if k in options_of(config).to_dict()]
    return pipeline(config, options=options_of(config, **dict.fromkeys(names, 2)))


@every_model
def test_pixels_outside_the_mask_are_the_images_own_and_inside_differ_by_seed(config: ModelConfig) -> None:
    pipe, shown = quick(config), picture()
    for dilation in (0, 1):
        samples = edit(pipe, tokenize_picture(pipe, shown, dilation), "bee", [1, 2, 1])
        assert samples.shape == (3, 8, 8, 3)
        assert samples.dtype == np.uint8
        assert (samples[:, ~shown.mask_HW] == shown.image_HW3[~shown.mask_HW]).all()
        assert np.array_equal(samples[0], samples[2])
        assert not np.array_equal(samples[0][shown.mask_HW], shown.image_HW3[shown.mask_HW])
        # Regression draws nothing: its samples differ by their order, and with few unknown tokens may not.
        if config.head.kind != "regression":
            assert not np.array_equal(samples[0], samples[1])


@every_model
def test_no_mask_gives_the_image_back_and_nothing_but_mask_is_generation(config: ModelConfig) -> None:
    pipe = quick(config)
    nothing, everything = picture(slice(0, 0)), picture(slice(8), slice(8))
    canvas = tokenize_picture(pipe, nothing, dilation=3)
    assert canvas.known_hw.all()
    assert np.array_equal(edit(pipe, canvas, 0, [5, 6]), np.stack([nothing.image_HW3] * 2))
    assert np.array_equal(edit(pipe, tokenize_picture(pipe, everything, dilation=0), 0, [5, 6]), pipe([0, 0], [5, 6]))
    assert np.array_equal(edit(pipe, tokenize_picture(pipe, everything), None, [5]), pipe(None, [5]))


def test_the_same_picture_gives_the_same_tokens_and_leaves_the_generators_alone() -> None:
    config = CONFIGS[0]
    pipe = quick(config)

    def drawn(latents: torch.Tensor) -> torch.Tensor:
        return torch.rand(1, *pipe.tokenizer.spec.blank(1).shape[1:])

    pipe.tokenizer.tokenize = drawn  # as a tokenizer that draws from a posterior
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first = tokenize_picture(pipe, picture()).tokens
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(tokenize_picture(pipe, picture()).tokens, first)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 1000))
def test_unknown_tokens_are_those_within_so_many_rings_of_the_hole(h: int, w: int, side: int, dilation: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((h * side, w * side)) < 0.1
    expected = np.zeros((h, w), bool)
    for y, x in np.argwhere(mask) // side:
        for i, j in np.ndindex(h, w):
            expected[i, j] |= max(abs(i - y), abs(j - x)) <= dilation
    assert np.array_equal(unknown_tokens(mask, (h, w), dilation), expected)


def test_a_mask_dilated_without_end_is_everything() -> None:
    assert unknown_tokens(picture().mask_HW, (4, 4), 10**12).all()


@settings(max_examples=25)
@given(st.integers(3, 40), st.integers(3, 40), st.integers(2, 12), st.integers(0, 1000))
def test_image_and_mask_are_cropped_and_scaled_alike(height: int, width: int, size: int, seed: int) -> None:
    """A white thing on black, masked by itself: no grey of it stays outside the mask, and without scaling the mask is just it."""
    rng = np.random.default_rng(seed)
    top, left = rng.integers(height), rng.integers(width)
    thing = np.zeros((height, width), np.uint8)
    thing[top : top + rng.integers(1, 9), left : left + rng.integers(1, 9)] = 255
    folder = Path(__file__).parent
    image, mask = folder / "image.png", folder / "mask.png"
    with pytest.MonkeyPatch.context() as patch:
        encoded = {image: png(np.stack([thing] * 3, -1)), mask: png(thing)}
        patch.setattr(Path, "read_bytes", lambda self: encoded[self])
        found = read_picture(image, mask, size)
    assert found.image_HW3.shape == (size, size, 3)
    assert not found.image_HW3[~found.mask_HW].any()
    if min(height, width) == size:
        assert np.array_equal(found.mask_HW, found.image_HW3[..., 0] == 255)


def png(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_grey_counts_from_the_middle_and_transparent_as_white(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8)).save(tmp_path / "image.png")
    values = np.zeros((8, 8, 4), np.uint8)
    values[..., 3] = 255
    values[0, 0], values[0, 1], values[0, 2] = (127, 127, 127, 255), (128, 128, 128, 255), (0, 0, 0, 0)
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert np.argwhere(read_picture(tmp_path / "image.png", tmp_path / "mask.png", 8).mask_HW).tolist() == [[0, 1], [0, 2]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode_mean_the_same(mode: str, tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8)).save(tmp_path / "image.png")
    white = picture().mask_HW
    if mode == "I;16":
        Image.fromarray(np.where(white, 65535, 0).astype(np.uint16)).save(tmp_path / "mask.png")
    else:
        Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).convert(mode).save(tmp_path / "mask.png")
    found = read_picture(tmp_path / "image.png", tmp_path / "mask.png", 8)
    assert np.array_equal(found.mask_HW, white)
    assert np.array_equal(found.image_HW3, noise(8, 8))


def test_a_turned_photograph_and_its_mask_are_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    Image.fromarray(noise(8, 12)).save(tmp_path / "image.png", exif=exif)
    Image.new("L", (8, 12)).save(tmp_path / "mask.png")
    found = read_picture(tmp_path / "image.png", tmp_path / "mask.png", 8)
    assert np.array_equal(found.image_HW3, np.rot90(noise(8, 12), -1)[2:10])


def test_masked_shows_the_mask_in_grey() -> None:
    shown = picture()
    assert (shown.masked()[shown.mask_HW] == 128).all()
    assert np.array_equal(shown.masked()[~shown.mask_HW], shown.image_HW3[~shown.mask_HW])


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (noise(8, 8)[..., :1], np.zeros((8, 8), bool), r"image is \(8, 8, 1\) of uint8; allowed: \[H, W, 3\] of uint8"),
        (noise(8, 8) / 255, np.zeros((8, 8), bool), r"image is \(8, 8, 3\) of float64; allowed: \[H, W, 3\] of uint8"),
        (noise(8, 8), np.zeros((8, 9), bool), r"mask is \(8, 9\) of bool; allowed: \(8, 8\) of bool"),
        (noise(8, 8), np.zeros((8, 8)), r"mask is \(8, 8\) of float64; allowed: \(8, 8\) of bool"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(image: np.ndarray, mask: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Picture(image, mask)


def test_a_picture_of_another_size_and_negative_rings_are_refused() -> None:
    pipe = quick(CONFIGS[0])
    with pytest.raises(UserError, match=r"the picture is \(6, 6\) pixels; allowed: \(8, 8\)"):
        tokenize_picture(pipe, Picture(noise(6, 6), np.zeros((6, 6), bool)))
    with pytest.raises(UserError, match="dilation is -1; allowed: 0 or more rings of tokens"):
        tokenize_picture(pipe, picture(), dilation=-1)
