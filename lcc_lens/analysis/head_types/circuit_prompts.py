"""Prompts of tasks with a known circuit, made in code for any tokenizer: indirect objects, and greater-than."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor, tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import special_prefix, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Paul", "Mark", "Sarah", "David", "Laura", "Peter", "Emma", "Jack", "Alice",
    "Robert", "Michael", "Susan", "George", "Henry", "Kate", "Simon", "Julia", "Daniel", "Martin",
)  # fmt: skip
_SENTENCES = (
    "When{A} and{B} went to the store,{C} gave a drink to",
    "After{A} and{B} met at the station,{C} handed the ticket to",
    "While{A} and{B} were working in the garden,{C} passed a flower to",
)
_NOUNS = ("war", "reign", "journey", "project", "strike", "drought")
_LEAST_NAMES = 5


@dataclass(frozen=True)
class CircuitPrompt:
    """A prompt, one of the same length whose answer is another, and the tokens that are right and wrong after it.

    Only the corrupted prompt lacks what the circuit needs: its names are others, or its year is 01.
    """

    text: str
    tokens: Int[Tensor, " pos"]
    corrupted: Int[Tensor, " pos"]
    right: tuple[int, ...]
    wrong: tuple[int, ...]


def circuit_prompts(task: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[CircuitPrompt]:
    """Prompts of a task.

    Args:
        task: ``indirect-object`` ("When Mary and John went to the store, John gave a drink to": Mary, not John) or
            ``greater-than`` ("The war lasted from the year 1732 to the year 17": 33 to 99, not 02 to 32).
        n: how many; ``seed``: of their draw.

    Raises:
        RequestError: an unknown task, or a tokenizer that splits the names or numbers into several tokens.

    Reference:
        Wang et al. 2022 (arXiv 2211.00593); Hanna et al. 2023 (arXiv 2305.00586).
    """
    if task not in _MAKERS:
        raise RequestError(f"expected one of {', '.join(_MAKERS)}, got {task!r}; correct the name")
    return _MAKERS[task](tokenizer, n, random.Random(seed))


def _indirect_objects(tokenizer: PreTrainedTokenizerBase, n: int, draw: random.Random) -> list[CircuitPrompt]:
    known = {name: ids[0] for name in _NAMES if len(ids := token_ids(tokenizer, f" {name}")) == 1}
    if len(known) < _LEAST_NAMES:
        raise RequestError(
            f"expected names of one token for indirect objects, got {len(known)} of {len(_NAMES)}; use another model"
        )
    made = []
    for _ in range(n):
        sentence = draw.choice(_SENTENCES)
        giver, receiver, *others = draw.sample(list(known), _LEAST_NAMES)
        pair = [giver, receiver]
        draw.shuffle(pair)
        text = sentence.format(A=f" {pair[0]}", B=f" {pair[1]}", C=f" {giver}")
        other = sentence.format(**{place: f" {name}" for place, name in zip("ABC", others, strict=True)})
        made.append(_prompt(tokenizer, text, other, [known[receiver]], [known[giver]]))
    return made


def _greater_than(tokenizer: PreTrainedTokenizerBase, n: int, draw: random.Random) -> list[CircuitPrompt]:
    def year(century: int, number: int) -> list[int]:
        return token_ids(tokenizer, f" {century}{number:02d}")

    whole = {century: [year(century, number) for number in range(100)] for century in range(11, 18)}
    usable = [c for c, years in whole.items() if all(len(y) == 2 for y in years) and len({y[0] for y in years}) == 1]
    if not usable:
        raise RequestError(
            "expected years of two tokens, such as 17 and 32, for greater-than, got others; use another model"
        )
    made = []
    for _ in range(n):
        century, number, noun = draw.choice(usable), draw.randint(2, 98), draw.choice(_NOUNS)
        ends = [y[1] for y in whole[century]]
        text, other = (
            f"The {noun} lasted from the year {century}{first:02d} to the year {century}" for first in (number, 1)
        )
        made.append(_prompt(tokenizer, text, other, ends[number + 1 :], ends[2 : number + 1]))
    return made


def _prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, other: str, right: list[int], wrong: list[int]
) -> CircuitPrompt:
    tokens, corrupted = (special_prefix(tokenizer) + token_ids(tokenizer, t) for t in (text, other))
    if len(tokens) != len(corrupted):
        raise RequestError(f"expected as many tokens in {text!r} as in {other!r}, got others; use another model")
    return CircuitPrompt(text, tensor(tokens), tensor(corrupted), tuple(right), tuple(wrong))


_MAKERS: dict[str, Callable[[PreTrainedTokenizerBase, int, random.Random], list[CircuitPrompt]]] = {
    "indirect-object": _indirect_objects,
    "greater-than": _greater_than,
}
