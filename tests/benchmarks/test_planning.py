"""The learning rate of a run whose end is planned late, and overrides by name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipping.planning import continuation, forecast, override, plan_end, unplanned

from continuar.errors import UserError
from continuar.recipes import find_recipe
from continuar.training.config import Run
from continuar.training.optim import learning_rate

RUN = unplanned(override(find_recipe("cifar10")(), ["optim.warmup_images=1000"]))
images = st.integers(2000, 10**8)


def rate(run: Run, done: int) -> float:
    return learning_rate(run.optim, done, run.train.images)


@given(images, images, st.integers(0, 10**8))
def test_a_planned_rate_has_no_jump_and_ends_at_zero(done: int, to_come: int, before: int) -> None:
    run = plan_end(RUN, done, to_come, before)
    assert rate(RUN, done) == rate(run, done) == RUN.optim.lr
    assert rate(run, run.train.images) == 0
    assert run.train.images == done + to_come
    fall = run.optim.decay_images
    assert fall <= to_come
    assert fall == to_come or abs(fall - 0.4 * (before + run.train.images)) <= 1


@given(images, images, st.floats(0.0, 1.0))
def test_planning_again_changes_nothing_when_the_forecast_was_right(done: int, to_come: int, share: float) -> None:
    run = plan_end(RUN, done, to_come)
    later = done + int(share * (to_come - RUN.train.batch_size))
    again = plan_end(run, later, run.train.images - later)
    if later > run.train.images - run.optim.decay_images:
        assert again == run
    assert rate(again, later) == pytest.approx(rate(run, later))


def test_a_fall_that_has_begun_keeps_its_beginning() -> None:
    run = plan_end(RUN, 0, 100_000)
    slower = plan_end(run, 80_000, 5_000)
    assert (slower.train.images, slower.optim.decay_images) == (85_000, 25_000)
    assert rate(slower, 60_000) == RUN.optim.lr


def test_a_forecast_is_a_cautious_median_of_the_newest_rates() -> None:
    assert forecast([1.0, *[100.0] * 20], 10) == 980
    assert forecast([100.0], -5) == 0


def test_a_continuation_warms_up_again_on_other_images() -> None:
    run = continuation(plan_end(RUN, 5_000, 10_000), 2, rewarm_images=500)
    assert (rate(run, 0), rate(run, 250), rate(run, 10**7)) == (0, RUN.optim.lr / 2, RUN.optim.lr)
    assert run.seed == RUN.seed + 2
    assert not run.ema.warmup
    assert replace(run, seed=RUN.seed, optim=RUN.optim, ema=RUN.ema) == RUN


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "override is 'optim.lr'; allowed: field.field=value"),
        ("optim.lrr=1", "unknown field 'optim.lrr'; did you mean optim.lr"),
        ("optimm.lr=1", "unknown field 'optimm.lr'; did you mean optim"),
        ("optim.lr.x=1", "unknown field 'optim.lr.x'"),
        ("optim.lr=-1", "optim.lr is -1.0; allowed: above 0"),
        ("train.engine=fast", "train.engine 'fast'"),
    ],
)
def test_override_refuses_what_does_not_fit(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        override(RUN, [assignment])
    assert message in str(refused.value)


def test_override_takes_json_and_text() -> None:
    run = override(RUN, ["optim.betas=[0.8, 0.9]", "data.path=/a/b=c", "data.flip=false", "train.engine=eager"])
    assert (run.optim.betas, run.data.path, run.data.flip, run.train.engine) == ((0.8, 0.9), "/a/b=c", False, "eager")
