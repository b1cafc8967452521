"""Fitting a rewriter in a run: what is kept is gone on with, nothing is replaced unasked, and requests are exact."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import call, refused
from support.places import ROOT

from lcc_lens.core.errors import InterruptedRun, RequestError
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.rewriting import finished, fitting, jobs, writing
from lcc_lens.prompting.rewriting.finished import computed
from lcc_lens.prompting.rewriting.fitting import fit_rewriter
from lcc_lens.prompting.rewriting.preferences import Preferences
from lcc_lens.prompting.rewriting.rewriter import Rewriter
from lcc_lens.prompting.rewriting.settings import RewriterSettings

SHORT = ("--steps", 3, "--lr", 0.05, "--batch-size", 2)
RECIPE = ROOT / "recipes" / "prompts" / "mepo_qwen2.5_7b.json"


@pytest.fixture(autouse=True)
def short_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "INSTRUCTION", "S_P:")


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = [{"prompt": f"river {i}", "chosen": f"List {i} rivers", "rejected": f"rivers {i}"} for i in range(6)]
    (tmp_path / "preferences.json").write_text(json.dumps(rows))
    return tmp_path / "preferences.json"


@pytest.fixture
def fit(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> Callable[..., list[object]]:
    return lambda *options, run="run": ["rewrite", "fit", dense_dir, pruned_dir, tmp_path / run, *SHORT, *options]


@pytest.fixture
def instructions(tmp_path: Path) -> list[object]:
    """Options that measure preferences on a few instructions."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}, and {i} it stays, whatever else."} for i in range(40)]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", tmp_path / "instructions.jsonl", "--examples", 6]
    return [*data, "--candidates", 4, "--version-tokens", 8]


def stopped(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: object) -> None:
    """A refusal that is all that is said."""
    capsys.readouterr()
    refused(capsys, code, message, *arguments, "--quiet")


def interrupting(function: Callable[..., Any], at: int, calls: list[int]) -> Callable[..., Any]:
    """The function, with Ctrl-C at one of its calls."""

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)

    return called


