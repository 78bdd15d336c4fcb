"""The pipeline: labels, seeds, batches, and where it may write."""

from pathlib import Path

import numpy as np
import pytest
import torch

import continuar
from continuar.errors import UserError
from continuar.pipeline import Pipeline, to_uint8
from tests.tiny import model_configs, model_file, shaken


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    config = model_configs()[0]
    return Pipeline(model_file(config), shaken(config))


def test_call_gives_uint8_images_that_do_not_depend_on_batch_size(pipe: Pipeline) -> None:
    labels, seeds = [0, "bee", 2, "0", 1], [11, 12, 13, 14, -15]
    images = pipe(labels, seeds)
    assert images.shape == (5, 8, 8, 3)
    assert images.dtype == np.uint8
    for batch_size in (1, 2, 4):
        again = pipe(labels, seeds, batch_size=batch_size)
        assert np.abs(images.astype(int) - again.astype(int)).max() <= 1
    assert len({image.tobytes() for image in images}) == 5


def test_one_seed_counts_upwards_and_no_labels_means_no_class(pipe: Pipeline) -> None:
    assert np.array_equal(pipe([0, 1, 2], 5), pipe([0, 1, 2], [5, 6, 7]))
    assert np.array_equal(pipe([0, 1, 2], 5), pipe(np.arange(3), np.int64(5)))
    assert pipe(seeds=[1, 2]).shape[0] == 2
    assert not np.array_equal(pipe(seeds=[1]), pipe([0], [1]))


def test_auto_is_the_engine_it_chooses(pipe: Pipeline) -> None:
    assert pipe.engine("auto") is pipe.engine("fast") is pipe.engine()
    assert pipe.engine("eager") is not pipe.engine("auto")


def test_progress_counts_steps_of_all_batches(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe([0, 1, 2], 0, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 10) for i in range(1, 11)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [3]}, "class is 3; allowed: 0 to 2"),
        ({"labels": ["wasp"]}, "unknown class 'wasp'"),
        ({"labels": ["--3"]}, "unknown class '--3'"),
        ({"labels": [1.5]}, "class is 1.5; allowed: a class number or name"),
        ({"labels": "bee"}, "labels is the text 'bee'"),
        ({"labels": [0, 1], "seeds": [1]}, "1 seeds for 2 labels"),
        ({"labels": [0], "seeds": [2**63]}, "seed is 9223372036854775808"),
        ({"labels": []}, "nothing to generate"),
        ({"labels": [0], "steps": 17}, "steps is 17; allowed: 1 to 16"),
        ({"labels": [0], "batch_size": 0}, "batch size is 0"),
        ({"labels": [0], "guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"labels": [0], "sampler": "euler"}, "sampler is 'euler'; allowed: ddpm, ddim"),
        ({"labels": [0], "guidance_schedule": "cosine"}, "guidance schedule is 'cosine'"),
    ],
)
def test_call_refuses_bad_arguments(pipe: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        pipe(**arguments)
    assert message in str(error.value)


def test_save_never_replaces_what_is_not_a_saved_model(pipe: Pipeline, tmp_path: Path) -> None:
    saved = pipe.save_pretrained(tmp_path / "m")
    assert {p.name for p in pipe.save_pretrained(saved).iterdir()} == {"config.json", "model.safetensors"}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (tmp_path / "file").write_text("kept")
    for other in (run, tmp_path / "file"):
        with pytest.raises(UserError, match="is not a saved model; choose another directory"):
            pipe.save_pretrained(other)
    assert (run / "checkpoints").is_dir()
    assert (tmp_path / "file").read_text() == "kept"


def test_package_gives_its_names_lazily() -> None:
    assert set(continuar.__all__) <= set(dir(continuar))
    assert continuar.load.__self__ is Pipeline
    assert continuar.DiffusionHead.__name__ == "DiffusionHead"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        continuar.nothing  # noqa: B018


def test_to_uint8_rounds_to_nearest_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
