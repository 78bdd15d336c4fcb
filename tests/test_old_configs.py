"""Configs and runs that version 0.1.0 wrote are read by their old names, and mean the same by today's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continuar.checkpoints.store import PipelineConfig
from continuar.checkpoints.tokenizers import TokenizerFile, read_tokenizer_file
from continuar.config import RENAMED_FIELDS, RENAMED_VALUES, from_json, rename_old_fields, to_json
from continuar.data.latent_cache import CacheInfo, ShardInfo
from continuar.evaluation.networks import ClassifierConfig
from continuar.io import checksum, read_config, write_json
from continuar.pipeline import SHIPPED, newest_checkpoints
from continuar.recipes import RECIPES
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from continuar.training.config import BaseRun, DiTRun, Run, TokenizerRun
from continuar.training.trainer import train
from tests.tiny import tiny_run, write_images

OLD = Path(__file__).parent / "old_configs"
"""As the old code wrote them: the shipped model's, a run of 200 steps of digits, and recipes."""
ROOTS = (PipelineConfig, TokenizerFile, Run, DiTRun, TokenizerRun, CacheInfo, ShardInfo, ClassifierConfig)


def config_classes(kind: Any) -> Iterator[type]:
    """All dataclasses that a config of this type may hold."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from config_classes(hint)
    for argument in typing.get_args(kind):
        yield from config_classes(argument)


CLASSES = sorted({c for root in ROOTS for c in config_classes(root)}, key=lambda c: c.__name__)


def renamed_back(value: Any) -> Any:
    """The inverse of `rename_old_fields` for fields and values."""
    if isinstance(value, list):
        return [renamed_back(v) for v in value]
    if not isinstance(value, dict):
        return value
    fields = {new: old for old, new in RENAMED_FIELDS.items()}
    values = {name: {new: old for old, new in table.items()} for name, table in RENAMED_VALUES.items()}
    return {
        fields.get(k, k): values[k].get(v, v) if k in values and isinstance(v, str) else renamed_back(v) for k, v in value.items()
    }


def test_no_config_of_today_has_an_old_name() -> None:
    assert len(CLASSES) > 40
    names = {f"{c.__name__}.{f.name}" for c in CLASSES for f in dataclasses.fields(c)}
    assert [n for n in names if n.split(".")[1] in RENAMED_FIELDS] == []
    assert set(RENAMED_FIELDS.values()) <= {n.split(".")[1] for n in names}
    for field, values in RENAMED_VALUES.items():
        hints = [typing.get_type_hints(c).get(field) for c in CLASSES]
        allowed = {v for hint in hints for v in typing.get_args(hint)}
        assert set(values.values()) <= allowed
        assert not values.keys() & allowed


@pytest.mark.parametrize(
    ("name", "recipe"), [("dit_run", RECIPES["dit_digits"]), ("flow_run", RECIPES["digits_mar_flow"])], ids=["dit", "flow"]
)
def test_an_old_run_is_the_recipe_of_today(name: str, recipe: Any) -> None:
    run: BaseRun = recipe()
    assert read_config(type(run), OLD / f"{name}.json") == run


def test_an_old_tokenizer_run_is_the_recipe_of_today() -> None:
    assert read_config(TokenizerRun, OLD / "tokenizer_run.json") == TOKENIZER_RECIPES["vq_cifar10"]()


def test_an_old_run_of_digits_has_todays_words() -> None:
    run = read_config(Run, OLD / "digits_run.json")
    recipe = RECIPES["digits"]()
    assert isinstance(recipe, Run)
    assert (run.head, run.backbone, run.sampling, run.optim, run.ema) == (
        recipe.head,
        recipe.backbone,
        recipe.sampling,
        recipe.optim,
        recipe.ema,
    )


def test_the_shipped_config_has_todays_words_and_means_what_it_did() -> None:
    text = (SHIPPED / "cifar10" / "config.json").read_text(encoding="utf-8")
    assert rename_old_fields(json.loads(text)) == json.loads(text)
    assert read_config(PipelineConfig, OLD / "saved_model.json") == from_json(PipelineConfig, json.loads(text))


def test_an_old_saved_tokenizer_of_a_diffusers_network_loads(tmp_path: Path) -> None:
    network = {"kind": "tiny", "latent_channels": 4, "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    write_json(tmp_path / "tokenizer.json", {"tokenizer": {"kind": "vae", "network": network, "image_size": 32}, "format": 1})
    config = read_tokenizer_file(tmp_path).tokenizer
    assert to_json(config)["network"]["options"] == {k: v for k, v in network.items() if k != "kind"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_old_names(name: str) -> None:
    value = to_json(RECIPES[name]())
    assert rename_old_fields(renamed_back(value)) == value


def test_a_run_directory_with_old_names_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    device, run = torch.device("cpu"), tiny_run(write_images(tmp_path / "images"))
    train(run, tmp_path / "new", device=device, should_stop=lambda: True)
    checkpoint = newest_checkpoints(tmp_path / "new")[0]
    for path in (tmp_path / "new" / "config.json", checkpoint / "config.json"):
        value = json.loads(path.read_text())
        write_json(path, renamed_back(value))
        assert json.loads(path.read_text()) != value
    state = json.loads((checkpoint / "state.json").read_text())
    state["checksums"]["config.json"] = checksum(checkpoint / "config.json")
    write_json(checkpoint / "state.json", state)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    train(run, tmp_path / "old", device=device, resume=True)
    train(run, tmp_path / "undisturbed", device=device)
    pair = [newest_checkpoints(tmp_path / name)[0] for name in ("old", "undisturbed")]
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(p / file) for p in pair)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
