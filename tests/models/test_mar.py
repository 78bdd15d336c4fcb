"""The number of tokens that training masks."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from continuar.errors import UserError
from continuar.models import MAE, MAEConfig
from continuar.models.mar import masked_count_distribution
from tests.tiny import SMALL, model_configs, shaken


def small_mae(grid: tuple[int, int], minimum: float, granularity: int = 1) -> MAE:
    return MAEConfig(**SMALL[MAEConfig] | {"mask_ratio_min": minimum, "mask_granularity": granularity}).build(grid)


@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(1, 80))
def test_masked_counts_are_those_of_the_truncated_normal(seq_len: int, minimum: float, granularity: int) -> None:
    theirs = stats.truncnorm((minimum - 1) / 0.25, 0.0, loc=1.0, scale=0.25)
    expected: Counter[int] = Counter()
    for k in range(1, seq_len + 1):
        rounded = max(granularity, (k + granularity // 2) // granularity * granularity)
        expected[min(seq_len, rounded)] += theirs.cdf(k / seq_len) - theirs.cdf((k - 1) / seq_len)
    found = masked_count_distribution(seq_len, minimum, granularity)
    assert list(found) == sorted(found)
    assert all(share > 0 for share in found.values())
    assert max(abs(expected[count] - found.get(count, 0.0)) for count in expected) < 1e-9


def test_a_ratio_of_one_masks_everything() -> None:
    assert masked_count_distribution(16, 1.0, 1) == {16: 1.0}


@pytest.mark.parametrize("minimum", [0.0, 0.2, 0.57, 0.7])
def test_every_count_that_can_be_drawn_is_listed(minimum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers around every boundary between counts, down to the rarest count and the ends of the interval."""
    mae = small_mae((16, 16), minimum)
    listed = mae.num_masked_distribution()
    normal = stats.truncnorm((minimum - 1) / 0.25, 0.0, loc=1.0, scale=0.25)
    drawn = set()
    for uniform in {0.0, math.nextafter(1, 0)} | {normal.cdf(k / 256) for k in range(256)}:
        for near in (uniform, math.nextafter(uniform, 0), math.nextafter(uniform, 1), uniform + 1e-9):
            monkeypatch.setattr(torch, "rand", lambda *_, near=near, **__: torch.tensor(min(near, 1 - 2**-53), dtype=torch.float64))
            drawn.add(mae.sample_num_masked())
    assert drawn == listed.keys()


def test_counts_follow_their_distribution() -> None:
    torch.manual_seed(0)
    mae = small_mae((8, 8), 0.5)
    expected = mae.num_masked_distribution()
    drawn = [mae.sample_num_masked() for _ in range(4000)]
    assert sum(expected.values()) == pytest.approx(1)
    assert (min(expected), max(expected)) == (33, 64)
    observed = [drawn.count(c) for c in expected]
    assert stats.chisquare(observed, [4000 * p for p in expected.values()]).pvalue > 1e-3


@given(st.integers(1, 64))
def test_granularity_leaves_few_counts(granularity: int) -> None:
    assert all(count == 64 or count % granularity == 0 for count in masked_count_distribution(64, 0.5, granularity))


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
