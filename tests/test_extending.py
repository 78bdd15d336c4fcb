"""docs/extending.md, followed word by word in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(before: str) -> list[tuple[str, str]]:
    """(file, code) of every Python block whose preceding line matches ``before``, where the file stands in group 1."""
    return re.findall(before + r"\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


def edited(table: str, code: str) -> str:
    """A table's ``__init__`` with the page's import added and its unions replaced."""
    new_import, unions = code.split("\n\n", 1)
    first = table.index("from continuar.")
    table = table[:first] + new_import + "\n" + table[first:]
    for name, value in re.findall(r"^(\w+) = (\(.*?^\)|.*?)$", unions, re.DOTALL | re.MULTILINE):
        table, count = re.subn(rf"^{name} = (\(.*?^\)|.*?)$", f"{name} = {value}", table, flags=re.DOTALL | re.MULTILINE)
        assert count == 1, name
    return table


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", root)
    ((order_file, order),) = blocks(r"In `(src/continuar/\S+\.py)`, above `OrderConfig`:")
    ((_, table),) = blocks(r"The table in the same file (becomes):")
    orders = (root / order_file).read_text(encoding="utf-8")
    before, after = orders.split("\nOrderConfig = ")
    (root / order_file).write_text(f"{before}\n{order}\n\n{table}" + after.split("\n", 1)[1], encoding="utf-8")
    ((head_file, head),) = blocks(r"^`(src/continuar/\S+\.py)`:")
    assert not (root / head_file).exists()
    (root / head_file).write_text(head, encoding="utf-8")
    ((table_file, table),) = blocks(r"In `(src/continuar/\S+/__init__\.py)`[^\n]*:")
    path = root / table_file
    path.write_text(edited(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    return root


def run(copy: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pages_model_trains_and_samples(copy: Path) -> None:
    pytest.importorskip("sklearn")
    ((code),) = re.findall(r"Train both together[^\n]*\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert "(2, 8, 8, 3)" in run(copy, "-c", code)


def test_the_laws_hold_for_the_pages_order_and_head(copy: Path) -> None:
    assert "pytest tests/conformance -k" in PAGE
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "-k", "mae-doubling-laplace")
    assert re.search(r"\b(1\d|2\d) passed", out), out
