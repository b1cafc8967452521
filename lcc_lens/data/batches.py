"""Tokenise prompts and texts into sequences, and group sequences of similar length into right-padded batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: By tokenizer, how many tokens its model has embeddings for.
_N_EMBEDDINGS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
#: Fixed cost of a forward pass, in tokens: padding fewer tokens than this is cheaper than another batch.
_COST_OF_A_BATCH = 64


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one example; the loss counts from position ``loss_from`` on (the first response token, at least 1)."""

    tokens: Int[Tensor, " pos"]
    loss_from: int

    def __len__(self) -> int:
        return len(self.tokens)


def sequences_sha256(sequences: Iterable[TokenSequence]) -> str:
    """A hash of all tokens, and of where the loss counts."""
    return fingerprint([(sequence.loss_from, sequence.tokens.tolist()) for sequence in sequences])


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length. Causal attention never looks at padding, so no mask is needed."""

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    loss_from: Int[Tensor, " batch"]
    index: tuple[int, ...]

    def is_target(self) -> Tensor:
        """Boolean ``[batch, pos]``: positions whose logits predict a token that the loss counts."""
        position = torch.arange(self.tokens.shape[1])
        return (position >= self.loss_from[:, None] - 1) & (position < self.lengths[:, None] - 1)

    def is_followed(self) -> Tensor:
        """Boolean ``[batch, pos]``: positions whose logits predict any token of the sequence, prompt included."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None] - 1

    def is_valid(self) -> Tensor:
        """Boolean ``[batch, pos]``: positions that are not padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def targets(self) -> Int[Tensor, " target"]:
        """The tokens to predict at :meth:`is_target`, in row-major order."""
        return self.tokens[:, 1:][self.is_target()[:, :-1]]


def limit_tokens(tokenizer: PreTrainedTokenizerBase, n_embeddings: int) -> None:
    """Note how many tokens a tokenizer's model knows."""
    _N_EMBEDDINGS[tokenizer] = n_embeddings


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that the model knows (see :func:`known_ids`), without special ones around them."""
    return known_ids(tokenizer, lambda: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def known_ids(tokenizer: PreTrainedTokenizerBase, encode: Callable[[], list[int]]) -> list[int]:
    """What a tokenizer encodes; a special token without an embedding, such as ``[PAD]``, is read letter by letter.

    Raises:
        RequestError: the tokenizer makes of it what the model does not know, or cannot read it.
    """
    try:
        ids, n_known = encode(), _N_EMBEDDINGS.get(tokenizer, sys.maxsize)
    except TypeError as error:  # what tokenizers say of half a character
        raise RequestError("expected text, got half of a surrogate pair in it; remove that") from error
    if max(ids, default=0) >= n_known:
        splits = tokenizer.split_special_tokens
        tokenizer.split_special_tokens = True
        try:
            ids = encode()
        finally:
            tokenizer.split_special_tokens = splits
    if max(ids, default=0) >= n_known:
        raise RequestError(
            f"expected tokens up to {n_known - 1}, got {max(ids)} from the tokenizer; copy the model's own tokenizer"
        )
    return ids


def require_tokens(tokenizer: PreTrainedTokenizerBase, text: str, source: str) -> None:
    """Refuse a tokenizer that makes nothing of a text."""
    if text.strip() and not token_ids(tokenizer, text):
        raise RequestError(
            f"expected tokens of {source}, got none: the tokenizer makes nothing of it; copy the model's own tokenizer"
        )


def text_blocks(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[TokenSequence]:
    """Cut a text into blocks of exactly ``length`` tokens, each starting with the tokenizer's special tokens."""
    lead = special_prefix(tokenizer)
    step = length - len(lead)
    if step < 1:
        raise RequestError(
            f"expected blocks longer than the {len(lead)} special tokens, got {length}; raise the length"
        )
    if limit is not None:  # a token is rarely longer than 20 characters; tokenising a whole corpus takes long
        text = text[: limit * length * 20]
    ids = token_ids(tokenizer, text)
    starts = range(0, len(ids) - step + 1, step)[:limit]
    return [
        TokenSequence(torch.tensor(lead + ids[start : start + step]), loss_from=max(1, len(lead))) for start in starts
    ]


