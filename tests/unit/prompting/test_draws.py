"""Draws of a study: a run keeps those of the same request, and measures the others again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import refused
from support.restorations import restoration_of

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.pair import Pair
from lcc_lens.prompting import draws
from lcc_lens.prompting.draws import StudyRequest, study_draws
from lcc_lens.prompting.measuring import prompt_study
from lcc_lens.prompting.study import PromptStudy
from lcc_lens.prompting.variants import prompt_variants
from lcc_lens.restoration.refitted import pair_hashes


def write(path: Path, answer: str) -> None:
    rows = ({"prompt": f"Say {i} and {i * i}, please.", "response": f" {answer} {i}, {i * i}."} for i in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def request_(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> StudyRequest:
    write(tmp_path / "data.jsonl", "It is")
    restoration_of(pruned_dir).save(tmp_path / "restored")
    return StudyRequest(
        str(dense_dir), str(pruned_dir), str(tmp_path / "data.jsonl"), ("clear", "soft"), str(tmp_path / "restored"),
        examples=3, soft_examples=6, heads=True, head_examples=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"examples": 6}, "examples"),
        ({"variants": ("clear", "filler", "soft")}, "variants"),
        ({"restored": None}, "restored models"),
        ({"response_tokens": 5}, "lengths"),
        ({"max_length": 120}, "lengths"),
        ({"soft_examples": 7}, "examples of the soft prompt"),
        ({"head_examples": 2}, "examples of heads"),
    ],
)
def test_a_draw_of_another_request_is_no_answer(
    request_: StudyRequest, changes: dict[str, Any], other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, hashes = tmp_path / "run", pair_hashes(request_.dense, request_.pruned)
    study_draws(request_, run, seeds=1)
    assert draws.kept_study(request_, run, 0, hashes) is not None
    assert draws.kept_study(replace(request_, heads=False), run, 0, hashes) is not None
    assert draws.kept_study(replace(request_, **changes), run, 0, hashes) is None
    assert caplog.messages[-1] == f"measuring draw 0 again: the one in {run} has other {other}"


def test_what_changed_on_disk_is_measured_again(
    request_: StudyRequest, pruned_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request_ = replace(request_, variants=("clear",), heads=False)
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    first = study_draws(request_, run, seeds=1)
    write(data, "Perhaps")
    second = study_draws(request_, run, seeds=1)
    assert not second.log_likelihood.equal(first.log_likelihood)
    restoration_of(pruned_dir, size=0.4).save(tmp_path / "restored")
    third = study_draws(request_, run, seeds=1)
    assert third.log_likelihood[:2].equal(second.log_likelihood[:2])
    assert not third.log_likelihood[2].equal(second.log_likelihood[2])
    assert third.table().equals(study_draws(request_, tmp_path / "new", seeds=1).table())
    told = [message.partition(" has other ")[2] for message in caplog.messages]
    assert [other for other in told if other] == ["examples", "restored models"]


def test_what_no_draw_can_measure_is_refused_before_models_are_loaded(
    request_: StudyRequest, dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(draws, "load_pair", None)
    restoration_of(dense_dir).save(tmp_path / "of_dense")
    command = ["prompts", dense_dir, pruned_dir, tmp_path / "run", "--data", request_.data, "--variants", "raw", "soft"]
    refused(capsys, 2, f"got one of {dense_dir} (", *command, "--restored", tmp_path / "of_dense")
    refused(capsys, 2, "expected written variants that heads react to, got raw, soft", *command, "--heads")
    refused(capsys, 2, "expected --cluster with its options, got a=b alone", *command, "--cluster-options", "a=b")
    for text in (str(text_file), "mix", f"{request_.data}+{text_file}"):
        with pytest.raises(RequestError, match="expected prompts with responses, got the running text"):
            study_draws(replace(request_, data=text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_restored_model_with_another_tokenizer_is_refused(
    pair: Pair, request_: StudyRequest, dense_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense_dir, other)
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(RequestError, match="expected a restored model with the pair's tokenizer"):
        study_draws(replace(request_, restored=str(other)), tmp_path / "run")
    variants = prompt_variants(load_data(request_.data, 3), ["raw", "clear"])
    with pytest.raises(RequestError, match="expected a restoration of"):
        prompt_study(pair, variants, restoration_of(dense_dir))


def test_learned_positions_are_refused_before_a_soft_prompt_is_trained(
    request_: StudyRequest, families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "load_pair", lambda *models, one_at_a_time: families("gpt2"))
    monkeypatch.setattr(draws, "fit_soft_prompt", None)
    with pytest.raises(RequestError, match="got learned absolute ones"):
        study_draws(request_, tmp_path / "run")


def test_further_draws_leave_the_first_ones_alone(
    request_: StudyRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request_ = replace(request_, variants=("clear",), restored=None, heads=False)
    study_draws(request_, tmp_path / "run", seeds=1)
    measured, seeds = draws._measured, []

    def counted(request: StudyRequest, pair: Any, seed: int, hashes: Any) -> PromptStudy:
        seeds.append(seed)
        return measured(request, pair, seed, hashes)

    monkeypatch.setattr(draws, "_measured", counted)
    study = study_draws(request_, tmp_path / "run", seeds=3)
    assert seeds == [1, 2]
    assert "again" not in caplog.text
    assert study.table().equals(study_draws(request_, tmp_path / "new", seeds=3).table())
