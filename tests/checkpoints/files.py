"""Official checkpoint files as their training code writes them, and how the tests call the command."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from continuar.cli.main import main
from continuar.errors import UserError

from .layout import Sizes, args, state


def content(sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float32, **others: Any) -> dict[str, Any]:  # noqa: B008
    """What official training saves: both sets of weights (EMA as parameters), and everything beside them."""
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.95))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    values = {
        "model": collections.OrderedDict(state(sizes, dtype, 1)),
        "model_ema": {k: nn.Parameter(v) for k, v in state(sizes, dtype, 2).items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": args(sizes),
    }
    return {k: v for k, v in (values | others).items() if v is not ...}


def read(path: str | Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def convert(arguments: list[str]) -> int:
    """Runs ``continuar convert``; errors are raised as they are."""
    return main(["convert", *arguments, "--debug"])


def refused(arguments: list[str]) -> str:
    """The message of the error that the arguments lead to; it is one line and never advises to read unsafely."""
    with pytest.raises(UserError) as problem:
        convert(arguments)
    message = str(problem.value)
    assert "\n" not in message
    assert "weights_only" not in message
    return message
