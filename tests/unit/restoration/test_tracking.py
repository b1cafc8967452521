"""Training logs outside the run directory: an object gets every number, and nothing is imported for nobody."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support.commands import refused

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))


def _restored(pair, found: Scan, questions: Path, run: Path, log) -> Restoration:
    data, config = load_data(str(questions)), TrainConfig(lr=0.1, batch_size=8, validate_every=2)
    return restore(pair, found, found.select("mse", share=1.0), data, config=config, run=run, log=log)


def test_an_object_gets_every_step_and_the_losses(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    kept = Kept()
    restoration = _restored(pair, found, question_file, tmp_path, kept)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    *steps, (last, final) = kept.rows
    assert [step for step, _ in steps] == [row["step"] for row in logged] == list(range(1, last + 1))
    assert [metrics["loss"] for _, metrics in steps] == [row["loss"] for row in logged]
    measured = {step: metrics["validation_loss"] for step, metrics in steps if "validation_loss" in metrics}
    assert measured == {row["step"]: row["validation_loss"] for row in logged if row["validation_loss"] is not None}
    assert measured.keys() >= {2, last}
    assert final.keys() >= {"dense_loss", "pruned_loss"}
    assert final["restored_loss"] == restoration.record.losses["restored"]
    assert "trackio" not in sys.modules


def test_what_cannot_take_numbers_is_refused_before_any_work(
    pair, found: Scan, question_file: Path, dense_dir: Path, pruned_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(RequestError, match="expected 'trackio' or an object with log"):
        _restored(pair, found, question_file, tmp_path / "run", "elsewhere")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: (name != "trackio" and find(name, *rest)) or None
    )
    with pytest.raises(RequestError, match="expected the package trackio to log to, got none; pip install trackio"):
        _restored(pair, found, question_file, tmp_path / "run", "trackio")
    command = ("restore", dense_dir, pruned_dir, tmp_path / "run", "--data", question_file, "--log", "trackio")
    refused(capsys, 2, "expected the package trackio to log to, got none", *command)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # trackio's own
def test_trackio_keeps_the_run(
    pair, found: Scan, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    _restored(pair, found, question_file, tmp_path / "mine", "trackio")
    (kept,) = trackio.Api().runs("lcc_lens")
    assert (kept.name, kept.config["method"]) == ("mine", "lcc")
    rows = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("lcc_lens", "mine")
    logged = (tmp_path / "mine" / "log.jsonl").read_text().splitlines()
    assert [row["loss"] for row in rows if "loss" in row] == [json.loads(line)["loss"] for line in logged]
    assert "restored_loss" in rows[-1]
