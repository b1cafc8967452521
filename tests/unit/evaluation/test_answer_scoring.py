"""Scoring answers, against lm-eval's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.answers.scorer import AnswerScorer
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain

#: Contexts and answers as lm-eval hands them over: of several lengths, shared ones, one longer than the limit.
LIMIT = 24
REQUESTS = [
    (("", ""), context, answer)
    for context, answer in (
        ([5, 9, 11], [7]),
        ([5, 9, 11], [8]),
        ([5, 9, 11], [7, 21, 3]),
        ([4], [6, 2, 2, 9]),
        (list(range(3, 40)), [12, 13]),
        ([30, 31], list(range(3, 22))),
        ([5, 9, 11], [7]),
    )
]


@pytest.mark.parametrize("max_tokens", [8, 1024])
def test_likelihoods_are_those_of_lm_eval(dense_dir: Path, max_tokens: int) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=LIMIT)
    expected = theirs._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    ours = AnswerScorer(model, tokenizer, max_length=LIMIT, max_tokens=max_tokens)
    got = ours._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert len({round(value, 4) for value, _ in got}) == len(REQUESTS) - 1  # one came twice


def test_where_the_answer_begins_counts(dense_dir: Path) -> None:
    """The same tokens in all, read once as a long answer and once as a short one."""
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    requests = [(("", ""), [5, 9, 11], [7, 21, 3]), (("", ""), [5, 9, 11, 7], [21, 3])]
    with torch.inference_mode():
        logs = model(torch.tensor([[5, 9, 11, 7, 21, 3]])).logits[0].log_softmax(-1)
    by_token = [float(logs[at, token]) for at, token in ((2, 7), (3, 21), (4, 3))]
    scorer = AnswerScorer(model, tokenizer, max_length=LIMIT)
    (whole, _), (rest, _) = scorer._loglikelihood_tokens(requests)
    assert (whole, rest) == pytest.approx((sum(by_token), sum(by_token[1:])), rel=1e-5)


def test_greedy_answers_are_told_from_others(dense_dir: Path) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    context = [5, 9, 11, 30]
    with torch.inference_mode():
        answer = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    likeliest = answer[0, len(context) :].tolist()
    scorer = AnswerScorer(model, tokenizer, max_length=LIMIT)
    other = [*likeliest[:2], (likeliest[2] + 1) % model.config.vocab_size]
    requests = [(("", ""), context, answer) for answer in (likeliest, other)]
    assert [greedy for _, greedy in scorer._loglikelihood_tokens(requests)] == [True, False]


def test_logits_are_computed_for_answers_alone(dense_dir: Path) -> None:
    model, tokenizer = load_plain(dense_dir), load_tokenizer(dense_dir)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    scorer = AnswerScorer(model, tokenizer, max_length=LIMIT)
    assert scorer._shares
    seen.clear()
    scorer._loglikelihood_tokens(REQUESTS[:4])
    assert sum(seen) == 3 + 4  # the first three answers' first tokens share a position


def test_coarse_formats_are_summed_in_float32(dense_dir: Path) -> None:
    model, tokenizer = load_plain(dense_dir, dtype=torch.bfloat16), load_tokenizer(dense_dir)
    (_, context, answer) = REQUESTS[5]
    with torch.inference_mode():
        logits = model(torch.tensor([context + answer])).logits[0].float().log_softmax(-1)
    expected = sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(answer))
    ((got, _),) = AnswerScorer(model, tokenizer, max_length=LIMIT)._loglikelihood_tokens([REQUESTS[5]])
    assert got == pytest.approx(expected, rel=2e-3)
    assert round(got, 6) != float(torch.tensor(got).bfloat16())


def test_an_answer_longer_than_the_limit_is_refused(dense_dir: Path) -> None:
    scorer = AnswerScorer(load_plain(dense_dir), load_tokenizer(dense_dir), max_length=4)
    with pytest.raises(RequestError, match="expected answers of at most 4 tokens, got one of 19"):
        scorer._loglikelihood_tokens([REQUESTS[5]])
