"""Preferences: the planted best version is found, copies are dropped, MePO's files are read."""

from __future__ import annotations

from dataclasses import replace
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import ALPACA_PROMPT, Example
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.rewriting import writing
from lcc_lens.prompting.rewriting.preferences import Preferences, preference_pairs
from lcc_lens.prompting.rewriting.ranking import rank_prompts
from lcc_lens.prompting.rewriting.writing import answers, candidate_prompts

VERSIONS = ["Name a river now", "Say which river", "Rivers, please list them", "What is a river"]


def planted(pair: Pair, number: int) -> Example:
    """An example whose response has the letters that one of the versions makes likelier than all others do."""
    prompts = [ALPACA_PROMPT.format(instruction=version) for version in (*VERSIONS, "List a river")]
    letters = torch.tensor(pair.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"])
    response = ""
    with torch.inference_mode():
        for _ in range(24):
            rows = [torch.tensor([pair.tokenizer(prompt + response)["input_ids"]]) for prompt in prompts]
            logits = torch.stack([pair.pruned.run_with_hooks(row, fwd_hooks=[])[0, -1] for row in rows])
            likelihood = logits.log_softmax(-1)[:, letters]
            others = torch.cat([likelihood[:number], likelihood[number + 1 :]]).amax(0)
            response += "abcdefghijklmnopqrstuvwxyz"[int((likelihood[number] - others).argmax())]
    return Example(ALPACA_PROMPT.format(instruction="List a river"), response, f"g{number}")


def made(*examples: Example) -> Data:
    return Data("made", "instruction", examples, "here", "train")


@pytest.mark.parametrize("number", range(len(VERSIONS)))
def test_the_ranking_finds_a_planted_best_version(pair: Pair, number: int) -> None:
    example = planted(pair, number)
    versions = [ALPACA_PROMPT.format(instruction=version) for version in VERSIONS]
    ranked = rank_prompts(pair.pruned, pair.tokenizer, example.prompt, versions, example.response)
    assert ranked[0].prompt == versions[number]
    assert ranked[0].is_better
    assert len(ranked) == len(versions) + 1
    raw = next(found for found in ranked if found.prompt == example.prompt)
    assert raw.margin == raw.stderr == 0
    assert ranked[0].margin == pytest.approx(ranked[0].log_likelihood - raw.log_likelihood, abs=1e-6)


def test_pairs_hold_the_planted_version(pair: Pair) -> None:
    data = made(planted(pair, 0), planted(pair, 1))
    found = preference_pairs(pair, data, [VERSIONS, VERSIONS])
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [
        ("List a river", VERSIONS[0], "List a river"), ("List a river", VERSIONS[1], "List a river"),
    ]  # fmt: skip
    assert all(preference.margin is not None and preference.margin > 0 for preference in found.pairs)
    assert "2 of 2 examples" in repr(found)
    assert list(found.table()["chosen"]) == VERSIONS[:2]


def test_the_raw_prompt_may_be_the_best(pair: Pair) -> None:
    example = planted(pair, 2)
    example = replace(example, prompt=ALPACA_PROMPT.format(instruction=VERSIONS[2]))
    found = preference_pairs(pair, made(example), [["Utterly other words"]])
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(VERSIONS[2], "Utterly other words")]


def test_copies_of_the_response_are_dropped_and_counted(pair: Pair) -> None:
    example = planted(pair, 0)
    response = "The Elbe flows through Hamburg"
    copies = ["Say: The Elbe flows through Hamburg", VERSIONS[0]]
    with pytest.raises(RequestError, match="1 copies"):
        preference_pairs(pair, made(replace(example, response=response)), [copies[:1]])
    found = preference_pairs(pair, made(example, replace(example, response=response)), [VERSIONS, copies])
    assert found.n_copies == 1
    assert all("Elbe" not in preference.chosen for preference in found.pairs)


def test_a_version_that_ends_its_template_stays_whole(pair: Pair) -> None:
    example, version = planted(pair, 2), "Utterly other words\n\n### Response:\nof it"
    example = replace(example, prompt=ALPACA_PROMPT.format(instruction=VERSIONS[2]))
    found = preference_pairs(pair, made(example), [[version]])
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(VERSIONS[2], version)]


def test_the_target_decides(pair: Pair) -> None:
    data = made(planted(pair, 0))
    assert len(preference_pairs(pair, data, [VERSIONS], target="pruned")) == 1
    with pytest.raises(RequestError, match="1 unsure"):
        preference_pairs(pair, data, [VERSIONS], target="dense")


