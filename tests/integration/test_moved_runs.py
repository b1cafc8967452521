"""A run and its models may be moved together, and a run made in Python holds all that commands need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import call, refused

import lcc_lens as lcc
from lcc_lens.analysis.scan.result import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.models.loading.recorded import recorded_model
from lcc_lens.restoration.result import Restoration


@pytest.fixture
def place(dense_dir: Path, pruned_dir: Path, text_file: Path, found: Scan, tmp_path: Path, monkeypatch) -> Path:
    """A folder with two models and a run restored in Python, moved elsewhere since; paths were relative."""
    old = tmp_path / "old"
    for name, model in (("dense", dense_dir), ("pruned", pruned_dir)):
        shutil.copytree(model, old / "out" / name)
    monkeypatch.chdir(old)
    pair = lcc.load_pair("out/dense", "out/pruned")
    data = lcc.load_data(str(text_file))
    lcc.restore(pair, found, found.select("mse"), data, method="mean-shift", max_length=24, run="runs/mine")
    monkeypatch.chdir(tmp_path)
    return old.rename(tmp_path / "new")


def test_a_run_made_in_python_keeps_its_scan(place: Path, found: Scan) -> None:
    assert Scan.load(place / "runs" / "mine").record == found.record


def test_a_run_holds_the_scan_of_its_last_restoration(
    place: Path, text_file: Path, dense_dir: Path, pruned_dir: Path
) -> None:
    data, run, pair = lcc.load_data(str(text_file)), place / "runs" / "mine", lcc.load_pair(dense_dir, pruned_dir)
    other = lcc.scan(pair, lcc.load_data(str(text_file.parent / "questions.jsonl")), max_length=96)
    lcc.restore(pair, other, other.select("mse"), data, method="mean-shift", max_length=24, run=run)
    assert Scan.load(run).record == other.record


def test_commands_find_the_models_of_a_moved_run(
    place: Path, found: Scan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "mine"
    shutil.rmtree(place / "out" / "dense")  # its weights are not needed
    assert call("export", run, tmp_path / "restored", "--quiet") == 0
    (place / "out" / "pruned").rename(place / "out" / "renamed")
    assert call("explore", run, "--quiet") == 0
    assert call("export", run, tmp_path / "again", "--quiet") == 0
    shutil.rmtree(place / "out" / "renamed")
    message = f"expected the model out/pruned (SHA-256 {found.record.pruned_sha256[:12]}…) where {run} recorded it"
    refused(capsys, 2, message, "export", run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_only_the_same_weights_are_taken(place: Path, dense_dir: Path) -> None:
    run = place / "runs" / "mine"
    record = Restoration.load(run).record
    assert recorded_model(record.pruned, record.pruned_sha256, run) == place / "out" / "pruned"
    shutil.rmtree(place / "out" / "pruned")
    shutil.copytree(dense_dir, place / "out" / "pruned")
    with pytest.raises(RequestError, match="got none with these weights; name its folder"):
        recorded_model(record.pruned, record.pruned_sha256, run)
