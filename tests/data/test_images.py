"""Reading images: layouts, modes, damage and limits, on real files."""

import io
import json
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from continuar.data.decode import Unusable, centre_crop, decode
from continuar.data.loader import class_names, decode_block, load_images
from continuar.data.sources import Source
from continuar.errors import UserError
from tests.tiny import write_images

SHARED = Path(__file__).parents[3] / "shared" / "data"


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 8, height: int = 8) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack((x * 255 // width, y * 255 // height, (x + y) * 127 // (width + height)), -1).astype(np.uint8))


def test_class_folders_give_sorted_classes_and_the_pixels_themselves(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", per_class=3, classes=("bee", "ant"))
    (root / ".hidden").mkdir()
    (root / "ant" / ".thumb.png").write_bytes(b"junk")
    (root / "ant" / "notes.txt").write_text("not an image")
    found = load_images(root, size=8)
    assert found.classes == class_names(root) == ("ant", "bee")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.skipped == ()
    for i, path in enumerate(sorted((root / "ant").glob("[0-9]*.png"))):
        assert np.array_equal(found.images[i], np.asarray(Image.open(path)))


def test_split_folders_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=2)
    write_images(tmp_path / "test", per_class=1)
    assert len(load_images(tmp_path, size=8)) == 4
    assert len(load_images(tmp_path, size=8, split="test")) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "has no images; allowed"),
        (lambda p: (p.mkdir(), gradient().save(p / "a.png")), r"no class folders with images \(1 images lie loose in it\)"),
        (lambda p: p.write_text("x"), "is a file; allowed: a .parquet or .tar file, or a folder"),
        (lambda p: (p.mkdir(), (p / "train.parquet").write_bytes(b"PAR1")), "is damaged or lacks the columns"),
    ],
)
def test_sources_that_cannot_be_used_are_named(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        load_images(tmp_path / "data", size=8)


def test_size_memory_and_digits_limits(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data")
    with pytest.raises(UserError, match="image size is 0"):
        load_images(root, size=0)
    with pytest.raises(UserError, match=r"12 images of 10000x10000 take 3.4 GiB of memory; allowed: 1.0"):
        load_images(root, size=10_000, max_memory_gib=1.0)
    with pytest.raises(UserError, match="the digits are 8x8"):
        load_images("digits", size=28)


def test_digits_are_all_there() -> None:
    pytest.importorskip("sklearn")
    digits = load_images("digits", size=8)
    assert digits.images.shape == (1797, 8, 8, 3)
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.images.max() == 255
    assert class_names("digits") == digits.classes == tuple("0123456789")


def test_broken_images_are_skipped_named_and_limited(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data")
    good = encoded(gradient())
    (root / "ant" / "cut.png").write_bytes(good[:60])
    (root / "bee" / "text.jpg").write_text("hello")
    found = load_images(root, size=8, max_skipped_share=0.2)
    assert len(found) == 12
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    assert [Path(line.split(": ")[0]).name for line in found.skipped] == ["cut.png", "text.jpg"]
    with pytest.raises(UserError, match=r"2 of 14 images cannot be used \(14.3%; allowed: 10.0%\): .*cut.png"):
        load_images(root, size=8, max_skipped_share=0.1)
    for path in (root / "ant").glob("*.png"):
        path.write_bytes(b"")
    for path in (root / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="14 of 14 images"):
        load_images(root, size=8, max_skipped_share=1.0)


class Waiting(Source):
    """One image, whose bytes come only when it is released."""

    def __init__(self) -> None:
        self.labels, self.classes = np.zeros(1, np.int64), ("a",)
        self.asked, self.released = threading.Event(), threading.Event()

    def read(self, index: int) -> bytes:
        self.asked.set()
        self.released.wait(10)
        return encoded(gradient())

    def name(self, index: int) -> str:
        return "image"


def test_blocks_that_overlap_leave_the_warning_filters_as_they_were() -> None:
    first, second = Waiting(), Waiting()
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as threads:
        before = list(warnings.filters)
        blocks = []
        for source in (first, second):
            blocks.append(threads.submit(decode_block, source, [0], 8, threads))
            assert source.asked.wait(10)
        for source, block in zip((first, second), blocks, strict=True):
            source.released.set()
            assert block.result(10).index.tolist() == [0]
        assert warnings.filters == before


def test_warnings_of_pillow_are_not_shown(tmp_path: Path) -> None:
    exif = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0")
    (tmp_path / "a.jpg").write_bytes(exif)
    plain = "import sys; from PIL import Image; Image.open(sys.argv[1]).getexif()"
    ours = "import sys; from continuar.data.decode import decode; decode(open(sys.argv[1], 'rb').read(), 8)"
    path = str(tmp_path / "a.jpg")
    shown = [subprocess.run([sys.executable, "-c", c, path], check=True, capture_output=True).stderr for c in (plain, ours)]
    assert b"Warning" in shown[0]
    assert shown[1] == b""


def test_gigantic_images_are_refused_from_their_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(Unusable, match="pixels"):
        decode(png, 8)
    with pytest.raises(Unusable, match="8x8 pixels; allowed: 63 pixels"):
        decode(encoded(gradient()), 8, max_pixels=63)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = gradient() if mode != "I;16" else Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    image = image if mode == "I;16" else image.convert(mode)
    pixels = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    if mode == "I;16":
        assert (pixels == 0x80).all()
    elif mode == "RGBA":
        assert np.array_equal(pixels, np.asarray(gradient()))


def test_transparency_is_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (decode(encoded(clear), 8) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = decode(encoded(gradient(), "PNG", exif=exif), 8)
    assert np.array_equal(turned, np.rot90(np.asarray(gradient()), -1))


def test_centre_crop_is_adm_s() -> None:
    image = gradient(70, 40)
    halved = image.resize((35, 20), Image.Resampling.BOX)
    scale = 15 / 20
    scaled = halved.resize((round(35 * scale), 15), Image.Resampling.BICUBIC)
    left = (scaled.width - 15) // 2
    assert np.array_equal(np.asarray(centre_crop(image, 15)), np.asarray(scaled.crop((left, 0, left + 15, 15))))
    assert np.array_equal(np.asarray(centre_crop(gradient(), 8)), np.asarray(gradient()))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_centre_crop_has_the_size_asked_for(width: int, height: int, size: int) -> None:
    assert centre_crop(gradient(width, height), size).size == (size, size)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    st.integers(0, 2000),
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_decoded_or_skipped(kind: str, length: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(gradient(16, 16), kind)[: length or None])
    for position, value in changes:
        if position < len(data):
            data[position] = value
    # Anything but an image or `Unusable` fails the test by being raised.
    try:
        shape = decode(bytes(data), 8).shape
    except Unusable:
        shape = (8, 8, 3)
    assert shape == (8, 8, 3)


def write_parquet(path: Path, labels: list[int], names: list[str] | None, column: str = "image") -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(gradient()), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({column: images, "label": pa.array(labels, pa.int64())})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path)
    return path


def test_parquet_with_and_without_class_names(tmp_path: Path) -> None:
    named = load_images(write_parquet(tmp_path / "a.parquet", [1, 0, 1], ["x", "y", "z"]), size=8)
    assert named.classes == ("x", "y", "z")
    assert named.labels.tolist() == [1, 0, 1]
    assert np.array_equal(named.images[2], np.asarray(gradient()))
    assert load_images(write_parquet(tmp_path / "b.parquet", [2, 0], None), size=8).classes == ("0", "1", "2")


def test_parquet_splits_and_shards_of_a_folder(tmp_path: Path) -> None:
    for name, labels in (("train-00000-of-00002", [0]), ("train-00001-of-00002", [1, 1]), ("test-00000-of-00001", [0])):
        write_parquet(tmp_path / f"{name}.parquet", labels, ["x", "y"])
    assert load_images(tmp_path, size=8).labels.tolist() == [0, 1, 1]
    assert len(load_images(tmp_path, size=8, split="test")) == 1
    with pytest.raises(UserError, match=r"no .parquet file of .* is of the split 'val'"):
        load_images(tmp_path, size=8, split="val")


def test_parquet_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labels run from 0 to 5; allowed: 0 to 1"):
        load_images(write_parquet(tmp_path / "a.parquet", [0, 5], ["x", "y"]), size=8)
    with pytest.raises(UserError, match="lacks the columns"):
        load_images(write_parquet(tmp_path / "b.parquet", [0], ["x"], column="picture"), size=8)
    whole = write_parquet(tmp_path / "c.parquet", [0, 1], ["x", "y"])
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged"):
        load_images(whole, size=8)


@pytest.mark.skipif(
    not (SHARED / "cifar10-test.parquet").exists(), reason="the CIFAR-10 Parquet files are not beside the repository"
)
def test_cifar10_parquet_is_read_whole() -> None:
    found = load_images(SHARED / "cifar10-test.parquet", size=32)
    assert found.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(found.labels).tolist() == [1000] * 10
    assert found.classes[3] == "cat"
    assert found.skipped == ()
