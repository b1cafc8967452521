"""Unfinished restorations: none is taken for the one it replaces, and a changed byte, file or setting is noticed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import call, refused
from support.faults import flip_byte

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import DiskFullError, RequestError
from lcc_lens.core.files import read_sealed
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.data.datasets import load_data
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.jobs import restore_models
from lcc_lens.restoration.refitted import refitted_model
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.settings import RefitRequest, RestoreSettings
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.state import CHECKPOINT


class Stopped(Exception):
    pass


def stop(step: Step) -> None:
    if step.step == 2:
        raise Stopped


def begin(pair: Pair, found: Scan, file: Path, run: Path, *, seed: int = 0, **options: Any) -> Restoration:
    config = TrainConfig(batch_size=8, checkpoint_every=1, seed=seed)
    heads = found.select("mse", share=0.5)
    return restore(pair, found, heads, load_data(str(file)), config=config, run=run, **options)


@pytest.fixture
def own_file(question_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text(question_file.read_text())
    return file


def test_an_unfinished_overwrite_is_not_exported_as_the_old_one(
    pair: Pair, found: Scan, own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    begin(pair, found, own_file, run)
    with pytest.raises(Stopped):
        begin(pair, found, own_file, run, seed=1, on_step=stop)
    refused(capsys, 2, "make it with lcc-lens restore", "export", run, out)
    assert not out.exists()
    resumed = begin(pair, found, own_file, run, seed=1, resume=True)
    assert resumed.record.seed == 1
    assert call("export", run, out, "--quiet") == 0


def test_a_finished_checkpoint_holds_the_best_alone_and_resumes_to_it(
    pair: Pair, found: Scan, own_file: Path, tmp_path: Path
) -> None:
    def kinds(run: Path) -> set[str]:
        return {name.partition(".")[0] for name in read_sealed(run / CHECKPOINT)[0]}

    with pytest.raises(Stopped):
        begin(pair, found, own_file, tmp_path / "stopped", on_step=stop)
    assert kinds(tmp_path / "stopped") == {"best", "now", "adam"}
    run = tmp_path / "run"
    whole = begin(pair, found, own_file, run)
    tensors = load_file(run / RESTORATION_TENSORS)
    assert kinds(run) == {"best"}
    steps: list[Step] = []
    again = begin(pair, found, own_file, run, resume=True, on_step=steps.append)
    assert steps == []
    assert again.record.losses == whole.record.losses
    resumed = load_file(run / RESTORATION_TENSORS)
    assert resumed.keys() == tensors.keys()
    assert all(resumed[name].equal(tensor) for name, tensor in tensors.items())


def test_a_refused_request_leaves_the_old_restoration(pair: Pair, found: Scan, own_file: Path, tmp_path: Path) -> None:
    begin(pair, found, own_file, tmp_path / "run")
    with pytest.raises(RequestError):
        begin(pair, found, own_file, tmp_path / "run", method="unknown")
    assert Restoration.load(tmp_path / "run").record.seed == 0


@pytest.mark.parametrize("changed", ["checkpoint", "data"])
def test_a_change_is_refused_where_resuming_was_asked_for(
    changed: str, pair: Pair, found: Scan, own_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        begin(pair, found, own_file, run, on_step=stop)
    if changed == "checkpoint":
        flip_byte(run / "checkpoint.safetensors")
        message = "got a changed file; delete it, or start without --resume"
    else:
        lines = own_file.read_text().splitlines()
        question = json.loads(lines[0])
        own_file.write_text("\n".join([json.dumps({**question, "right": question["right"] + "!"}), *lines[1:]]))
        message = "got another run's; repeat its settings or start without --resume"
    with pytest.raises(RequestError, match=message):
        begin(pair, found, own_file, run, resume=True)
    begin(pair, found, own_file, run)
    assert Restoration.load(run).record.seed == 0


def test_a_run_is_resumed_wherever_it_and_its_models_and_data_lie(
    pair: Pair, found: Scan, own_file: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin(pair, found, own_file, tmp_path / "whole", before_refit=pruned_dir)
    with pytest.raises(Stopped):
        begin(pair, found, own_file, tmp_path / "run", before_refit=pruned_dir, on_step=stop)
    new = tmp_path / "new"
    new.mkdir()
    for path in (own_file, tmp_path / "run"):
        path.rename(new / path.name)
    monkeypatch.chdir(new)
    elsewhere = replace(found, record=replace(found.record, dense="a", pruned="b", data="c", source="d"))
    monkeypatch.setattr("lcc_lens.restoration.restore.sequence_loss", lambda *_: pytest.fail("measured again"))
    steps: list[Step] = []
    before_refit = os.path.relpath(pruned_dir, new)
    resumed = begin(
        pair, elsewhere, Path(own_file.name), Path("run"), before_refit=before_refit, resume=True, on_step=steps.append
    )
    assert steps[0].step == 2
    assert torch.equal(resumed.constants, whole.constants)


def test_a_full_disk_at_the_end_loses_nothing(
    pair: Pair, found: Scan, own_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Restoration, run: Path) -> None:
        raise DiskFullError(run / RESTORATION_TENSORS)

    with monkeypatch.context() as patch:
        patch.setattr(Restoration, "save", full)
        with pytest.raises(DiskFullError, match=r"restoration.safetensors; free some and go on with --resume$"):
            begin(pair, found, own_file, tmp_path)
    steps: list[Step] = []
    begin(pair, found, own_file, tmp_path, resume=True, on_step=steps.append)
    assert steps == []


def test_a_run_that_was_stopped_before_its_training_is_resumed(
    dense_dir: Path, pruned_dir: Path, own_file: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run, data, request = tmp_path / "run", load_data(str(own_file)), RefitRequest([str(text_file)], 4, 16)

    def restored(*, resume: bool) -> Restoration:
        return restore_models(
            dense_dir, pruned_dir, run, data, method="polish", validation=load_data(str(text_file)), resume=resume,
            refitting=request, settings=RestoreSettings(max_length=32),
        )[0]  # fmt: skip

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lcc_lens.restoration.jobs.load_pair", interrupt)
        with pytest.raises(KeyboardInterrupt):
            restored(resume=False)
    refitted = (run / "refit" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        restored(resume=True)
    assert f"no checkpoint in {run} to resume: the training begins at its first step" in caplog.text
    assert (run / "refit" / "model.safetensors").stat().st_mtime_ns == refitted
    (run / CHECKPOINT).unlink()
    with pytest.raises(RequestError, match="got a finished restoration alone; start without --resume"):
        restored(resume=True)


def test_a_refit_of_the_default_length_is_used_again(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module in ("restoration.refitted", "pruning.jobs"):
        monkeypatch.setattr(f"lcc_lens.{module}.calibration_length", lambda model, seq_len: seq_len or 24)
    request, folder = RefitRequest([str(text_file)], 4), tmp_path / "refit"
    refitted_model(dense_dir, pruned_dir, folder, request)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    refitted_model(dense_dir, pruned_dir, folder, request, resume=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not caplog.messages


def test_a_refit_of_another_request_is_not_used_again(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, models = tmp_path / "refit", (dense_dir, pruned_dir)

    def made(n_samples: int, *, resume: bool = False) -> str:
        refitted_model(*models, folder, RefitRequest([str(text_file)], n_samples, 16), resume=resume)
        return fingerprint((folder / "model.safetensors").read_bytes())

    first = made(6)
    assert made(6, resume=True) == first
    assert not caplog.messages
    with pytest.raises(RequestError, match=r"expected a refit on 12 sequences of 16 tokens .* got one on 6 of 16"):
        made(12, resume=True)
    assert made(12) != first
    assert "refitting again: expected a refit on 12 sequences" in caplog.text
    assert made(6) == first
    flip_byte(folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"expected the weights that the refit wrote in .* got others"):
        made(6, resume=True)
    assert made(6) == first
