"""The code blocks of README, guide and overview of commands run as they stand, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.documented import PAGES, assert_restored, blocks, run_commands

import lcc_lens as lcc
from lcc_lens.core.reading import read_json
from lcc_lens.restoration.result import Restoration

#: Pages with code, each with the tests that run it.
HERE = {"README.md", "docs/guide.md", "docs/cli.md"}
ELSEWHERE = {
    "test_documented_pages.py": {
        "docs/causes.md", "docs/export.md", "docs/paper_tables.md", "docs/prompts.md", "docs/scale.md",
        "docs/results/pruning.md", "docs/results/training_cost.md",
    },
    "test_extending.py": {"docs/extending.md"},
}  # fmt: skip


def test_every_page_with_code_has_a_test_that_runs_it() -> None:
    code = re.compile(r"^```(python|bash)$|^ *(lcc-lens|python|accelerate) ", re.MULTILINE)
    assert {page for page, text in PAGES.items() if code.search(text)} == HERE.union(*ELSEWHERE.values())
    for module, pages in ELSEWHERE.items():
        text = (Path(__file__).parent / module).read_text()
        assert all(Path(page).name in text for page in pages)


def test_the_python_example_restores_and_its_export_has_an_effect(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports, export = [], lcc.export
    monkeypatch.setattr(lcc, "export", lambda *arguments: reports.append(export(*arguments)))
    (example,) = blocks("README.md", "python")
    space: dict[str, Any] = {}
    exec(re.sub(r"\bn=(\d+)", lambda size: f"n={int(size[1]) // 16}", example), space)
    assert_restored(space["restoration"].record.losses)
    assert reports[0].logit_effect > 1e-3
    assert len(space["heads"]) == 4


def test_the_commands_of_the_readme_restore(place: Path) -> None:
    assert run_commands("README.md") == ["prune", "scan", "restore", "export", "eval", "explore"]
    assert_restored(Restoration.load("runs/mine").record.losses)
    assert read_json(Path("runs/mine/metrics.json"))["heads"] == 4
    assert Path("runs/mine/explorer.html").exists()


@pytest.mark.slow
def test_the_guide_runs_from_pruning_to_an_interactive_session(place: Path) -> None:
    commands = ["prune", "scan", "restore", "restore", "compare", "export", "report", "figures"]
    assert run_commands("docs/guide.md") == commands
    assert_restored(Restoration.load("runs/mine").record.losses)
    compared = read_json(Path("runs/compared/comparison.json"))["summary"]
    assert [(row["entry"], row["errors"]) for row in compared] == [
        ("lcc", []), ("lcc@dense", []), ("lora", []), ("refit+low-rank", [])
    ]  # fmt: skip
    pair = lcc.load_pair("smollm2", "out/wanda50")
    scan = lcc.scan(pair, lcc.load_data("boolq", n=16, role="probe"))
    space: dict[str, Any] = {"lcc": lcc, "pair": pair, "scan": scan}
    lens, session = blocks("docs/guide.md", "python")
    exec(lens, space)
    exec(session.replace('"out/restored"', '"out/session"'), space)
    assert_restored(space["session"].loss())
    assert Path("out/session/config.json").exists()


@pytest.mark.slow
def test_the_commands_of_the_overview_run_in_their_order(place: Path) -> None:
    elsewhere = {"recipe", "demo"}  # of paper_tables.md and training_cost.md
    ran = run_commands("docs/cli.md", lambda command: command[0] not in elsewhere)
    measured = {"eval", "report", "doctor", "figures", "explore", "merits", "prompts", "rewrite fit", "rewrite"}
    assert measured | {"prune", "scan", "restore", "refit", "reconstruct", "compare", "export"} == set(ran)
