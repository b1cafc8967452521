"""What is installed is named alike everywhere: the embedded wheels, the repository, the packages that are imported."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import util
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from support.places import ROOT

from lcc_lens.core.machine.wheels import DATA_WHEEL, INSTALL_WHEELS, MODEL_WHEEL

PROJECT = (ROOT / "pyproject.toml").read_text()
REPOSITORY = "/".join(re.search(r'Repository = "https://github\.com/([\w-]+)/([\w-]+)"', PROJECT).groups())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def badge(path: Path) -> str:
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}"
    return f"[![Open in Colab]({BADGE})]({address})"


def test_the_wheels_are_the_same_everywhere() -> None:
    assert f"\nEMBEDDED := {MODEL_WHEEL} {DATA_WHEEL}\n" in (ROOT / "Makefile").read_text()
    assert f"\n{INSTALL_WHEELS} " in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_and_begins_with_the_same_cell(path: Path) -> None:
    title, first = cells(path)[:2]
    assert title["source"][-1] == badge(path)
    assert (first["cell_type"], first["id"], first["outputs"]) == ("code", "install", [])
    assert first["source"] == cells(NOTEBOOKS[0])[1]["source"]
    assert badge(path) in (ROOT / "docs" / "guide.md").read_text()


def test_the_first_cell_installs_what_is_missing_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    first = "".join(cells(NOTEBOOKS[0])[1]["source"])
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(first, {})
    assert ran == []
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    exec(first, {})
    assert all(command[:4] == [sys.executable, "-m", "pip", "install"] for command in ran)
    assert "lcc-lens" in ran[0]
    assert ran[1][5:] == INSTALL_WHEELS.split()[2:]


def test_addresses_of_the_repository_are_those_of_the_project() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *NOTEBOOKS, *(ROOT / ".github").rglob("*.yml")]
    colab = re.compile(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)")
    named = {found for page in pages for found in colab.findall(page.read_text())}
    assert named == {REPOSITORY}
    assert badge(NOTEBOOKS[0]) in (ROOT / "README.md").read_text()


def test_every_package_that_is_imported_is_declared() -> None:
    declared = {name.lower() for name in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?[><=]', PROJECT)}
    packages = packages_distributions()
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "lcc_lens").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    } - {"lcc_lens"} - sys.stdlib_module_names  # fmt: skip
    assert len(imported) > 15
    named = {name: {found.lower().replace("_", "-") for found in packages.get(name, [name])} for name in imported}
    assert [name for name, found in named.items() if not found & declared] == ["trackio"]  # asked for by --log trackio
