"""The allocator's setting: given where the user gave none."""

import os

import pytest

from continuar.distributed import expandable_segments


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_environment_says_otherwise(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # Set before it is removed, so that what the call sets is undone as well.
        monkeypatch.setenv(known, "")
        monkeypatch.delenv(known)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    expandable_segments()
    given = {k: v for k, v in os.environ.items() if k in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    assert given == ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:64"})
