"""WebDataset tars as a source of images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from continuar.data.loader import class_names, load_images
from continuar.data.sources import find_source
from continuar.errors import UserError


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(labels: list[Any], first: int = 0, key: str = "s{:04d}") -> dict[str, bytes]:
    files = {}
    for i, label in enumerate(labels, first):
        files |= {f"{key.format(i)}.png": picture(i), f"{key.format(i)}.cls": str(label).encode()}
    return files


def test_tars_of_a_folder_are_read_in_order_and_at_random_places(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0000.tar", samples([2, 0]))
    write_tar(tmp_path / "train-0001.tar", samples([1, 2, 2], first=2))
    write_tar(tmp_path / "val-0000.tar", samples([0], first=9))
    found = load_images(tmp_path, size=8)
    assert found.labels.tolist() == [2, 0, 1, 2, 2]
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.classes == ("0", "1", "2")
    assert load_images(tmp_path, size=8, split="val").images.max() == 9
    source = find_source(tmp_path, "train")
    assert source.read(3) == picture(3)
    assert source.name(3) == f"{tmp_path / 'train-0001.tar'} s0003.png"
    with pytest.raises(UserError, match=r"no \.tar file of .* is of the split 'test'"):
        load_images(tmp_path, size=8, split="test")


def test_class_names_come_from_classes_txt(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    path = write_tar(tmp_path / "a.tar", samples([2, 0]))
    assert class_names(path) == ("ant", "bee", "cat", "dog")


def test_class_names_come_from_json(tmp_path: Path) -> None:
    files = {}
    for i, (label, name) in enumerate([(1, "bee"), (0, "ant"), (3, None)]):
        values = {"label": label, "class_name": name, "more": [1]}
        files |= {f"a/{i}.JPG": picture(i), f"a/{i}.json": json.dumps(values).encode()}
    found = load_images(write_tar(tmp_path / "a.tar", files), size=8)
    assert found.labels.tolist() == [1, 0, 3]
    assert found.classes == ("ant", "bee", "2", "3")


@pytest.mark.parametrize("way", ["cls", "json", "folders"])
def test_labels_that_are_names_are_classes_in_sorted_order(way: str, tmp_path: Path) -> None:
    files = {}
    for i, name in enumerate(["dog", "ant", "dog"]):
        if way == "folders":
            files[f"./{name}/inner/{i}.png"] = picture(i)
        else:
            label = name if way == "cls" else json.dumps({"label": name})
            files |= {f"{i}.{way}": label.encode(), f"{i}.png": picture(i)}
    found = load_images(write_tar(tmp_path / "a.tar", files), size=8)
    assert found.classes == ("ant", "dog")
    assert found.labels.tolist() == [1, 0, 1]


def test_samples_without_an_image_hidden_files_and_other_files_are_passed_over(tmp_path: Path) -> None:
    files = samples([0, 1]) | {"s0009.cls": b"5", "._s0000.png": b"x", "s0000.txt": b"caption", "s0001.mask.png": picture(99)}
    found = load_images(write_tar(tmp_path / "a.tar", files), size=8)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert found.labels.tolist() == [0, 1]


def test_broken_images_are_named_skipped_and_counted(tmp_path: Path) -> None:
    files = samples([0, 1, 0, 1]) | {"s0001.png": picture(1)[:40]}
    path = write_tar(tmp_path / "a.tar", files)
    found = load_images(path, size=8, max_skipped_share=0.25)
    assert found.labels.tolist() == [0, 0, 1]
    assert found.images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith(f"{path} s0001.png: ")
    with pytest.raises(UserError, match="1 of 4 images cannot be used"):
        load_images(path, size=8, max_skipped_share=0.1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no images; allowed: KEY.jpg beside KEY.cls, or CLASS/KEY.jpg"),
        ({"a.png": picture(0)}, "a has no label; allowed: KEY.cls"),
        ({"a.png": picture(0), "a.cls": b" "}, "a.cls is empty; allowed: a number or a name"),
        ({"a.png": picture(0), "a.json": b"{"}, "a.json is not valid JSON"),
        ({"a.png": picture(0), "a.json": b'{"label": [1]}'}, r"label is [1]; allowed: a number or a name"),
        (samples([0, "ant"]), "some labels are numbers and some are names"),
        (samples([0, -1]), "labels run from -1 to 0; allowed: 0 to 0"),
    ],
)
def test_tars_that_cannot_be_used_are_named(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError) as error:
        load_images(path, size=8)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("harm", ["compressed", "truncated", "text"])
def test_tars_that_cannot_be_read_are_named(harm: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples([0] * 40), "w:gz" if harm == "compressed" else "w")
    if harm != "compressed":
        path.write_bytes(path.read_bytes()[:30_000] if harm == "truncated" else b"hello " * 200)
    with pytest.raises(UserError, match=r"a\.tar is truncated, compressed or not a tar: .*; allowed: a plain \.tar"):
        load_images(path, size=8)


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    path = write_tar(tmp_path / "a.tar", samples([0, 2]))
    with pytest.raises(UserError, match="labels run from 0 to 2; allowed: 0 to 1"):
        load_images(path, size=8)


def test_images_come_back_as_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    path = write_tar(tmp_path / "a.tar", {"a.b.png": b"", "c.png": file.getvalue(), "c.cls": b"0"})
    assert np.array_equal(load_images(path, size=8).images[0], pixels)
