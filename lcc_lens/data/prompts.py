"""Turn records of the built-in data sets into prompts with right and wrong answers, in lm-eval's formats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "instruction", "contrastive"]
Record = dict[str, Any]
#: Tasks whose right answers a restoration can be trained on.
RecoveryTask = Literal["boolq", "rte", "arc_easy", "arc_challenge", "openbookqa", "winogrande"]


@dataclass(frozen=True)
class Example:
    """A prompt with its response; a contrastive example also has a wrong response.

    ``group`` names what two roles (calibration, probe, train, held-out) may not share: an article, a passage, a
    prompt. Plain text has an empty prompt.
    """

    prompt: str
    response: str
    group: str
    wrong: str | None = None


@dataclass(frozen=True)
class Item:
    """A question with its right answer and all wrong ones; the wrong one most similar to the right one is used."""

    prompt: str
    right: str
    wrongs: tuple[str, ...]
    group: str


ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def read_alpaca(record: Record) -> Example:
    """An instruction with Alpaca's prompt."""
    template = ALPACA_PROMPT_WITH_INPUT if record.get("input") else ALPACA_PROMPT
    prompt = template.format(instruction=record["instruction"], input=record.get("input", ""))
    return Example(prompt, record["output"], group=prompt)


def read_boolq(record: Record) -> Item:
    """A passage with a yes-no question, grouped by article."""
    passage = record["passage"]
    is_yes = bool(record["answer"] if "answer" in record else record["label"])
    article, separator, _ = passage.partition(" -- ")
    return Item(
        prompt=f"{passage}\nQuestion: {record['question']}?\nAnswer:",
        right=" yes" if is_yes else " no",
        wrongs=(" no" if is_yes else " yes",),
        group=article if separator and len(article) < 100 else passage,
    )


def read_rte(record: Record) -> Item:
    """A premise with a hypothesis, true or false."""
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


def read_arc(record: Record) -> Item:
    """A question of ARC."""
    return _choices(f"Question: {record['question']}\nAnswer:", record, record["question"])


def read_openbookqa(record: Record) -> Item:
    """A statement of OpenBookQA to complete."""
    return _choices(record["question_stem"], record, record["question_stem"])


def _without_headings(text: str) -> str:
    """A WikiHow text without its markers in brackets, as lm-eval cleans it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read_hellaswag(record: Record) -> Item:
    """The beginning of a text with its right ending."""
    right = int(record["label"])
    endings = [f" {_without_headings(ending)}" for ending in record["endings"]]
    context = _without_headings(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    return Item(context, endings[right], tuple(e for i, e in enumerate(endings) if i != right), record["source_id"])


def read_winogrande(record: Record) -> Item:
    """The text before the gap is the question; an option with the text after the gap is an answer.

    The whole text is lm-eval's, down to its single blank after the option. lm-eval counts the option to the context
    and scores only what follows it; here the option belongs to the answer, since both answers need one question.
    """
    before, after = record["sentence"].split("_", 1)
    right = int(record["answer"]) - 1
    prompt = before.rstrip(" ")
    answers = [f"{before[len(prompt) :]}{record[option]} {after.strip()}" for option in ("option1", "option2")]
    return Item(prompt, answers[right], (answers[1 - right],), before)


def read_piqa(record: Record) -> Item:
    """A goal with two ways to reach it."""
    right = int(record["label"])
    answers = [f" {record['sol1']}", f" {record['sol2']}"]
    return Item(f"Question: {record['goal']}\nAnswer:", answers[right], (answers[1 - right],), record["goal"])


def read_document(record: Record) -> Example:
    """A document as running text."""
    text = record.get("page") or record["text"]
    return Example("", text, group=text)


def join_articles(records: list[Record]) -> list[Record]:
    """Join WikiText's lines into articles; a title line has one equals sign on each side."""
    articles: list[list[str]] = [[]]
    for record in records:
        line = str(record.get("text", record.get("page", "")))
        if line.startswith(" = ") and not line.startswith(" = = "):
            articles.append([])
        articles[-1].append(line)
    return [{"text": "\n\n".join(lines)} for lines in articles if any(line.strip() for line in lines)]


def read_article(record: Record) -> Example:
    """An article of WikiText, known by its beginning."""
    return Example("", record["text"], group=record["text"][:200])
