"""The command prompts: a table, files that are kept and read again, and what is refused before models are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import call, refused
from support.jobs import run_here

from lcc_lens.core.errors import LensError
from lcc_lens.core.machine.cluster import JOBS
from lcc_lens.prompting import draws
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


def test_a_single_example_is_shown_without_intervals(
    dense_dir: Path, pruned_dir: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--data", instructions, "--examples", 1, "--seeds", 1, "--variants", "clear", "--out", tmp_path / "t.json"]
    assert call("prompts", dense_dir, pruned_dir, tmp_path / "run", *one) == 0
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert "[" not in shown
    assert json.loads((tmp_path / "t.json").read_text())[1]["gain_pruned_low"] is None


def test_a_prompt_that_cannot_be_scored_is_named(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, empty = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    file.write_text("Name rivers.\n\n???\n\nName towns.")
    refused(capsys, 2, "got '???'; write some text (prompt 2 of 3)", "merits", file)
    file.write_text("Name rivers.\n\n" + "a" * 600)
    refused(capsys, 2, "got 600; shorten it (prompt 2 of 2)", "merits", file, "--model", dense_dir)
    empty.write_text(json.dumps({"prompt": "", "response": "It is 3."}) + "\n")
    refused(capsys, 2, "expected a prompt with at least one word, got ''", "merits", empty)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], instructions: Path) -> None:
    places = [tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "run"]
    refused(capsys, 2, "did you mean 'filler'", "prompts", *places, "--variants", "raw", "fillr")
    refused(capsys, 2, "did you mean 'alpaca'", "prompts", *places, "--data", "alpacca")
    assert not (tmp_path / "run" / "prompts.safetensors").exists()


@pytest.fixture
def command(dense_dir: Path, pruned_dir: Path, instructions: Path) -> list[object]:
    data = ["--data", instructions, "--examples", 3, "--seeds", 2, "--variants", "clear"]
    return ["prompts", dense_dir, pruned_dir, *data, "--quiet"]


@pytest.mark.filterwarnings("ignore")
def test_every_draw_is_a_job_that_is_computed_once(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(*command, whole) == 0
    submitted = run_here(monkeypatch)
    measured = draws._measured

    def fails_once(request: draws.StudyRequest, pair: object, seed: int, hashes: dict[str, str]) -> PromptStudy:
        if seed == 1 and len(submitted) == 2:
            raise LensError("no machine today")
        return measured(request, pair, seed, hashes)

    monkeypatch.setattr(draws, "_measured", fails_once)
    capsys.readouterr()
    refused(capsys, 1, "expected 2 finished draws, got 1; the others are kept", *command, run, "--cluster", "local")
    assert submitted == ["draw 0", "draw 1"]
    assert call(*command, run, "--cluster", "local") == 0
    assert submitted == ["draw 0", "draw 1", "draw 1"]
    assert call(*command, run, "--cluster", "local") == 0
    assert len(submitted) == 3
    expected, found = PromptStudy.load(whole), PromptStudy.load(run)
    assert expected.record == found.record
    assert expected.log_likelihood.equal(found.log_likelihood)
    monkeypatch.setattr(draws, "_measured", None)  # a late job finds the results
    request = draws.StudyRequest(str(command[1]), str(command[2]), str(command[4]), ("clear",), examples=3)
    draws.compute_draw(request, run, 1)


@pytest.mark.slow  # every job is a process that imports everything
def test_draws_are_processes(command: list[object], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    assert call(*command, tmp_path / "run", "--cluster", "local") == 0
    assert len(list((tmp_path / "run" / JOBS).glob("*_result.pkl"))) == 2
    assert len(PromptStudy.load(tmp_path / "run").record.groups) > 3
