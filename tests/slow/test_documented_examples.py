"""The examples of README and guide on the embedded model: they restore, on fewer examples than the pages name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.documented import assert_restored, blocks, run_commands
from support.places import ROOT

import lcc_lens as lcc

pytestmark = pytest.mark.slow

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs a folder of data sets for LCC_LENS_DATA")
    monkeypatch.setenv("LCC_LENS_DATA", str(SHARED_DATA))
    monkeypatch.setenv("LCC_LENS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LCC_LENS_DTYPE", raising=False)
    monkeypatch.chdir(tmp_path)


def fewer(code: str) -> str:
    """The code with a quarter of the examples."""
    return re.sub(r"\bn=(\d+)", lambda size: f"n={int(size[1]) // 4}", code)


def test_the_python_examples_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    reports, export = [], lcc.export
    monkeypatch.setattr(lcc, "export", lambda *arguments: reports.append(export(*arguments)))
    (example,) = blocks("README.md", "python")
    space: dict[str, Any] = {}
    exec(fewer(example), space)
    assert_restored(space["restoration"].record.losses)
    assert reports[0].logit_effect > 0.1
    assert len(space["heads"]) == 68
    lens, session = blocks("docs/guide.md", "python")
    exec(fewer(lens), space)
    assert space["component"].norm() > 0
    exec(fewer(session).replace('"out/restored"', '"out/session"'), space)
    assert_restored(space["session"].loss())
    assert Path("out/session/config.json").exists()


def test_the_commands_restore() -> None:
    assert run_commands("README.md") == ["prune", "scan", "restore", "export", "eval", "explore"]
    assert_restored(lcc.Restoration.load("runs/mine").record.losses)
    assert Path("runs/mine/explorer.html").exists()
