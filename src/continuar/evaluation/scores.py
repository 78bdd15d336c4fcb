"""All scores of a set of samples against a reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from continuar.evaluation.classifier import class_accuracy
from continuar.evaluation.inception_score import SPLITS, InceptionScore, inception_score
from continuar.evaluation.kernel_distance import SUBSET_SIZE, KernelDistance, kernel_distance
from continuar.evaluation.moments import Moments, frechet_distance
from continuar.evaluation.precision_recall import K_DENSITY, K, PrecisionRecall, precision_recall
from continuar.evaluation.reference import Statistics, few_images


@dataclass(frozen=True)
class Scores:
    """None where something that a score needs is not there; ``notes`` say what."""

    frechet_distance: float
    inception_score: InceptionScore | None
    kernel_distance: KernelDistance | None
    precision_recall: PrecisionRecall | None
    class_accuracy: float | None
    """The share of samples that the network takes for what was asked for."""
    notes: tuple[str, ...]
    spatial_frechet_distance: float | None = None
    """sFID, in the FID network's spatial features; see `inception`."""

    def values(self) -> dict[str, float]:
        """Every number by name, for tables and plots."""
        found: dict[str, float] = {"frechet_distance": self.frechet_distance}
        if self.spatial_frechet_distance is not None:
            found["spatial_frechet_distance"] = self.spatial_frechet_distance
        if self.inception_score is not None:
            score = self.inception_score
            found |= {"inception_score": score.mean, "inception_score_std": score.std, "inception_score_whole": score.whole}
        if self.kernel_distance is not None:
            found |= {"kernel_distance": self.kernel_distance.mean, "kernel_distance_std": self.kernel_distance.std}
        if self.precision_recall is not None:
            scores = self.precision_recall
            found |= {"precision": scores.precision, "recall": scores.recall}
            found |= {"density": scores.density, "coverage": scores.coverage}
        if self.class_accuracy is not None:
            found["class_accuracy"] = self.class_accuracy
        return found


def score_samples(
    moments: Moments,
    features_MD: np.ndarray,
    logits_MC: np.ndarray | None,
    reference: Statistics,
    *,
    labels_M: np.ndarray | None = None,
    spatial: Moments | None = None,
    device: torch.device | str = "cpu",
) -> Scores:
    """The scores of samples whose moments, features and logits are given.

    Args:
        labels_M: what was asked for, where the logits are of the same classes.
        spatial: the moments of the samples' spatial features, where the network has them.
        device: where distances are computed.

    Raises:
        UserError: the reference's features are of other dimensions.
    """
    count, dimensions = features_MD.shape
    notes = [f"samples: {n}" for n in few_images(count, dimensions)]
    notes += [f"reference: {n}" for n in few_images(reference.moments.count, dimensions)]
    score = kernel = manifolds = located = None
    if spatial is not None and reference.spatial is not None:
        located = frechet_distance(spatial, reference.spatial)
    elif spatial is not None:
        notes.append("no spatial Frechet distance (sFID): the reference has no spatial statistics (mu_s, sigma_s)")
    if logits_MC is None:
        notes.append("no inception score: the network judges no classes")
    elif count < SPLITS:
        notes.append(f"no inception score: {count} images for {SPLITS} splits")
    else:
        score = inception_score(logits_MC)
    known_RD = reference.features_RD
    fewest = 0 if known_RD is None else min(count, len(known_RD))
    if known_RD is None or not len(known_RD):
        notes.append("no kernel distance, precision, recall, density and coverage: the reference has neither features nor images")
    elif fewest <= max(K, K_DENSITY):
        notes.append(f"no kernel distance, precision, recall, density and coverage: {fewest} images; {K_DENSITY + 1} are needed")
    else:
        # Small sets are halved, so that subsets differ and their spread means something.
        kernel = kernel_distance(features_MD, known_RD, subset_size=min(SUBSET_SIZE, fewest // 2), device=device)
        manifolds = precision_recall(features_MD, known_RD, device=device)
    accuracy = class_accuracy(logits_MC.argmax(1), labels_M) if logits_MC is not None and labels_M is not None else None
    return Scores(frechet_distance(moments, reference.moments), score, kernel, manifolds, accuracy, tuple(notes), located)
