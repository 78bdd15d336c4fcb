"""Animations."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from continuar.pictures import save_gif, thinned


@given(st.integers(1, 200), st.integers(1, 60))
def test_thinned_keeps_at_most_so_many_and_the_last(count: int, most: int) -> None:
    kept = thinned(range(count), most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    assert kept[-1] == count - 1
    gaps = np.diff([-1, *kept])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("count", "each"), [(5, 400), (20, 200), (48, 83), (120, 40)])
def test_gif_holds_every_frame_and_stays_on_the_last(count: int, each: int, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (count, 3)).astype(np.uint8)
    frames = [Image.new("RGB", (16, 16), tuple(c.tolist())) for c in colours[:-1]]
    last = np.resize(colours, (16, 16, 3))
    save_gif([*frames, Image.fromarray(last)], tmp_path / "a.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    durations = []
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == count
        assert gif.info["loop"] == 0
        for i in range(count):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shown, expected = np.asarray(gif.convert("RGB")), last if i == count - 1 else np.asarray(frames[i])
            assert np.abs(shown.astype(int) - expected).max() <= 8  # Pillow looks up the palette in steps of that size
    assert np.abs(np.array(durations) - ([each] * (count - 1) + [2000])).max() <= 10  # GIF counts hundredths of a second


def test_gif_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    save_gif([Image.new("RGB", (4, 4), (9, 8, 7))], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.convert("RGB").getpixel((0, 0)) == (9, 8, 7)
