"""Reading a shared context once gives lm-eval's log-likelihoods, in every family of models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.families import BASE, FAMILIES
from support.tiny import build_model, tiny_tokenizer

from lcc_lens.evaluation.answers.scorer import AnswerScorer
from lcc_lens.evaluation.answers.tree_passes import can_share
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
from lcc_lens.models.loading.plain import load_plain

LIMIT = 100
QUESTION = "Question: which of these is cold?\nAnswer:"
TEXTS = [
    *[(QUESTION, answer) for answer in (" ice", " iron", " the sun", " ice", " a")],  # some begin alike
    *[("", answer) for answer in ("yes", "no")],
    ("A question with one choice:", " this"),
    *[(f"The cup did not fit in the box since {what}", " was too small.") for what in ("the cup", "the box")],
    *[("word " * 30, answer) for answer in ("cut from", "cut off")],  # longer than the limit
]
#: Families in which a context cannot be shared: positions that count keys, and recurrent layers.
APART = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**BASE, hidden_size=40, n_layer=3, n_head=5)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**BASE, hidden_size=40, num_hidden_layers=3, state_size=4)),
}
#: The longest row of a tree with branches.
ROWS = {"gemma2": 24, "mistral": 24, "gemma3": 4, "mistral, 4": 4}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return (FAMILIES | APART)[name]().eval()


def requests(texts: list[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(texts)]


@pytest.mark.parametrize("name", [*FAMILIES, *APART])
def test_answers_are_those_of_lm_eval(name: str) -> None:
    model, tokenizer = model_of(name), tiny_tokenizer()
    plain = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LIMIT)
    scorer = AnswerScorer(model, tokenizer, max_length=LIMIT, max_tokens=200)
    assert (scorer._max_nodes, scorer._shares) == (ROWS.get(name, LIMIT), name not in APART)
    expected = plain.loglikelihood(requests(TEXTS), disable_tqdm=True)
    found = scorer.loglikelihood(requests(TEXTS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, 4", "mamba"])
def test_whole_texts_are_those_of_lm_eval(name: str) -> None:
    model, tokenizer = model_of(name), tiny_tokenizer()
    texts = [("A text of two windows. " * 6,), ("A short text.",)]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LIMIT)
    scorer = AnswerScorer(model, tokenizer, max_length=LIMIT)
    expected = plain.loglikelihood_rolling(requests(texts, "loglikelihood_rolling"), disable_tqdm=True)
    found = scorer.loglikelihood_rolling(requests(texts, "loglikelihood_rolling"), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_shared_context_is_read_once() -> None:
    model = build_model()
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    scorer = AnswerScorer(model, tiny_tokenizer(), max_length=LIMIT)
    assert scorer._shares
    read.clear()
    scorer.loglikelihood(requests([(QUESTION, f" {word}") for word in ("ice", "fire", "coal")]), disable_tqdm=True)
    assert sum(read) == len(QUESTION) + 1 + len("ic") + len("fir") + len("coa")


def test_a_model_that_ignores_the_mask_does_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    assert can_share(model, LIMIT)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, attention_mask=None, **given: forward(*args, **given))
    assert not can_share(model, LIMIT)


@pytest.mark.parametrize("attention", [nullcontext, fused_attention], ids=["step by step", "fused"])
def test_a_hooked_model_answers_as_the_plain_one(dense_dir: Path, attention: Callable[..., Any]) -> None:
    """Hooks change the answers, and stay active while a context is shared."""
    tokenizer, hooked = load_tokenizer(dense_dir), load_hooked(dense_dir).model
    model = plain_model(hooked)
    hooked.add_hook("blocks.1.attn.hook_z", lambda z, hook: z + 0.5)
    with attention(hooked):
        expected = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LIMIT).loglikelihood(requests(TEXTS))
        found = AnswerScorer(model, tokenizer, max_length=LIMIT).loglikelihood(requests(TEXTS))
    plain = AnswerScorer(load_plain(dense_dir), tokenizer, max_length=LIMIT).loglikelihood(requests(TEXTS))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [value for value, _ in found] != pytest.approx([value for value, _ in plain], abs=1e-2)


def test_half_precision_shares_too() -> None:
    assert can_share(build_model().bfloat16(), LIMIT)
    assert not can_share(APART["bloom"]().bfloat16().eval(), LIMIT)
