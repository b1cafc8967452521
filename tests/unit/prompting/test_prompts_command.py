"""The command prompts: a table, files that are kept and read again, and what is refused before models are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import call, refused

from lcc_lens.prompting.study import PromptStudy


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "instructions.jsonl"
    rows = ({"instruction": f"Say {i} and {i * i}, please.", "output": f"It is {i}, {i * i}."} for i in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_study_of_two_models(
    dense_dir: Path, pruned_dir: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    command = ["prompts", dense_dir, pruned_dir, run, "--data", instructions, "--examples", 4, "--seeds", 2]
    variants = ["--variants", "clear", "filler"]
    heads = ["--heads", "--head-examples", 1]
    assert call(*command, *variants, "--restored", pruned_dir, *heads, "--out", tmp_path / "table.json") == 0
    shown = capsys.readouterr().out
    assert "heads that react most to clear:  L" in shown
    assert "sensitivity" in shown
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["variant"] for row in table] == ["raw", "clear", "filler"]
    assert table[1]["gain_restored"] == table[1]["gain_pruned"] != 0
    study = PromptStudy.load(run)
    assert (study.interaction()["interaction"] == 0).all()
    assert 4 < len(study.record.groups) <= 8  # two draws, in which an example may be twice
    assert study.heads("clear").n_examples == 2

    monkeypatch.setattr("lcc_lens.prompting.measuring.token_log_likelihoods", None)  # nothing is measured again
    assert call(*command, *variants, "--restored", pruned_dir, *heads) == 0
    assert call(*command, *variants, "--quiet") == 1  # without the restored model it would be


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], instructions: Path) -> None:
    places = [tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "run"]
    refused(capsys, 2, "did you mean 'filler'", "prompts", *places, "--variants", "raw", "fillr")
    refused(capsys, 2, "did you mean 'alpaca'", "prompts", *places, "--data", "alpacca")
    assert not (tmp_path / "run" / "prompts.safetensors").exists()
