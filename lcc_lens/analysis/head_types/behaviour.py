"""What circuits do together: the loss on repeated random tokens, and how much it falls within a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.head_types.patterns import NamedModel
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, batches, special_prefix
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import logits_at
from lcc_lens.models.hooked.losses import token_nll
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

#: Of a sequence of n tokens, the first and the end of every span of tokens whose loss is averaged.
Spans = Callable[[int], Sequence[tuple[int, int]]]


def repeated_tokens(pair: Pair, n_sequences: int, length: int, seed: int) -> tuple[list[TokenSequence], int]:
    """Random tokens, each sequence twice in a row, behind the tokens that the tokenizer begins every text with.

    Returns:
        The sequences, and the number of tokens before the random ones.
    """
    before = special_prefix(pair.tokenizer)
    n_tokens = len(before) + 2 * length
    if n_tokens > pair.context:
        raise RequestError(
            f"expected a context of {n_tokens} tokens for a repeated sequence, got {pair.context}; lower the length"
        )
    special = set(pair.tokenizer.all_special_ids)
    n_known = min(len(pair.tokenizer), int(pair.dense.cfg.d_vocab))
    ordinary = torch.tensor([token for token in range(n_known) if token not in special])
    if len(ordinary) < length:
        raise RequestError(f"expected {length} different tokens, got a vocabulary of {len(ordinary)}; lower the length")
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor(before, dtype=torch.long)
    sequences = []
    for _ in range(n_sequences):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[:length]]
        sequences.append(TokenSequence(torch.cat([start, drawn, drawn]), 1))
    return sequences, len(before)


def mean_losses(
    named: NamedModel, sequences: Sequence[TokenSequence], spans: Spans, batch_tokens: int
) -> Float[Tensor, " span"]:
    """A model's mean loss, in nats per token, on the tokens within each span, over all sequences."""
    model, n_spans = named.model, len(spans(len(sequences[0])))
    total, count = torch.zeros(n_spans, dtype=torch.float64), torch.zeros(n_spans, dtype=torch.float64)
    for batch in batches(sequences, max_tokens=batch_tokens):
        within = torch.zeros(n_spans, *batch.tokens.shape, dtype=torch.bool)
        for row, length in enumerate(batch.lengths.tolist()):
            for span, (start, end) in enumerate(spans(length)):
                within[span, row, max(start, 1) - 1 : end - 1] = True  # each position predicts the next token
        counted = within.any(0)
        device = device_of(model)
        with torch.inference_mode(), named.applied():
            logits = forward(model, batch.tokens.to(device), logits_at(model, counted.to(device)))[0]
            losses = token_nll(logits, batch.tokens.roll(-1, 1)[counted].to(logits.device)).double().cpu()
        chosen = within[:, counted].double()
        total, count = total + chosen @ losses, count + chosen.sum(1)
    return (total / count).float()


def copies(n_prefix: int, length: int) -> Spans:
    """Both copies of repeated tokens; nothing predicts the first token of either."""
    first, second = n_prefix, n_prefix + length
    return lambda n: ((first + 1, second), (second + 1, n))


def quarters(n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last quarter of a text."""
    size = max(1, n // 4)
    return (1, 1 + size), (n - size, n)
