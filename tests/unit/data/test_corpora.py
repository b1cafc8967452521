"""Corpora without a network: running text out of task data, code, and several sets in equal parts."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from support.tiny import tiny_tokenizer

from lcc_lens.core.errors import RequestError
from lcc_lens.data.checks import or_mix
from lcc_lens.data.datasets import encode, joined, load_data, text_sequences
from lcc_lens.data.registry import domains, part_names
from lcc_lens.data.user_files import is_data_file

ROLES = ("calibration", "probe", "train", "held-out")


def written(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    return tmp_path


def test_passages_come_once_and_keep_the_questions_group(root: Path) -> None:
    asked = [{"passage": f"Place {i} -- Far away.", "question": q, "answer": True} for i in range(3) for q in "ab"]
    written(root / "boolq" / "train.jsonl", *asked)
    passages = load_data("wikipedia")
    assert [e.response for e in passages.examples] == [f"Place {i} -- Far away." for i in range(3)]
    assert passages.groups == load_data("boolq").groups
    assert (passages.kind, {e.prompt for e in passages.examples}) == ("text", {""})


def test_howto_leaves_captions_of_videos_out(root: Path) -> None:
    item = {"activity_label": "Baking", "ctx_a": "Heat it.", "ctx_b": "then", "endings": ["eat.", "sleep."], "label": 0}
    written(
        root / "hellaswag" / "train.jsonl", {**item, "source_id": "wikihow~1"}, {**item, "source_id": "activitynet~2"}
    )
    assert [e.response for e in load_data("howto").examples] == ["Baking: Heat it. Then eat."]


def test_science_needs_a_passage(root: Path) -> None:
    written(root / "sciq" / "train.jsonl", {"support": "Ice floats."}, {"support": " "}, {"support": "Ice floats."})
    assert [e.response for e in load_data("science").examples] == ["Ice floats."]


def test_code_is_the_standard_library_and_no_file_serves_two_roles() -> None:
    parts = [load_data("python", role=role) for role in ROLES]
    files = [{example.group for example in part.examples} for part in parts]
    assert all(len(own) > 20 for own in files)
    assert not any(first & second for first, second in combinations(files, 2))
    assert "json/decoder.py" in set().union(*files)
    assert max(len(example.response) for example in parts[0].examples) < 10_000
    assert parts[0].source.startswith("python/cpython-3.")


def paragraphs(path: Path, word: str, n: int) -> str:
    path.write_text("\n\n".join(f"{word} {i}" for i in range(n)))
    return str(path)


def test_parts_give_equally_many_blocks_in_turn(tmp_path: Path) -> None:
    names = [paragraphs(tmp_path / f"{word}.txt", word, 60) for word in ("aa", "bb")]
    pool, tokenizer = load_data("+".join(names)), tiny_tokenizer()
    texts = [tokenizer.decode(block.tokens) for block in encode(pool, tokenizer, max_length=20, limit=7)]
    assert ["aa" in text for text in texts] == [True, False, True, False, True, False, True]
    assert len(pool) == 120


def test_where_a_part_is_too_small_the_others_give_more(tmp_path: Path) -> None:
    short, long = paragraphs(tmp_path / "short.txt", "aa", 8), paragraphs(tmp_path / "long.txt", "bb", 99)
    parts, tokenizer = [load_data(short), load_data(long)], tiny_tokenizer()
    n_short = len(encode(parts[0], tokenizer, max_length=16))
    texts = [tokenizer.decode(b.tokens) for b in text_sequences(joined(parts), tokenizer, 16, 12)]
    assert n_short < 6
    assert [sum(word in text for text in texts) for word in ("aa", "bb")] == [n_short, 12 - n_short]
    n_all = len(encode(parts[1], tokenizer, max_length=16)) + n_short
    assert len(text_sequences(joined(parts), tokenizer, 16, 999)) == n_all


def test_no_role_of_a_pool_holds_what_another_role_of_its_parts_does(root: Path) -> None:
    """ARC's easy set has questions that the challenge set tests, and BoolQ's passages are Wikipedia's."""
    questions = [
        {"question": f"Is {i} odd?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
        for i in range(120)
    ]
    written(root / "arc_easy" / "train.jsonl", *questions[:100])
    written(root / "arc_challenge" / "train.jsonl", *questions[40:])
    written(root / "arc_challenge" / "test.jsonl", *questions[:30])
    name = "arc_easy+arc_challenge"
    roles = {role: load_data(name, role=role).groups for role in ROLES}
    assert not any(first & second for first, second in combinations(roles.values(), 2))
    assert frozenset().union(*roles.values()) == load_data(name).groups | roles["held-out"]
    alone = {part: load_data(part, role="train") for part in part_names(name)}
    assert alone["arc_easy"].groups & roles["held-out"]  # each set by itself keeps them
    pool = load_data(name, role="train")
    assert {part.name: part.groups <= alone[part.name].groups for part in pool.parts} == dict.fromkeys(alone, True)
    assert frozenset().union(*(part.groups for part in pool.parts)) == pool.groups


def test_a_plus_joins_names_and_may_be_in_a_files_own(tmp_path: Path) -> None:
    file, other = str(tmp_path / "c++.txt"), str(tmp_path / "a+b.jsonl")
    for name in (file, other):
        assert part_names(name)  # while there is no such file
        Path(name).touch()
        assert (part_names(name), is_data_file(name)) == ((), True)
    assert part_names(f"c4+{file}+{other}+notes.txt") == ("c4", file, other, "notes.txt")
    assert not any(map(is_data_file, ("c4+notes.txt", f"c4 + {file}", f"{file}+c4")))


def test_domains_are_those_of_all_parts() -> None:
    assert part_names("c4+notes.txt") == ("c4", "notes.txt")
    assert domains("mix") == {"self-written", "encyclopedia", "how-to", "questions", "code"}
    assert domains("alpaca+notes.txt") == {"instructions", str(Path("notes.txt").resolve())}


def test_the_mix_replaces_defaults_without_a_source(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert or_mix("alpaca", "c4") == ("mix",)
    assert "no source of alpaca, c4 here: taking mix (self, wikipedia, howto, questions, python) instead" in caplog.text
    written(root / "alpaca" / "train.jsonl", {"instruction": "Say so", "output": "so"})
    assert or_mix("alpaca") == ("alpaca",)
    assert or_mix("wikitext", instead="wikipedia") == ("wikipedia",)


def test_advice_for_a_missing_set_names_only_what_holds_it(root: Path) -> None:
    with pytest.raises(RequestError, match=r"c4/<split>\.jsonl, or let the hub be reached \(allenai/c4\)$"):
        load_data("c4")


def test_text_of_the_dense_model_needs_the_model() -> None:
    for name in ("self", "mix"):
        with pytest.raises(RequestError, match=r"expected a writer .* for the data self, got none"):
            load_data(name)
