"""Measures how much of the package a reader meets, and compares it with the goals of docs/architecture.md.

    make house                       # every figure; trains `digits` for a few steps, takes about a minute
    python tools/house.py --fast     # what reading the source tells, without running it (part of `make check`)

"Entered" counts the files of the package in which a function runs. Importing a module or defining a class does not count.
The script exits with 1 if a figure misses its goal.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import re
import sys
import tempfile
import threading
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "continuar"
WRONG_OPENING = re.compile(r"(What|Of|Where|Whether|How|Who|As|See)\b")
CORE = re.compile(r"^\d+\. `([\w/]+\.py)`", re.MULTILINE)
"""The numbered reading list of the method in docs/architecture.md."""

GOALS = {
    "files of the core reading list": 10,
    "lines of the core reading list": 1600,
    "files entered by pipe(), eager": 14,
    "files entered by a training step": 13,
    "files entered by train()": 30,
    "files entered by `continuar train digits`": 60,
    "lines of source": 16_500,
    "import circles": 0,
    "docstrings with a wrong opening": 0,
}
AT_LEAST = {"comments per 1,000 lines of code": 40}


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def core_files() -> list[Path]:
    """The files that docs/architecture.md lists for a first reading."""
    return [PACKAGE / name for name in CORE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))]


def count_lines(files: list[Path]) -> int:
    """Lines of these files, blank ones included."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of a module: of itself, its classes and functions, and of documented fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for before, statement in zip([None, *node.body], node.body, strict=False):
                documents = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
                value = statement.value if documents and isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield statement.lineno, value.value


def wrong_docstrings() -> list[str]:
    """`file:line: first words` of every docstring that does not start with what the thing is or does."""
    found = []
    for file in sources():
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8"))):
            if WRONG_OPENING.match(text.strip()):
                found.append(f"{file.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0][:80]}")
    return found


def comment_share() -> float:
    """Comment lines per 1,000 lines of code; a docstring is neither."""
    comments = code = 0
    for file in sources():
        text = file.read_text(encoding="utf-8")
        in_docstrings = set()
        for line, docstring in docstrings(ast.parse(text)):
            in_docstrings.update(range(line, line + docstring.count("\n") + 1))
        with_code = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                # Directives speak to tools, not to a reader.
                comments += not re.match(r"#\s*(fmt|noqa|type|pyright|ruff)\b", token.string)
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
                with_code.update(range(token.start[0], token.end[0] + 1))
        code += len(with_code - in_docstrings)
    return 1000 * comments / code


def import_circles() -> list[list[str]]:
    """Groups of modules that import each other, imports inside functions included."""
    names = {".".join(("continuar", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in sources()}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    imports: dict[str, set[str]] = {}
    for name, file in modules.items():
        imports[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("continuar"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imports[name].add(inner if inner in modules else str(node.module))
    reached = {name: _reach(name, imports) for name in imports}
    circles = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in imports if a in reached[a]}
    return [list(circle) for circle in sorted(circles)]


def _reach(start: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    new = set(imports[start])
    while new:
        found |= new
        new = {b for a in new for b in imports.get(a, ())} - found
    return found


def files_entered(function: Callable[[], object]) -> set[str]:
    """Files of the package in which a function runs while ``function`` does, in any thread."""
    entered: set[CodeType] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            entered.add(frame.f_code)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    # Bodies of modules and classes are code without CO_NEWLOCALS or CO_OPTIMIZED.
    bodies = [code for code in entered if code.co_flags & inspect.CO_OPTIMIZED]
    return {code.co_filename for code in bodies if code.co_filename.startswith(str(PACKAGE))}


def measure_entered(show: bool) -> dict[str, int]:
    """The figures that need the package to run: sampling the shipped model, and a few steps of `digits`."""
    import torch

    import continuar
    from continuar.cli.main import main
    from continuar.recipes import RECIPES, find_recipe
    from continuar.training import step as step_module
    from continuar.training.trainer import train

    # Compiling counts files of its own; one thread keeps the profile small.
    torch.set_num_threads(1)
    found: dict[str, set[str]] = {}
    pipe = continuar.load("cifar10")
    found["files entered by pipe(), eager"] = files_entered(lambda: pipe(labels=[3], seeds=[0], steps=4, engine="eager"))

    taken: list[set[str]] = []
    run_step = step_module.TrainStep.__call__

    def traced(*arguments: object) -> object:
        if taken:
            return run_step(*arguments)  # type: ignore[arg-type]
        taken.append(files_entered(lambda: run_step(*arguments)))  # type: ignore[arg-type]
        return None

    words = ["train", "digits", "--train.images", "256", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--out", f"{place}/warm"])
        found["files entered by `continuar train digits`"] = files_entered(lambda: main([*words, "--out", f"{place}/cli"]))
        recipe = find_recipe("digits", RECIPES)()
        run = replace(recipe, train=replace(recipe.train, images=256))
        found["files entered by train()"] = files_entered(lambda: train(run, Path(place) / "run", device=torch.device("cpu")))
        step_module.TrainStep.__call__ = traced  # type: ignore[method-assign, assignment]
        train(run, Path(place) / "step", device=torch.device("cpu"))
        step_module.TrainStep.__call__ = run_step  # type: ignore[method-assign]
        found["files entered by a training step"] = taken[0]
    for name, files in found.items() if show else ():
        print(name, *sorted(str(Path(file).relative_to(PACKAGE)) for file in files), sep="\n    ")
    return {name: len(files) for name, files in found.items()}


def main() -> int:
    """Prints every figure beside its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--fast", action="store_true", help="read the source, run nothing")
    parser.add_argument("--show", action="store_true", help="list the files, docstrings and circles that are counted")
    options = parser.parse_args()
    core, wrong, circles = core_files(), wrong_docstrings(), import_circles()
    figures: dict[str, float] = {
        "files of the core reading list": len(core),
        "lines of the core reading list": count_lines(core),
        "lines of source": count_lines(sources()),
        "files of source": len(sources()),
        "import circles": len(circles),
        "docstrings with a wrong opening": len(wrong),
        "comments per 1,000 lines of code": comment_share(),
    }
    if options.show or wrong or circles:
        print(*wrong, *(" <-> ".join(circle) for circle in circles), sep="\n")
    if not options.fast:
        figures |= measure_entered(options.show)
    missed = 0
    for name, value in figures.items():
        goal, least = GOALS.get(name), AT_LEAST.get(name)
        bad = (goal is not None and value > goal) or (least is not None and value < least)
        missed += bad
        bar = f"at most {goal:,}" if goal is not None else f"at least {least}" if least is not None else ""
        print(f"{name:<44} {value:>8,.0f}  {bar:<16} {'MISSED' if bad else ''}".rstrip())
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
