"""Which kind of source lies at a path."""

from __future__ import annotations

from pathlib import Path

from continuar.data.sources import FolderSource, ParquetSource, Source
from continuar.data.webdataset import TarSource
from continuar.errors import require

SPLITS = ("train", "validation", "val", "test")


def find_source(path: Path, split: str) -> Source:
    """The images at ``path``; see `load_images`.

    Raises:
        UserError: no such path, no images, or not of a known layout.
    """
    require(path.exists(), f"data path {path} does not exist")
    if path.is_file():
        require(path.suffix in (".parquet", ".tar"), f"data path {path} is a file; allowed: a .parquet or .tar file, or a folder")
        return _of_files([path])
    for suffix in (".parquet", ".tar"):
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            of_split = [p for p in files if split in p.name]
            require(
                bool(of_split) or not any(s in p.name for p in files for s in SPLITS),
                f"no {suffix} file of {path} is of the split '{split}' (there are {', '.join(p.name for p in files[:5])})",
            )
            return _of_files(of_split or files)
    return FolderSource(path / split if (path / split).is_dir() else path)


def _of_files(paths: list[Path]) -> Source:
    return ParquetSource(paths) if paths[0].suffix == ".parquet" else TarSource(paths)
