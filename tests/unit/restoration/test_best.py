"""The best combination: a refit in the run directory, a low rank upon it, one export."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.cli.main import run as main
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.restoration import best, refitted
from lcc_lens.restoration.budget import BudgetPlan
from lcc_lens.restoration.injections.methods import METHODS
from lcc_lens.restoration.result import Restoration


@pytest.fixture
def files(text_file: Path, tmp_path: Path) -> dict[str, Path]:
    lines = [
        json.dumps({"prompt": f"Say number {i} twice:", "response": f" number {i}, number {i}"}) for i in range(64)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:48]))
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[48:]))
    return {"train": tmp_path / "train.jsonl", "held_out": tmp_path / "held_out.jsonl", "text": text_file}


@pytest.mark.slow
def test_the_result_is_one_plain_checkpoint(
    dense_dir: Path, pruned_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    data, validation = load_data(str(files["train"])), load_data(str(files["held_out"]))
    settings = {"validation": validation, "calibration": [str(files["text"])], "n_samples": 4, "seq_len": 16}
    run = tmp_path / "run"
    restoration = best.restore_best(dense_dir, pruned_dir, run, data, low_rank=4, **settings)
    losses = restoration.record.losses
    assert losses["refitted"] != losses["pruned"]
    assert losses["restored"] < losses["refitted"]
    held_out = encode(validation, load_tokenizer(dense_dir))
    assert losses["pruned"] == pytest.approx(sequence_loss(load_plain(pruned_dir), held_out)["loss"], rel=1e-4)
    export(restoration, run / "refit", tmp_path / "out")
    assert compare_zeros(pruned_dir, tmp_path / "out").is_equal
    exported = load_plain(tmp_path / "out", dtype=torch.float32)
    assert sequence_loss(exported, held_out)["loss"] == pytest.approx(losses["restored"], rel=1e-4)
    written = (run / "refit" / "model.safetensors").stat().st_mtime_ns
    best.restore_best(dense_dir, pruned_dir, run, data, low_rank=2, **settings)
    assert (run / "refit" / "model.safetensors").stat().st_mtime_ns == written  # used again
    with pytest.raises(RequestError, match=r"expected a refit of this pair in .*refit, got another's"):
        best.restore_best(dense_dir, dense_dir, run, data, **settings)


@pytest.mark.slow
def test_by_one_command(
    dense_dir: Path, pruned_dir: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = refitted.refit

    def on_own_text(*args, calibration, n_samples, seq_len, overwrite):
        assert (calibration, n_samples, seq_len) == ("mix", 9, None)
        return real(*args, calibration=[str(files["text"])], n_samples=4, seq_len=16, overwrite=overwrite)

    monkeypatch.setattr(refitted, "refit", on_own_text)
    command = ["restore", str(dense_dir), str(pruned_dir), str(tmp_path / "run"), "--data", str(files["train"])]
    assert main([*command, "--method", "best", "--refit-samples", "9", "--quiet"]) == 0
    asked = read_json(tmp_path / "run" / "config.json")["restore"]
    assert (asked["method"], asked["batch_size"]) == ("all-weights", 2)
    assert asked["lr"] == METHODS["best"].lr
    assert (asked["objective"]["text"], asked["objective"]["distillation"]) == (0.25, 0.75)
    losses = read_json(tmp_path / "run" / "metrics.json")["validation"]["losses"]
    assert list(losses) == ["dense", "pruned", "refitted", "restored"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--quiet"]) == 0
    assert compare_zeros(pruned_dir, tmp_path / "out").is_equal


def test_a_plan_or_sizes_of_ones_own_decide_how_much_is_read(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, trained = [], create_autospec(Restoration, instance=True)
    monkeypatch.setattr(best, "restore_models", lambda *_, **given: asked.append(given) or [trained])
    data, plan = load_data(str(text_file), role="train"), BudgetPlan(900.0, 96, 200, {})
    for options in ({"budget": plan}, {"n_samples": 24, "limit": 50}, {}):
        best.restore_best(dense_dir, pruned_dir, tmp_path, data, **options)
    assert [given["refitting"].n_samples for given in asked] == [96, 24, 288]
    assert [given["settings"].limit for given in asked[1:]] == [50, 480]
    assert [given["budget"] for given in asked] == [plan, None, None]
    assert [given["refitting"].calibration for given in asked] == [None] * 3
    asked.clear()
    short = BudgetPlan(300.0, 96, 60, {}, writes=False)
    for calibration in (None, "python"):
        best.restore_best(dense_dir, pruned_dir, tmp_path, data, budget=short, calibration=calibration)
    assert [given["refitting"].calibration for given in asked] == [short.refitting.calibration, "python"]
    assert "self" not in asked[0]["refitting"].calibration
