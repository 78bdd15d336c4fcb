"""Images are read block by block as they are, from every kind of place, and what cannot be read is one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from continuar.errors import UserError
from continuar.evaluation.samples import open_images
from tests.tiny import write_images

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), np.uint8)


def write_loose(folder: Path, images: np.ndarray = PIXELS, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}{suffix}")
    return folder


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed"])
@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_images_blocks_are_the_images_in_order(tmp_path: Path, kind: str, block: int) -> None:
    if kind == "folder":
        path = write_loose(tmp_path / "images")
    else:
        path = tmp_path / "images.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, PIXELS, np.arange(7))
    images = open_images(path)
    assert images.size == (6, 8)
    found = list(images.blocks(block))
    assert [first for first, _ in found] == list(range(0, 7, block))
    assert np.array_equal(np.concatenate([b for _, b in found]), PIXELS)
    assert np.array_equal(images.read(2, 5), PIXELS[2:5])


def test_open_images_crops_class_folders_and_parquet_to_a_size(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_images(tmp_path / "data", size=8)
    files = sorted(folder.rglob("*.png"))
    table = pa.table({"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files], "label": [0] * len(files)})
    pq.write_table(table, tmp_path / "data.parquet")
    for size in (None, 4):
        one, other = open_images(folder, size=size), open_images(tmp_path / "data.parquet", size=size)
        assert one.size == other.size == (size or 8,) * 2
        assert np.array_equal(one.read(0, 12), other.read(0, 12))


def test_images_identity_changes_with_the_files(tmp_path: Path) -> None:
    folder = write_loose(tmp_path / "images")
    before = open_images(folder).identity()
    assert open_images(folder).identity() == before
    Image.fromarray(PIXELS[0, :, ::-1]).save(folder / "00003.png")
    assert open_images(folder).identity() != before


def test_open_images_notes_lossy_files(tmp_path: Path) -> None:
    assert "holds .jpg files: lossy compression" in open_images(write_loose(tmp_path / "j", suffix=".jpg")).notes[0]
    assert open_images(write_loose(tmp_path / "p")).notes == ()


def test_open_images_refuses_unusable_images_in_one_line(tmp_path: Path) -> None:
    folder = write_loose(tmp_path / "images")
    Image.fromarray(PIXELS[0, :4]).save(folder / "grid.png")
    with pytest.raises(UserError, match=r"grid.png is of 4x8 pixels, .*00000.png of 6x8; allowed: one size"):
        open_images(folder).read(0, 8)
    (folder / "grid.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"grid.png cannot be used: not an image of a known format"):
        open_images(folder).read(0, 8)
    with pytest.raises(UserError, match="has no images"):
        open_images(write_loose(tmp_path / "empty", PIXELS[:0]))
    with pytest.raises(UserError, match="does not exist; allowed: a folder of images"):
        open_images(tmp_path / "nothing")


def test_open_images_refuses_bad_npz_files_in_one_line(tmp_path: Path) -> None:
    def refused(expected: str, **arrays: np.ndarray) -> None:
        np.savez(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match=expected) as problem:
            open_images(tmp_path / "x.npz")
        assert "\n" not in str(problem.value)

    refused(r"has the entries images; allowed: arr_0, uint8 \[n, H, W, 3\]", images=PIXELS)
    refused("arr_0 is of float64; allowed: uint8", arr_0=PIXELS / 255)
    refused("arr_0 is of object; allowed: uint8", arr_0=np.array([{}, None], object))
    refused(r"arr_0 is \(7, 8, 3\); allowed: \[n, H, W, 3\]", arr_0=PIXELS[:, 0])
    np.savez(tmp_path / "x.npz", PIXELS)
    data = (tmp_path / "x.npz").read_bytes()
    for damaged in (data[:300], b"", b"PK\x03\x04 something else"):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"x.npz is truncated or not an npz file"):
            open_images(tmp_path / "x.npz")
    flipped = bytearray(data)
    flipped[400] ^= 255
    (tmp_path / "x.npz").write_bytes(flipped)
    with pytest.raises(UserError, match=r"x.npz is truncated or not an npz file: Bad CRC-32"):
        open_images(tmp_path / "x.npz").read(0, 7)
    np.savez(tmp_path / "x.npz", PIXELS)
    with pytest.raises(UserError, match="holds images of 6x8 pixels, not of 4x4; cropping is for the other kinds"):
        open_images(tmp_path / "x.npz", size=4)
