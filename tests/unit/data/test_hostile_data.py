"""Data files that are not what they say: each is refused in one line, or read as a person would read it."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.tiny import build_model, save_model, tiny_tokenizer

from lcc_lens.analysis.lens.prompt import prompt_tokens
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import token_ids
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.data.prompts import Example
from lcc_lens.evaluation.answers.scorer import AnswerScorer
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.pair import load_pair

LINES = {
    "half of a surrogate pair": ('{"text": "a \\ud800 b"}', "got half of a surrogate pair"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"text": ' * 20_000, "nested too deeply"),
    "5,000 digits": ('{"text": "a", "n": ' + "7" * 5_000 + "}", "finite numbers of usual length"),
    "a whole pair": ('{"text": "a \\ud83d\\ude00 b"}', None),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_is_refused_by_its_number(tmp_path: Path, case: str) -> None:
    line, message = LINES[case]
    file = tmp_path / "own.jsonl"
    file.write_text(f'{{"text": "good"}}\n{line}\n')
    if message is None:
        assert load_data(str(file)).examples[1].response == "a 😀 b"
        return
    with pytest.raises(RequestError, match=message) as refusal:
        load_data(str(file))
    assert "line 2 of" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_a_folder_is_no_data_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RequestError, match=r"expected the file .*, got a folder or a device"):
        load_data(str(tmp_path / name))


def test_blank_lines_of_spaces_end_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nstill one\n  \t\ntwo\r\n \r\nthree\n\n\n\nfour")
    texts = [example.response for example in load_data(str(tmp_path / "a.txt")).examples]
    assert texts == ["one\nstill one", "two", "three", "four"]


def test_one_paragraph_serves_one_role(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a single paragraph " * 50)
    file = str(tmp_path / "a.txt")
    for role in ("calibration", "probe", "held-out"):
        with pytest.raises(RequestError, match="divided among the roles by their text; add more"):
            load_data(file, role=role)
    assert len(load_data(file, role="train")) == 1


def test_empty_responses_are_named() -> None:
    empty = Data("own", "instruction", tuple(Example(f"p{i}", "", f"p{i}") for i in range(3)), "here")
    with pytest.raises(RequestError, match="expected responses in here, got 3 empty ones; fill them in"):
        encode(empty, tiny_tokenizer(), max_length=50)


def test_a_tokenizer_that_makes_nothing_is_named() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    silent = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<end>": 0}, [])), eos_token="<end>")
    for kind, prompt in (("text", ""), ("instruction", "why?")):
        data = Data("own", kind, (Example(prompt, "some text", "g"),), "here")
        with pytest.raises(RequestError, match="expected tokens of here, got none: the tokenizer makes nothing of it"):
            encode(data, silent, max_length=8)


def test_a_literal_pad_without_an_embedding_is_read_as_text(tmp_path: Path) -> None:
    model = build_model()
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "to [PAD] or not"
    assert max(loaded(text)["input_ids"]) == 257
    ids = token_ids(loaded, text)
    assert max(ids) < 257
    assert loaded.decode(ids) == text
    data = Data("own", "text", (Example("", text * 9, "g"),), "here")
    with torch.no_grad():
        assert model(torch.stack([s.tokens for s in encode(data, loaded, max_length=20)])).logits.isfinite().all()
    assert not loaded.split_special_tokens
    assert AnswerScorer(model, loaded, max_length=64)._encode_pair(text, " that") == (ids, token_ids(loaded, " that"))
    pair = load_pair(tmp_path, tmp_path)
    assert prompt_tokens(pair, text).tolist() == ids


def test_too_few_held_out_responses_are_refused_before_a_run(tmp_path: Path, dense_dir: Path, pruned_dir: Path) -> None:
    from lcc_lens.evaluation.comparison.compare import compare
    from lcc_lens.evaluation.comparison.config import CompareConfig

    pairs, texts = tmp_path / "own.jsonl", tmp_path / "own.txt"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(40)))
    texts.write_text("\n\n".join(f"paragraph {i} " * 9 for i in range(40)))
    config = CompareConfig(data=str(pairs), texts=(str(texts),), validation=24, block_length=32)
    with pytest.raises(RequestError, match=r"expected more than 24 held-out responses in .*own.jsonl, got \d+:"):
        compare(dense_dir, pruned_dir, tmp_path / "run", ["lcc", "lora"], seeds=2, config=config)
    assert not (tmp_path / "run" / "comparison.json").exists()


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    """Seeded damage to a good file: it reads, or one line says why not."""
    draw = random.Random(seed)
    good = "".join(json.dumps({"prompt": f"p{i} é", "response": "r", "group": "g"}) + "\n" for i in range(4)).encode()
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data))
        data[place : place + draw.choice((0, 1, 9))] = draw.choice(
            (b"", b"\xff", b"\x00", b"{", b"]", b'"', b"1e999", b"NaN", b"\\ud800", b"null", b"\n")
        )
    (tmp_path / "own.jsonl").write_bytes(data)
    with suppress(RequestError):
        assert all(isinstance(e.response, str) for e in load_data(str(tmp_path / "own.jsonl")).examples)


def test_a_saved_model_reads_its_own_tokenizer(tmp_path: Path) -> None:
    save_model(build_model(), tmp_path)
    assert token_ids(load_tokenizer(tmp_path), "<end>a") == [0, token_ids(tiny_tokenizer(), "a")[0]]