def same(first: Path, second: Path) -> bool:
    one, other = (Rewriter.load(run / "rewriter") for run in (first, second))
    return one.record == other.record and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_a_training_on_a_file_goes_on(
    fit: Any, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--preferences", preferences)
    assert call(*fit(*options, run="whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_require_gradients", interrupting(fitting._require_gradients, 2, []))
        stopped(capsys, 130, "stopped after step 2 of 3; state saved", *fit(*options))
    kept = tmp_path / "run" / "rewriter" / "preferences.json"
    assert Preferences.load(kept).pairs == Preferences.load(preferences).pairs
    stopped(capsys, 2, "holds an unfinished rewriter already; go on with --resume", *fit(*options))
    assert call(*fit(*options, "--resume")) == 0
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("step", ["proposals", "rank_prompts"])
def test_candidates_and_rankings_go_on(
    fit: Any, instructions: list[object], step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = f"lcc_lens.prompting.rewriting.{'writing' if step == 'proposals' else 'preferences'}"
    function, calls = getattr(__import__(module, fromlist=[step]), step), list[int]()
    assert call(*fit(*instructions, run="whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{step}", interrupting(function, 4, calls))
        stopped(capsys, 130, "stopped after 4 of 6 examples", *fit(*instructions))
        assert not (tmp_path / "run" / "rewriter" / "rewriter.safetensors").exists()
        assert call(*fit(*instructions, "--resume")) == 0
    assert len(calls) == 6
    assert same(tmp_path / "whole", tmp_path / "run")


def test_only_the_same_request_goes_on(
    fit: Any, preferences: Path, instructions: list[object], dense_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    measured = fit(*instructions)
    assert call(*measured) == 0
    others = [
        (("--target", "dense"), "expected --target pruned as in"),
        (("--candidates", 5), "got --candidates 5; repeat its options"),
        (("--examples", 5), "expected --examples 6"),
        (("--seed", 1), "got --seed 1"),
    ]
    for options, message in others:
        stopped(capsys, 2, message, *measured, *options, "--resume")
    stopped(capsys, 2, "got no --data; repeat", *fit("--preferences", preferences, "--resume"))
    again = ["rewrite", "fit", dense_dir, dense_dir, *measured[4:], "--resume"]
    stopped(capsys, 2, "expected the pruned model as in", *again)
    file = tmp_path / "instructions.jsonl"
    file.write_text(file.read_text().replace("Say", "Tell"))
    stopped(capsys, 2, "expected the examples in the data as in", *measured, "--resume")


def test_a_rewriter_is_replaced_only_where_that_is_said(
    fit: Any, preferences: Path, instructions: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*fit(*instructions)) == 0
    first = (tmp_path / "run" / "rewriter" / "rewriter.safetensors").read_bytes()
    stopped(capsys, 2, "holds a rewriter already; go on with --resume", *fit("--preferences", preferences))
    assert (tmp_path / "run" / "rewriter" / "rewriter.safetensors").read_bytes() == first
    assert call(*fit("--preferences", preferences, "--overwrite")) == 0
    assert Rewriter.load(tmp_path / "run" / "rewriter").record.pairs == 6
    assert not (tmp_path / "run" / "rewriter" / "rankings.jsonl").exists()


def test_finished_results_are_read_again_up_to_the_first_changed_one(tmp_path: Path) -> None:
    file, numbers = tmp_path / "results.jsonl", list[int]()

    def square(number: int, item: int) -> int:
        numbers.append(number)
        return item * item

    def squares(request: str = "a") -> list[int]:
        numbers.clear()
        return computed(range(4), square, "square", int, file=file, request=request)

    assert squares() == [0, 1, 4, 9]
    assert (squares(), numbers) == ([0, 1, 4, 9], [])
    whole = file.read_text()
    file.write_text(whole[:-5])
    assert (squares(), numbers, file.read_text()) == ([0, 1, 4, 9], [3], whole)
    file.write_text(whole.replace('"value": 4', '"value": 5'))
    assert (squares(), numbers) == ([0, 1, 4, 9], [2, 3])
    assert (squares("b"), numbers) == ([0, 1, 4, 9], [0, 1, 2, 3])
    with pytest.raises(InterruptedRun, match=r"stopped after 2 of 4 examples \(square\); nothing saved"):
        finished.computed(range(4), interrupting(square, 2, []), "square", int, file=None, request="")


def test_epochs_and_steps(fit: Any, preferences: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [*fit()[:5], "--preferences", preferences]
    stopped(capsys, 2, "expected --epochs or --steps, got both", *command, "--epochs", 1, "--steps", 2)
    assert call(*command, "--epochs", 1) == 0
    assert Rewriter.load(tmp_path / "run" / "rewriter").record.steps == 2  # 5 pairs in batches of 4


def test_options_that_others_replace_are_refused(
    fit: Any, preferences: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = fit()[:5]
    refused(
        capsys, 2, "expected --preferences alone, got --data too", *plain, "--preferences", preferences, "--data", "rte"
    )
    for options in (("--target", "dense"), ("--examples", 240), ("--lr", 0.5)):
        stopped(capsys, 2, f"expected --recipe alone, got {options[0]} too", *plain, "--recipe", RECIPE, *options)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_fitted_is_refused_before_the_work(
    fit: Any, families: Any, instructions: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(jobs, "candidate_prompts", None)
    pair, run = families("gpt2"), tmp_path / "run"
    unfit = ["rewrite", "fit", pair.dense_id.path, pair.pruned_id.path, run, *instructions]
    stopped(capsys, 2, "expected linear layers named q_proj, v_proj, got none", *unfit)
    monkeypatch.setattr(jobs, "load_pair", None)
    (tmp_path / "text.txt").write_text("Some running text.\n")
    rows = (json.dumps({"prompt": f"Say {i}", "response": " "}) + "\n" for i in range(20))
    (tmp_path / "empty.jsonl").write_text("".join(rows))
    for name in ("self", "mix", "wikitext", tmp_path / "text.txt"):
        stopped(capsys, 2, "expected prompts with responses, got the running text", *fit("--data", name))
    stopped(capsys, 2, "expected a prompt and a response in example 0", *fit("--data", tmp_path / "empty.jsonl"))
    assert not run.exists()


def test_a_length_cut_to_the_context_is_said(pair: Pair, preferences: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = Preferences.load(preferences)
    with caplog.at_level("WARNING"):
        fit_rewriter(pair, pairs, settings=RewriterSettings(steps=1))
    assert "sequences of 512 tokens, the model's context (2048 by default)" in caplog.text
    with pytest.raises(RequestError, match="expected a limit within the models' context of 512 tokens, got 600"):
        fit_rewriter(pair, pairs, settings=RewriterSettings(max_length=600))
