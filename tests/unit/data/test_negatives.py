"""Hard wrong answers: what is chosen, by what, never the right answer again, and without a matrix of everything."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_tokenizer

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data import negatives
from lcc_lens.data.datasets import load_data
from lcc_lens.data.negatives import contrast, normalised, with_other_answers
from lcc_lens.data.prompts import Example, Item
from lcc_lens.data.sentence_encoder import embed_texts, load_embedder

WORDS = ["iron", "steel", "zinc", "cat", "dog", "sat", "ran", "red", "blue", "the", "of", "a", "hard", "soft", "stone"]


def sentences(n: int, seed: int, longest: int = 9) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, longest))) for _ in range(n)]


def examples_of(answers: list[str]) -> list[Example]:
    return [Example(f"Say {i}.", answer, f"g{i}") for i, answer in enumerate(answers)]


def save_encoder(path: Path) -> Path:
    """A random BERT of unequal sizes with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    model = BertModel(
        BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, initializer_range=0.5, **sizes)
    )
    model.save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    return path


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = save_encoder(tmp_path / "tiny-bert")
    monkeypatch.setenv("LCC_LENS_EMBEDDER", str(path))
    return path


@pytest.fixture(autouse=True)
def no_encoder_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCC_LENS_EMBEDDER", raising=False)


def plain_embedding(path: Path, text: str, pooling: str = "mean") -> torch.Tensor:
    """One text at a time, without padding: the states of plain transformers, pooled and normalised."""
    from transformers import AutoTokenizer, BertModel

    words = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
    ids = [2, *words[:12], 3]  # 16 positions less two, less [CLS] and [SEP]
    with torch.no_grad():
        states = BertModel.from_pretrained(path).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    pooled = states.mean(0) if pooling == "mean" else states[0]
    return pooled / pooled.norm()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_batched_embeddings_are_those_of_single_texts(encoder: Path, pooling: str) -> None:
    if pooling == "cls":
        (encoder / "1_Pooling").mkdir()
        settings = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
        (encoder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 12, **settings}))
    texts = [*sentences(11, seed=1), "cat", " ".join(WORDS)]  # the last is longer than the encoder reads
    found = embed_texts(texts)
    expected = torch.stack([plain_embedding(encoder, text, pooling) for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(texts)))
    assert float((found - found.flip(0)).abs().max()) > 0.1
    assert embed_texts([]).shape == (0, 12)


