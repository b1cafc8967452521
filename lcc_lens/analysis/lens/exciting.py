"""The examples in which a head's output has the largest component along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.lens.checks import checked_vector
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.ranges import Count, Length, Natural, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, batches, encode_pair
from lcc_lens.data.datasets import Data, encode
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.activations import Site, TokenPositions, visit_sites
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd

Which = Literal["dense", "pruned", "difference"]


@dataclass(frozen=True)
class ExcitingToken:
    """A token at which a head's output has a large component along a direction, with the text around it."""

    score: float
    example: int
    position: int
    before: str
    token: str
    after: str


@dataclass(frozen=True, repr=False)
class ExcitingExamples(Shown):
    """The examples with the largest component along a direction of a head's output, each with its best token."""

    head: Head
    model: Which
    tokens: tuple[ExcitingToken, ...]

    def _facts(self) -> dict[str, Any]:
        lines = {f"{t.score:.3g}": f"{t.before}[{t.token}]{t.after}" for t in self.tokens}
        return {"head": self.head, "model": self.model, **lines}

    def table(self) -> pd.DataFrame:
        """One row per example, highest score first: score, example, position, before, token, after."""
        import pandas as pd

        return pd.DataFrame([vars(token) for token in self.tokens])


@ranged
def exciting_examples(
    pair: Pair,
    data: Data | str | Sequence[str],
    head: Head | tuple[int, int],
    direction: Float[Tensor, " d_head"],
    *,
    k: Count = 10,
    model: Which = "difference",
    context: Natural = 12,
    max_length: Length | None = None,
    limit: Count | None = None,
    batch_tokens: Count = 1024,
) -> ExcitingExamples:
    r"""The examples whose head output has the largest component along a direction, each with its best token.

    The score is $z \cdot v / |v|$ with z the dense or the pruned model's output, or dense minus pruned.

    Args:
        pair: the hooked models.
        data: examples of any kind, or prompts (right answers where there are two; text is cut into blocks).
        head: the pruned model's head.
        direction: v, for instance ``scan.components.directions[head][0]``.
        k: examples.
        model: whose output.
        context: tokens of text on either side.
        max_length: tokens per example at most; 512, or the models' context if shorter.
        limit: examples at most, or blocks of text.
        batch_tokens: tokens per forward pass at most.

    Raises:
        RequestError: the head is not in the model, the direction is zero, a number is outside its range, or no usable
            example.
    """
    (head,) = check_heads([head], pair.n_layers, pair.n_heads)
    unit = checked_vector(pair.pruned, direction)
    unit = unit / unit.norm()
    index, sequences = _indexed(pair, as_data(data), max_length, limit)
    scores = _projections(pair, sequences, head, unit, model, batch_tokens)
    best = [(float(values.max()), int(values.argmax())) for values in scores]
    order = sorted(range(len(best)), key=lambda i: -best[i][0])[:k]  # equal scores: the earlier example
    tokens = []
    for i in order:
        (score, position), ids = best[i], sequences[i].tokens
        stop = position + 1
        parts = (ids[max(0, position - context) : position], ids[position:stop], ids[stop : stop + context])
        before, token, after = (str(pair.tokenizer.decode(part)) for part in parts)
        tokens.append(ExcitingToken(score, index[i], position, before, token, after))
    return ExcitingExamples(head, model, tuple(tokens))


def _indexed(
    pair: Pair, data: Data, max_length: int | None, limit: int | None
) -> tuple[list[int], list[TokenSequence]]:
    """Sequences with the number of the example each one is (of the block, for text)."""
    max_length = fitting_length(max_length, pair.context)
    if data.kind == "text":
        blocks = encode(data, pair.tokenizer, max_length=max_length, limit=limit)
        return list(range(len(blocks))), blocks
    encoded = [encode_pair(pair.tokenizer, e.prompt, e.response, max_length) for e in data.examples[:limit]]
    usable = [(number, sequence) for number, sequence in enumerate(encoded) if sequence is not None]
    if not usable:
        raise RequestError(
            f"expected sequences of up to {max_length} tokens from {data.source}, got none; raise the limit"
        )
    return [number for number, _ in usable], [sequence for _, sequence in usable]


def _projections(
    pair: Pair, sequences: list[TokenSequence], head: Head, unit: Tensor, which: Which, batch_tokens: int
) -> list[Float[Tensor, " pos"]]:
    """The head's output along a unit vector at every token; one model at a time in memory."""
    signs = {"pruned": (1.0, 0.0), "dense": (0.0, 1.0), "difference": (-1.0, 1.0)}
    if which not in signs:
        raise RequestError(f"expected the model {', '.join(signs)}, got {which!r}; choose one")
    scores = [torch.zeros(len(sequence)) for sequence in sequences]
    for sign, is_dense in zip(signs[which], (False, True), strict=True):
        if sign:
            _add_projections(scores, pair, sequences, head, sign * unit, is_dense, batch_tokens)
    return scores


def _add_projections(
    scores: list[Tensor], pair: Pair, sequences: list[TokenSequence], head: Head, vector: Tensor, is_dense: bool,
    batch_tokens: int,
) -> None:  # fmt: skip
    """Add one model's z along a vector to the scores."""
    model = pair.dense if is_dense else pair.pruned

    def visit(site: Site, layer: int, z: Tensor) -> None:
        if layer == head.layer:
            kept = (pair.kept_heads(layer, z) if is_dense else z).float()
            along = (kept[:, head.head] @ vector.to(kept.device)).cpu()
            for row, values in zip(batch.index, along.split(batch.lengths.tolist()), strict=True):
                scores[row] += values

    for batch in batches(sequences, max_tokens=batch_tokens):
        visit_sites(model, batch.tokens, {"z": TokenPositions.all_tokens(batch)}, visit)
