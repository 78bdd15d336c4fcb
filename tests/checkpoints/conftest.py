"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .files import content
from .layout import Sizes


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Saves an official file with some entries changed (... leaves one out); returns its path."""

    def save(sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float32, **others: Any) -> str:  # noqa: B008
        torch.save(content(sizes, dtype, **others), tmp_path / "mar.pth")
        return str(tmp_path / "mar.pth")

    return save
