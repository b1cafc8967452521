"""Known types of heads in the dense, the pruned and the restored model: which circuits did pruning take?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcc_lens.analysis.head_types.behaviour import copies, mean_losses, quarters, repeated_tokens
from lcc_lens.analysis.head_types.copying import copying_scores
from lcc_lens.analysis.head_types.patterns import (
    NamedModel,
    compared_models,
    detection_masks,
    pattern_measures,
    type_scores,
    walk_patterns,
)
from lcc_lens.analysis.head_types.result import MEASURES, PATTERN_TYPES, HeadTypes, HeadTypesRecord
from lcc_lens.analysis.lens.prompt import Applicable
from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.metrics import standard_error
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Length, Seed, ranged
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.data.datasets import Data, encode
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair


@ranged
def head_types(
    pair: Pair,
    restoration: Applicable | None = None,
    *,
    data: Data | str | Path | Sequence[str] | None = None,
    n_sequences: Count = 8,
    length: Length = 50,
    max_length: Length = 256,
    limit: Count = 16,
    batch_tokens: Count | None = None,
    seed: Seed = 0,
) -> HeadTypes:
    """Score every head of the dense, the pruned and the restored model as previous token, induction head, and so on.

    Patterns are read layer by layer and not kept.

    Args:
        pair: the hooked models, both in memory.
        restoration: a restoration or an injection of the pruned model; without one, two models are compared.
        data: texts on which patterns are measured and compared; the repeated random tokens if not given.
        n_sequences: sequences of random tokens; each is ``length`` tokens, all different, and the same again.
        max_length: tokens per text at most; ``limit``: texts at most.
        batch_tokens: tokens per forward pass at most.
        seed: of the random tokens.

    Raises:
        RequestError: the context or the vocabulary is too small for a repeated sequence, one model is in memory at a
            time, or patterns cannot be read.

    Reference:
        Scores as in TransformerLens' head detector; induction heads: Olsson et al. 2022 (arXiv 2209.11895).

    Example:
        >>> types = head_types(pair, restoration, data=load_data("c4", n=16))  # doctest: +SKIP
        >>> types.strongest("induction")  # doctest: +SKIP
    """
    models = compared_models(pair, restoration)
    repeated, n_prefix = repeated_tokens(pair, n_sequences, length, seed)
    texts, name = repeated, "repeated random tokens"
    if data is not None:
        read, most = as_data(data), fitting_length(max_length, pair.context)
        texts, name = encode(read, pair.tokenizer, max_length=most, limit=limit), read.name
    tokens = batch_tokens or tokens_per_pass(device_of(pair.dense))
    found = _Readings(pair, models, tokens)
    found.read(repeated, of_types=True)
    found.read(texts, of_types=False)
    value, stderr = found.finish()
    copying = [_copying(each) for each in models]
    copying[0] = torch.stack(
        [by_head[list(kept)] for by_head, kept in zip(copying[0], pair.head_map.dense_heads, strict=True)]
    )
    value["copying"] = torch.stack(copying)
    stderr["copying"] = torch.full_like(value["copying"], torch.nan)
    loss = torch.stack([mean_losses(each, repeated, copies(n_prefix, length), tokens) for each in models])
    parts = torch.stack([mean_losses(each, texts, quarters, tokens) for each in models])
    record = HeadTypesRecord(
        tuple(each.name for each in models), name, n_sequences, length, seed, pair.dense_id.sha256,
        pair.pruned_id.sha256, len(texts), getattr(restoration, "content_sha256", None),
    )  # fmt: skip
    return HeadTypes(record, value, stderr, loss, parts[:, 1] - parts[:, 0])


def _copying(named: NamedModel) -> Tensor:
    with named.applied():
        return copying_scores(named.model)


class _Readings:
    """Every measure of every sequence, ``[sequence, layer, head]`` by name and model."""

    def __init__(self, pair: Pair, models: list[NamedModel], batch_tokens: int) -> None:
        self.pair, self.models, self.batch_tokens = pair, models, batch_tokens
        self.by_name: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def read(self, sequences: Sequence[TokenSequence], *, of_types: bool) -> None:
        """Run all models over sequences and measure their patterns."""
        passes = batches(sequences, max_tokens=self.batch_tokens)
        for batch in track(passes, len(passes), "read attention patterns"):
            masks = detection_masks(batch.tokens.to(device_of(self.pair.pruned)))
            layers: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
            for patterns in walk_patterns(self.pair, self.models, batch.tokens):
                for model, pattern in patterns.items():
                    dense = patterns["dense"].to(pattern.device)
                    scores = (
                        type_scores(pattern, masks) if of_types else pattern_measures(pattern, dense, batch.lengths)
                    )
                    for name, score in scores.items():
                        layers[name, model].append(score.cpu())
            for key, scores_by_layer in layers.items():
                self.by_name[key].append(torch.stack(scores_by_layer, dim=1))

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and standard errors by name, ``[model, layer, head]``."""
        value, stderr = {}, {}
        for name in (*PATTERN_TYPES, *MEASURES):
            by_model = [torch.cat(self.by_name[name, each.name]) for each in self.models]
            value[name] = torch.stack([scores.mean(0) for scores in by_model])
            stderr[name] = torch.stack([standard_error(scores) for scores in by_model])
        return value, stderr
