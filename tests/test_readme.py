"""The README's Python snippets run, and the command lines of all documents name commands, recipes and options that exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from continuar.cli.common import run_command
from continuar.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_readme_python_snippets_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["images"].shape == (2, 32, 32, 3)
    assert names["picture"].shape == (1, 32, 32, 3)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_command_lines_are_accepted(document: Path) -> None:
    for block in blocks(document, ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("continuar ") else []
            # Dots stand for words that the text left out, RECIPE for any recipe.
            words = ["digits" if word == "RECIPE" else word for word in words]
            if words and "..." not in line and "--help" not in words and "--list" not in words:
                accept(words[1:])


def accept(words: list[str]) -> None:
    """Parses a command line without running it."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    module, function = COMMANDS[name][0].split(":")
    kind = get_type_hints(getattr(import_module(f"continuar.cli.{module}"), function))["options"]
    parsed = []

    def command(options: Any) -> None:
        parsed.append(options)

    command.__annotations__["options"] = kind
    run_command(command, f"continuar {name}", words[len(name.split()) :])
    assert isinstance(parsed[0], kind)
