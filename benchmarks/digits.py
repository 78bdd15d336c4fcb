"""How many generated digits are what was asked for, over guidance and diffusion steps.

    python benchmarks/digits.py out/digits

A support vector machine trained on all real digits judges; its own accuracy on held-out real digits (5-fold cross-validation) is
printed first. Diversity is the mean distance of an image to its nearest neighbour of the same class among the generated ones,
beside that of as many real images.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

import continuar
from continuar.data.loader import load_digits


def nearest(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance to the nearest image of the same class, in grey values."""
    found = []
    for label in np.unique(labels):
        x = images[labels == label]
        distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
        np.fill_diagonal(distance, np.inf)
        found.append(distance.min(1))
    return float(np.concatenate(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--per-class", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--diffusion-steps", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--weights", default="ema")
    options = parser.parse_args()
    real = load_digits()
    x = real.images[..., 0].reshape(len(real), -1).astype(float)
    judge = SVC(gamma="scale")
    print(f"real digits: accuracy {cross_val_score(judge, x, real.labels, cv=5).mean():.3f}", end=", ")
    judge.fit(x, real.labels)
    few = np.concatenate([np.flatnonzero(real.labels == c)[: options.per_class] for c in range(10)])
    print(f"nearest neighbour {nearest(x[few], real.labels[few]):.0f}")
    pipe = continuar.load(options.model, weights=options.weights)
    labels = np.repeat(np.arange(10), options.per_class)
    for steps in options.diffusion_steps:
        for guidance in options.guidance_scale:
            began = time.perf_counter()
            images = pipe(labels.tolist(), 0, guidance_scale=guidance, diffusion_steps=steps, batch_size=300)[..., 0]
            seconds = time.perf_counter() - began
            flat = images.reshape(len(images), -1).astype(float)
            accuracy = (judge.predict(flat) == labels).mean()
            print(
                f"guidance {guidance:3.1f}  diffusion steps {steps:3d}  accuracy {accuracy:.3f}  "
                f"nearest neighbour {nearest(flat, labels):3.0f}  {1e3 * seconds / len(images):.0f} ms/image",
                flush=True,
            )


if __name__ == "__main__":
    main()
