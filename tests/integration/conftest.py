"""Where documented examples run: a folder in which ``smollm2`` is a tiny model and every data set a small copy."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
from support.documented import run_commands, train_tiny
from support.small_sets import write_sets

from lcc_lens.models.loading import references
from lcc_lens.restoration.speed import Speed


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"), n=1200)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sets: Path) -> Path:
    return train_tiny(tmp_path_factory.mktemp("trained") / "smollm2", sets)


@pytest.fixture
def place(trained: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    _enter(monkeypatch, tmp_path, trained, sets)
    return tmp_path


@pytest.fixture(scope="session")
def finished(trained: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's commands leave."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        _enter(patch, folder, trained, sets)
        run_commands("README.md", lambda command: command[0] not in ("eval", "explore"))
    return folder


@pytest.fixture
def after_readme(finished: Path, place: Path) -> Path:
    """A folder to work in that has what the README's commands leave."""
    return Path(copytree(finished, place, dirs_exist_ok=True))


def _enter(patch: pytest.MonkeyPatch, folder: Path, trained: Path, sets: Path) -> None:
    patch.setattr(references, "embedded_model", lambda: trained)
    slow = Speed(read=1e-3, trained=0.05, solved=10.0, loaded=1.0)  # where a budget of minutes takes seconds
    patch.setattr("lcc_lens.restoration.budget.measure_speed", lambda *_: slow)
    patch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")  # MePO's is longer than the context
    patch.setenv("LCC_LENS_DATA", str(sets))
    patch.chdir(folder)
