"""Configs to JSON and back, and what is wrong with a JSON that does not fit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continuar.config import differences, from_json, to_json
from continuar.errors import UserError, unknown_name
from continuar.recipes import RECIPES
from continuar.training.config import Run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_a_json_file(name: str) -> None:
    run = RECIPES[name]()
    assert from_json(type(run), json.loads(json.dumps(to_json(run)))) == run


def broken(change) -> dict:
    value = to_json(RECIPES["digits"]())
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(sede=1), "unknown field of run 'sede'; did you mean seed?"),
        (lambda v: v["optim"].update(lr="fast"), "run.optim.lr is 'fast'; float is expected"),
        (lambda v: v["optim"].update(betas=[0.9]), "run.optim.betas has 1 entries; 2 are expected"),
        (lambda v: v["optim"].update(betas=0.9), "run.optim.betas is 0.9; a list is expected"),
        (lambda v: v["tokenizer"].update(kind="pixels"), "unknown kind of run.tokenizer 'pixels'; did you mean pixel?"),
        (lambda v: v["train"].update(engine="fast"), "unknown run.train.engine 'fast'"),
        (lambda v: v["train"].update(batch_size=True), "run.train.batch_size is True; int is expected"),
        (lambda v: v.update(data=None), "run.data is None; an object with the fields of DataConfig is expected"),
    ],
)
def test_what_does_not_fit_is_named(change, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_json(Run, broken(change), "run")
    assert message in str(error.value)


def test_a_missing_field_is_named() -> None:
    from continuar.tokenizers import TokenSpec

    with pytest.raises(UserError, match="spec lacks the field 'grid'"):
        from_json(TokenSpec, {"dim": 2}, "spec")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_differences_are_none_only_for_equal_values(value) -> None:
    assert differences(value, value) == []
    assert differences({"a": value}, {"a": [value]}) != []


def test_differences_name_the_path() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == ["a.b: 1 -> 3", "c: 2 -> null", "d: null -> 4"]


def test_unknown_name_suggests_and_lists() -> None:
    many = ["apple", "pear", *map(str, range(30))]
    assert str(unknown_name("fruit", "aple", many)) == "unknown fruit 'aple'; did you mean apple? (32 are allowed)"
    assert str(unknown_name("fruit", "aple", many[:2])) == "unknown fruit 'aple'; did you mean apple? (allowed: apple, pear)"
    message = str(unknown_name("fruit", "zzz", many))
    assert message.startswith("unknown fruit 'zzz' (allowed: apple, pear, 0")
    assert message.endswith("... (32 in all))")
    assert str(unknown_name("fruit", "x", [])) == "unknown fruit 'x' (allowed: none)"
