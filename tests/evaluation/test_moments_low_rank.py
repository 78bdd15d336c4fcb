"""The Frechet distance stays exact where covariances lack most of their rank."""

import numpy as np
import pytest

from continuar.evaluation.metrics import frechet_distance
from continuar.statistics import Moments, moments


@pytest.mark.parametrize("rank", [1, 20, 128])
def test_frechet_distance_of_scaled_low_rank_covariance(rank: int) -> None:
    """tr(S + 4 S - 2 (4 S^2)^{1/2}) = tr S."""
    rng = np.random.default_rng(0)
    a = moments(rng.normal(size=(600, rank)) @ rng.normal(size=(rank, 128)))
    b = Moments(a.count, a.mean, 4 * a.covariance)
    assert frechet_distance(a, b) == pytest.approx(np.trace(a.covariance), rel=1e-11)
    assert frechet_distance(a, a) < 1e-11 * np.trace(a.covariance)