def in_equal_parts(
    parts: Sequence[Callable[[int | None], list[TokenSequence]]], limit: int | None
) -> list[TokenSequence]:
    """Sequences of several sources in turn, equally many of each; where one has too few, the others give more.

    Args:
        parts: each gives so many sequences, or as many as it has.
        limit: how many in all; everything if not given.
    """
    if limit is None:
        cut = [part(None) for part in parts]
    else:
        wanted = [limit // len(parts) + (place < limit % len(parts)) for place in range(len(parts))]
        cut = [part(n) for part, n in zip(parts, wanted, strict=True)]
        while n_missing := limit - sum(map(len, cut)):
            full = [place for place, n in enumerate(wanted) if len(cut[place]) == n]
            if not full:
                break
            for nth, place in enumerate(full):
                wanted[place] += n_missing // len(full) + (nth < n_missing % len(full))
                cut[place] = parts[place](wanted[place])
    return [sequence for turn in zip_longest(*cut) for sequence in turn if sequence is not None]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int
) -> TokenSequence | None:
    """Tokens of prompt + response as one text; None if no response is left before the cut at ``max_length``.

    As in lm-eval, trailing blanks of the prompt count to the response, which starts after as many tokens as the prompt
    alone has.
    """
    stripped = prompt.rstrip(" ")
    lead = special_prefix(tokenizer)
    whole = lead + token_ids(tokenizer, prompt + response)
    n_prompt = len(lead) + len(token_ids(tokenizer, stripped))
    loss_from = max(n_prompt, 1)
    tokens = whole[:max_length]
    return TokenSequence(torch.tensor(tokens), loss_from) if loss_from < len(tokens) else None


def shared_prefix(first: Int[Tensor, " first"], second: Int[Tensor, " second"]) -> int:
    """The number of first tokens that two sequences share."""
    n = min(len(first), len(second))
    differs = (first[:n] != second[:n]).nonzero()
    return int(differs[0]) if len(differs) else n


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: none, or beginning-of-text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = list(tokenizer("a")["input_ids"])
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def batches(
    sequences: Sequence[TokenSequence], *, max_tokens: int = 1024, max_batch: int = 32, longest: int | None = None
) -> list[Batch]:
    """Group sequences of similar length, longest first, so that padding is small and memory peaks in the first batch.

    Shapes are few, since libraries keep memory for each new one: 1, 2, 4, 8, ... sequences, padded to a
    :func:`rounded_length` or to ``longest``.

    Args:
        sequences: in any order; ``Batch.index`` has their positions in this list.
        max_tokens: padded tokens per batch at most (a longer sequence is a batch of its own).
        max_batch: sequences per batch at most.
        longest: pad to so many tokens at most; the length of the longest sequence if not given. Where sequences come in
            many lists, the same for all keeps the shapes few.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # sorted() keeps ties in order
    most = max(map(len, sequences), default=0) if longest is None else longest
    lengths = [max(len(sequences[i]), min(rounded_length(len(sequences[i])), most)) for i in order]
    ends = _cheapest_ends(lengths, max_tokens, max_batch)
    return [pad(sequences, order[i:end], lengths[i]) for i, end in zip([0, *ends], ends, strict=False)]


def rounded_length(n: int) -> int:
    """The next of few lengths, eight from each power of two to the next: 1, 2, ..., 16, 18, ..., 32, 36, ..."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


def _cheapest_ends(lengths: Sequence[int], max_tokens: int, max_batch: int) -> list[int]:
    """Ends of batches of descending lengths that minimise padded tokens plus the fixed cost per batch."""
    cost, start_of = [0] + [0] * len(lengths), [0] * (len(lengths) + 1)
    sizes = [1 << power for power in range(max_batch.bit_length())]
    for end in range(1, len(lengths) + 1):
        starts = [end - size for size in sizes if size <= end]
        allowed = [i for i in starts if i == end - 1 or (end - i) * lengths[i] <= max_tokens]
        cost[end], start_of[end] = min((cost[i] + (end - i) * lengths[i] + _COST_OF_A_BATCH, i) for i in allowed)
    ends = [len(lengths)] if lengths else []
    while ends and start_of[ends[0]]:
        ends.insert(0, start_of[ends[0]])
    return ends


def pad(sequences: Sequence[TokenSequence], index: Sequence[int], length: int = 0) -> Batch:
    """Right-pad the chosen sequences with token 0, which no valid position attends to, into one batch.

    It is as long as the longest of them, or ``length`` where that is more.
    """
    chosen = [sequences[i] for i in index]
    lengths = torch.tensor([len(s) for s in chosen])
    tokens = torch.zeros(len(chosen), max(length, int(lengths.max())), dtype=torch.long)
    for row, sequence in enumerate(chosen):
        tokens[row, : len(sequence)] = sequence.tokens
    return Batch(tokens, lengths, torch.tensor([s.loss_from for s in chosen]), tuple(index))
