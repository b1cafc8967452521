"""The fixtures that all tests share: a tiny dense model, the same one pruned, and small data."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LCC_LENS_DEVICE", "cpu")  # where tests put their own tensors; test_cuda.py compares a GPU
os.environ["LCC_LENS_DTYPE"] = "float32"  # laws are stated in float32 whatever the processor is fast at

import pytest
from support.typed import check_types

check_types()

# What takes seconds to import is imported where it is used: the process that starts the others needs none of it.

#: The test module that ran last.
MODULE = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what is imported by now out of later garbage collections, which would go through a million objects."""
    name = item.nodeid.partition("::")[0]
    if item.session.stash.get(MODULE, None) != name:
        item.session.stash[MODULE] = name
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def dense_dir(folder: Path) -> Path:
    from support.tiny import build_model, save_model

    return save_model(build_model(), folder / "dense")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory):
    """A pair by family: the pruned model lacks half of every matrix's weights."""
    from support.pairs import Families

    return Families(tmp_path_factory)


@pytest.fixture(scope="session")
def pruned_dir(folder: Path, dense_dir: Path, text_file: Path) -> Path:
    from lcc_lens.pruning.jobs import prune

    prune(dense_dir, folder / "pruned", calibration=str(text_file), n_samples=4, seq_len=48)
    return folder / "pruned"


@pytest.fixture(scope="session")
def text_file(folder: Path) -> Path:
    from support.tiny import PARAGRAPHS

    path = folder / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


@pytest.fixture(scope="session")
def question_file(folder: Path) -> Path:
    from support.tiny import QUESTIONS

    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


@pytest.fixture(scope="session")
def pair(dense_dir: Path, pruned_dir: Path):
    from lcc_lens.models.pair import load_pair

    return load_pair(dense_dir, pruned_dir)


@pytest.fixture(scope="session")
def found(pair, question_file: Path):
    from lcc_lens.analysis.scan.scan import scan
    from lcc_lens.data.datasets import load_data

    return scan(pair, load_data(str(question_file)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LCC_LENS_DATA", raising=False)
    monkeypatch.setattr("lcc_lens.data.panel.PANEL", ("python",))  # the only domain that every test has
    logging.getLogger("lcc_lens").setLevel(logging.INFO)  # a command run with --quiet leaves it higher
