"""The main job for real: train the digits recipe as it is, and let a classifier of real digits read what it generates."""

from pathlib import Path

import numpy as np
import pytest
import torch

from continuar.recipes.images import digits
from continuar.training.trainer import train


@pytest.mark.slow
def test_generated_digits_are_what_was_asked_for(tmp_path: Path) -> None:
    svm = pytest.importorskip("sklearn.svm")
    from continuar.data.loader import load_digits

    torch.set_num_threads(2)
    real = load_digits()
    judge = svm.SVC(gamma="scale").fit(real.images[..., 0].reshape(len(real), -1).astype(float), real.labels)
    pipe = train(digits(), tmp_path / "run", device=torch.device("cpu"))
    labels = np.repeat(np.arange(10), 20)
    images = pipe(labels.tolist(), 0, batch_size=200)
    accuracy = (judge.predict(images[..., 0].reshape(len(images), -1).astype(float)) == labels).mean()
    assert accuracy > 0.95
    assert len({image.tobytes() for image in images}) == len(images)
