"""How many tokens training hides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from continuar.errors import UserError
from continuar.models import MAEConfig
from continuar.models.mar import MaskRatio
from tests.tiny import model_configs, shaken


def test_mask_ratio_is_the_truncated_normal() -> None:
    count = MaskRatio(256, 0.7, 1)
    grid = [(i + 0.5) / 200 for i in range(200)]
    theirs = stats.truncnorm((0.7 - 1) / 0.25, 0.0, loc=1.0, scale=0.25).ppf(grid)
    assert max(abs(count.ratio(u) - b) for u, b in zip(grid, theirs, strict=True)) < 1e-9


def test_counts_follow_their_distribution() -> None:
    torch.manual_seed(0)
    count = MaskRatio(64, 0.5, 1)
    expected = count.distribution()
    drawn = [count.draw() for _ in range(4000)]
    assert sum(expected.values()) == pytest.approx(1)
    assert (min(expected), max(expected)) == (33, 64)
    observed = [drawn.count(c) for c in expected]
    assert stats.chisquare(observed, [4000 * p for p in expected.values()]).pvalue > 1e-3


@given(st.integers(1, 64), st.integers(0, 100))
def test_granularity_leaves_few_counts(granularity: int, seed: int) -> None:
    torch.manual_seed(seed)
    masked = MaskRatio(64, 0.5, granularity).draw()
    assert masked == 64 or masked % granularity == 0


@pytest.mark.parametrize("config", [c for c in model_configs() if c.head.kind == "regression"], ids=lambda c: c.backbone.kind)
def test_training_view_is_a_permutation_with_a_common_known_count(config) -> None:
    torch.manual_seed(0)
    model = shaken(config)
    for _ in range(20):
        view = model.training_view(3, torch.device("cpu"))
        assert torch.equal(view.order_BN.sort(dim=1).values, torch.arange(16).expand(3, 16))
        assert view.query_BQ.shape[1] in model.backbone.num_masked_distribution()


@pytest.mark.parametrize("values", [{"mask_ratio_min": 1.5}, {"mask_ratio_min": -0.1}, {"mask_granularity": 0}])
def test_config_refuses_values_out_of_range(values: dict) -> None:
    with pytest.raises(UserError, match="allowed"):
        MAEConfig(**values)
