"""Evaluation, against plain transformers and by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.commands import call
from support.small_sets import ARC, write_sets

from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import bootstrap_interval, perplexity, share_recovered, stratified_interval
from lcc_lens.data import datasets as data
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.data.negatives import with_other_answers
from lcc_lens.evaluation.evaluate import check_tasks, evaluate, evaluate_model, unique_names
from lcc_lens.evaluation.lm_eval_tasks import evaluate_task
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain

BOOLQ = [
    {"passage": f"Story {i} is about a cat.", "question": f"is story {i} about a dog", "answer": bool(i % 2)}
    for i in range(6)
]


def score(model, tokenizer, context: str, continuation: str) -> float:
    whole = tokenizer(context + continuation, return_tensors="pt").input_ids
    border = len(tokenizer(context).input_ids)
    with torch.no_grad():
        logs = model(whole).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, whole[0, i]]) for i in range(border, whole.shape[1]))


def test_loss_is_transformers_own(dense_dir: Path, text_file: Path) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    blocks = encode(load_data(str(text_file)), tokenizer, max_length=40, limit=7)
    measured = sequence_loss(model, blocks, batch_tokens=100)
    tokens = torch.stack([block.tokens for block in blocks])
    expected = float(model(tokens, labels=tokens).loss)
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured["tokens"] == 7 * 39


def test_boolq_accuracy_by_hand(dense_dir: Path) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    found = evaluate_task(model, tokenizer, "boolq", records=BOOLQ, with_items=True)
    right, items = 0, ""
    for record in BOOLQ:
        context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
        says_yes = score(model, tokenizer, context, " yes") > score(model, tokenizer, context, " no")
        right += says_yes == record["answer"]
        items += str(int(says_yes == record["answer"]))
    assert found["items"] == items
    assert found["n"] == 6
    assert found["acc"] == pytest.approx(right / 6)
    assert found["stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 5))


def test_arc_accuracy_by_hand_and_limit(dense_dir: Path) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    found = evaluate_task(model, tokenizer, "arc_easy", records=ARC, limit=4)
    right = 0
    for record in ARC[:4]:
        scores = [
            score(model, tokenizer, f"Question: {record['question']}\nAnswer:", f" {t}") for t in ("one", "two", "nil")
        ]
        right += "ABC"[scores.index(max(scores))] == record["answerKey"]
    assert found["n"] == 4
    assert found["acc"] == pytest.approx(right / 4)
    assert "acc_norm" in found


def test_no_more_responses_are_loaded_than_are_scored(
    dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}) for i in range(60)]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    compared: list[int] = []

    def counted(examples):
        compared.append(len(examples))
        return with_other_answers(examples)

    monkeypatch.setattr(data, "with_other_answers", counted)
    found = evaluate_model(dense_dir, ["alpaca"], limit=4)["tasks"]["alpaca"]
    assert (compared, found["sequences"]) == ([4], 4)
    expected = encode(load_data("alpaca", 4, role="held-out"), load_tokenizer(dense_dir))
    assert found["response_loss"] == sequence_loss(load_plain(dense_dir), expected)["loss"]


def test_bootstrap_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * float(values.std(unbiased=False)) / 20  # the normal approximation's
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)
    sizes = (1 + torch.rand(400, generator=generator, dtype=torch.float64)).tolist()
    assert bootstrap_interval([3 * size for size in sizes], sizes) == pytest.approx((3, 3))  # paired: no spread at all
    narrow = bootstrap_interval(values.tolist(), level=0.5)
    assert low < narrow[0] < narrow[1] < high
    for wrong in (([], None), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="expected as many numerators"):
            bootstrap_interval(*wrong)


def test_stratified_interval_is_that_of_all_draws() -> None:
    """Oracle: every way to draw the items of two small strata anew, each equally likely."""
    gained, lost = [[0.0, 1.0, 0.0], [1.0, -1.0, 0.0, 1.0]], [[1.0, 1.0, 2.0], [1.0, 0.5, 2.0, 1.0]]

    def means(stratum: int) -> list[tuple[float, float]]:
        n = len(gained[stratum])
        ways = itertools.product(range(n), repeat=n)
        return [(sum(gained[stratum][i] for i in way) / n, sum(lost[stratum][i] for i in way) / n) for way in ways]

    pairs = [(a + c, b + d) for (a, b), (c, d) in itertools.product(means(0), means(1))]
    levels = torch.tensor([0.1, 0.9], dtype=torch.float64)
    expected = torch.quantile(torch.tensor([a / b for a, b in pairs], dtype=torch.float64), levels).tolist()
    found = stratified_interval(gained, lost, level=0.8, n_samples=40_000)
    assert found == pytest.approx(expected, abs=0.03)
    expected = torch.quantile(torch.tensor([a / 2 for a, _ in pairs], dtype=torch.float64), levels).tolist()
    assert stratified_interval(gained, level=0.8, n_samples=40_000) == pytest.approx(expected, abs=0.03)


def test_stratified_interval_is_paired_and_none_where_nothing_may_be_lost() -> None:
    lost = [[1.0, 0.0, 1.0, 1.0], [0.5] * 9]
    assert stratified_interval([[0.25 * x for x in part] for part in lost], lost) == pytest.approx((0.25, 0.25))
    assert stratified_interval([[1.0, 0.0]], [[1.0, -1.0]]) is None
    for wrong in (([], None), ([[1.0], []], None), ([[1.0, 2.0]], [[1.0]])):
        with pytest.raises(ValueError, match="expected strata with items"):
            stratified_interval(*wrong)
    # a stratum counts alike whatever its size, so its items are resampled within it
    low, high = stratified_interval([[1.0] * 1000, [0.0]])
    assert (low, high) == (0.5, 0.5)


@given(dense=st.floats(0.5, 3), lost=st.floats(0.01, 3), share=st.floats(-1, 1.5))
def test_share_recovered_inverts(dense: float, lost: float, share: float) -> None:
    pruned = dense + lost
    assert share_recovered(dense, pruned, pruned - share * lost) == pytest.approx(share, abs=1e-6)


def test_share_of_nothing_is_none_and_perplexity_may_be_infinite() -> None:
    assert share_recovered(2.0, 2.0, 1.9) is None
    assert share_recovered(2.0, 1.5, 1.9) is None
    assert perplexity(1e6, 10) == math.inf
    assert perplexity(20.0, 10) == pytest.approx(math.exp(2))


def test_names_are_short_unless_taken_twice() -> None:
    assert unique_names(["a/x", "b/y"]) == ["x", "y"]
    assert unique_names(["a/x", "b/x", "smollm2"]) == ["a/x", "b/x", "smollm2"]


def test_task_without_data_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected the data set wikitext, got no source for it"):
        evaluate([tmp_path / "nowhere"], ["boolq", "wikitext"])


def test_joined_text_is_held_out_whatever_the_order_of_its_names(
    dense_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path)))
    tasks = [f"wikitext+{text_file}", f"{text_file}+wikitext"]
    scores = evaluate_model(dense_dir, tasks, length=16)["tasks"]
    assert all("test.jsonl" in found["source"] for found in scores.values())
    first, second = (found["tokens"] for found in scores.values())
    assert first == second


def test_no_task_is_refused() -> None:
    with pytest.raises(RequestError, match="expected at least one task"):
        check_tasks([])
    assert call("eval", "nowhere", "--tasks") == 2