def test_choices_are_ranked_by_cosine_and_the_encoder_is_recorded(encoder: Path, tmp_path: Path) -> None:
    texts = sentences(60, seed=2)
    records = [
        {"question": f"Which {i}?", "right": right, "wrong": [wrong for wrong in wrongs if wrong != right]}
        for i, (right, *wrongs) in enumerate(zip(*[iter(texts)] * 5, strict=True))
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = load_data(str(tmp_path / "own.jsonl"))
    assert data.negatives == f"most similar by embeddings of tiny-bert (sha256 {Checkpoint(encoder).sha256[:12]})"
    for example, record in zip(data.examples, records, strict=True):
        right = plain_embedding(encoder, record["right"])
        cosines = [float(right @ plain_embedding(encoder, wrong)) for wrong in record["wrong"]]
        assert example.wrong == record["wrong"][int(np.argmax(cosines))]


def test_the_encoder_chooses_among_other_answers(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list(dict.fromkeys(sentences(25, seed=3)))
    found, how = with_other_answers(examples_of(answers))
    assert how is not None
    assert how.startswith("most similar by embeddings of tiny-bert")
    vectors = torch.stack([plain_embedding(encoder, answer) for answer in answers])
    expected = (vectors @ vectors.T).fill_diagonal_(-2).argmax(1)
    assert [example.wrong for example in found] == [answers[i] for i in expected]
    monkeypatch.delenv("LCC_LENS_EMBEDDER")
    by_words, how = with_other_answers(examples_of(answers))
    assert how == "most similar by tf-idf"
    assert [e.wrong for e in by_words] != [e.wrong for e in found]


def plain_tfidf(texts: list[str]) -> np.ndarray:
    """Cosines of TF-IDF vectors, word by word: idf = ln((1 + n) / (1 + df)) + 1 over the texts and one more."""
    documents = [text.lower().split() for text in texts]
    words = sorted({word for document in documents for word in document})
    df = np.array([sum(word in document for document in documents) for word in words])
    idf = np.log((2 + len(texts)) / (1 + df)) + 1
    vectors = np.array([[document.count(word) for word in words] for document in documents]) * idf
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.mark.parametrize("chunk", [1, 150, 1_000_000])
def test_other_answers_by_words_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(negatives, "_CHUNK", chunk)
    answers = list(dict.fromkeys(sentences(40, seed=4)))
    similarity = plain_tfidf(answers)
    found, _ = with_other_answers(examples_of(answers))
    for row, example in enumerate(found):
        others = np.delete(similarity[row], row)
        assert similarity[row, answers.index(str(example.wrong))] == pytest.approx(others.max())


@pytest.mark.parametrize("chunk", [1, 1_000_000])
def test_choices_by_words_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(negatives, "_CHUNK", chunk)
    texts = sentences(40, seed=5)
    items = [Item("?", right, tuple(wrongs), "g") for right, *wrongs in zip(*[iter(texts)] * 4, strict=True)]
    found, how = contrast(items)
    assert how == "most similar by tf-idf"
    distinct = list(dict.fromkeys(texts))
    similarity = plain_tfidf(distinct)
    for item, example in zip(items, found, strict=True):
        row = similarity[distinct.index(item.right)]
        options = [row[distinct.index(w)] for w in item.wrongs if normalised(w) != normalised(item.right)]
        assert row[distinct.index(str(example.wrong))] == pytest.approx(max(options))


def test_the_only_wrong_answer_needs_no_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_EMBEDDER", "/nowhere")
    found, how = contrast([Item("?", " yes", (" no",), "g"), Item("?", " no", (" yes",), "g")])
    assert ([example.wrong for example in found], how) == ([" no", " yes"], "flipped label")


ANSWERS = st.lists(st.text("ab C.\n", max_size=6), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(answers=ANSWERS)
def test_another_answer_differs_in_more_than_case_and_blanks(answers: list[str]) -> None:
    examples = examples_of(answers)
    found, how = with_other_answers(examples)
    assert found == with_other_answers(examples)[0]
    assert [(e.prompt, e.response, e.group) for e in found] == [(e.prompt, e.response, e.group) for e in examples]
    if len({normalised(answer) for answer in answers} - {""}) < 2:
        assert (found, how) == (examples, None)
        return
    for example in found:
        assert example.wrong in answers
        assert normalised(str(example.wrong)) not in ("", normalised(example.response))


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 3000
    answers = [f"the answer of {i} is a {text}" for i, text in enumerate(sentences(n, seed=6))]
    with_other_answers(examples_of(answers[:10]))  # imports
    tracemalloc.start()
    try:
        found, _ = with_other_answers(examples_of(answers))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n * n * 8 * 0.7
    assert all(example.wrong != example.response for example in found)


def test_an_embedding_that_is_not_finite_is_refused(encoder: Path) -> None:
    embedder = load_embedder(encoder)
    embedder.model.get_parameter("embeddings.word_embeddings.weight")[4] = torch.nan
    assert torch.isfinite(embed_texts(["cat"], embedder)).all()
    with pytest.raises(LensError, match="expected finite embeddings from tiny-bert"):
        embed_texts(["cat", WORDS[0]], embedder)


def spoil(path: Path, case: str) -> None:
    weights = path / "model.safetensors"
    if case == "no config":
        (path / "config.json").unlink()
    elif case == "a pickle":
        weights.rename(path / "pytorch_model.bin")
    elif case == "no tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
    elif case == "another tokenizer":
        tiny_tokenizer().save_pretrained(path)
    elif case == "other weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif case == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "max pooling":
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    elif case == "a dense stage":
        stages = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
        (path / "modules.json").write_text(json.dumps(stages))


REFUSALS = {
    "no config": "got no Hugging Face directory there",
    "a pickle": "got the pickle pytorch_model.bin",
    "no tokenizer": "got no tokenizer beside it",
    "another tokenizer": "got a tokenizer of 257 tokens for 19 embeddings",
    "other weights": r"got no weights for encoder\.layer\.1\.output\.dense\.weight",
    "cut short": "expected a sentence encoder in .*got none that loads",
    "max pooling": "expected mean or CLS pooling alone .*got max_tokens",
    "a dense stage": "expected mean or CLS pooling alone .*got mean, Dense",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_variable_that_leads_to_no_encoder_is_refused(encoder: Path, tmp_path: Path, case: str) -> None:
    spoil(encoder, case)
    lines = [json.dumps({"prompt": f"Say {i}", "response": f"the {word}"}) for i, word in enumerate(WORDS)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with pytest.raises(RequestError, match=REFUSALS[case]):
        load_data(str(tmp_path / "own.jsonl"))


def test_a_writing_model_or_none_is_refused(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="got a llama that writes text"):
        load_embedder(dense_dir)
    with pytest.raises(RequestError, match="set LCC_LENS_EMBEDDER to a directory"):
        embed_texts(["cat"])