def test_preferences_are_saved_as_mepo_s_and_shuffled_as_a_control(pair: Pair, tmp_path: Path) -> None:
    found = preference_pairs(pair, made(planted(pair, 0), planted(pair, 1)), [VERSIONS, VERSIONS])
    found.save(tmp_path / "preferences.json")
    assert Preferences.load(tmp_path / "preferences.json").pairs == found.pairs
    shuffled = found.shuffled()
    assert sum(a.chosen == b.rejected for a, b in zip(found.pairs, shuffled.pairs, strict=True)) == 1
    assert shuffled == found.shuffled()


def test_candidates_are_written_by_rule_and_by_the_dense_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")
    data = made(planted(pair, 0))
    (versions,) = candidate_prompts(pair, data, 4, max_new_tokens=8)
    assert versions[0].endswith("List a river")
    assert versions[0] != versions[1]
    assert len(versions) > 2
    assert candidate_prompts(pair, data, 4, max_new_tokens=8) == [versions]
    assert len(candidate_prompts(pair, data, 1)[0]) == 1


def test_one_pass_gives_the_greedy_answer_and_sampled_ones(pair: Pair) -> None:
    tokens = pair.tokenizer("List a river")["input_ids"]
    (greedy,) = answers(pair.pruned, pair.tokenizer, tokens, max_new_tokens=12)
    first, *others = answers(pair.pruned, pair.tokenizer, tokens, n_sampled=3, max_new_tokens=12, seed=1)
    assert first == greedy
    assert len({first, *others}) > 1
    assert len(others) == 3


def test_an_answer_is_greedy_whatever_lies_beside_the_weights(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = pair.tokenizer("is salt a metal?")["input_ids"]
    expected = answers(pair.dense, pair.tokenizer, tokens, max_new_tokens=12)
    penalised = GenerationConfig(repetition_penalty=8.0, no_repeat_ngram_size=1)
    monkeypatch.setattr(pair.dense.original_model, "generation_config", penalised)
    assert answers(pair.dense, pair.tokenizer, tokens, max_new_tokens=12) == expected


def test_a_request_is_read_once_for_all_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, read = pair.tokenizer("List a river, please")["input_ids"], []
    run = pair.dense.original_model.forward

    def note(*args: object, **options: object) -> object:
        read.append(tuple((args[0] if args else options["input_ids"]).shape))
        return run(*args, **options)

    settings = {"n_sampled": 3, "max_new_tokens": 6, "seed": 1}
    with monkeypatch.context() as patch:
        patch.setattr(writing, "can_reuse_cache", lambda model: False)
        each = answers(pair.dense, pair.tokenizer, tokens, **settings)
    answers(pair.dense, pair.tokenizer, tokens, max_new_tokens=1)  # what is tried once is tried
    monkeypatch.setattr(pair.dense.original_model, "forward", note)
    assert answers(pair.dense, pair.tokenizer, tokens, **settings) == each
    assert read[0] == (1, 20)  # the first 19 tokens, padded
    assert set(read[1:]) == {(4, 1)}


def test_refusals(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")
    example = planted(pair, 0)
    data = made(example)
    wrong = [
        (data, [], "expected candidates for 1 examples, got 0 lists"),
        (data, [[]], "expected candidates for example 0 of made, got an empty list"),
        (data, [["Go", " "]], "got an empty rewrite"),
        (replace(data, role="held-out"), [VERSIONS], "expected training examples for preferences, got held-out ones"),
        (made(replace(example, response=" ")), [VERSIONS], "expected a prompt and a response in example 0"),
        (data, [["List a river"]], "expected candidates that surely change a response's likelihood, got none in 1"),
        (made(replace(example, prompt="a" * 600)), [VERSIONS], "1 too long"),
    ]
    for given, candidates, message in wrong:
        with pytest.raises(RequestError, match=message):
            preference_pairs(pair, given, candidates)
    with pytest.raises(RequestError, match="expected the target dense or pruned, got 'restored'"):
        unwrap(preference_pairs)(pair, data, [VERSIONS], target="restored")
    for given in ({"n": 0}, {"max_new_tokens": 0}):
        with pytest.raises(RequestError, match="of at least 1, got 0"):
            candidate_prompts(pair, data, **given)
    long = made(example, replace(example, prompt="a" * 600))
    with pytest.raises(RequestError, match="tokens in example 1 of made, got"):
        candidate_prompts(pair, long, 4)
    with pytest.raises(RequestError, match="expected prompts with at least one word"):
        rank_prompts(pair.pruned, pair.tokenizer, example.prompt, [""], "yes")
    assert torch.is_grad_enabled()
