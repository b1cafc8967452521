"""First different token of right and wrong answers, and the model's activations just before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, batches, shared_prefix
from lcc_lens.data.datasets import Data
from lcc_lens.data.in_memory import as_data
from lcc_lens.data.labels import encode_answers
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.activations import TokenPositions
from lcc_lens.models.hooked.direct_path import OutputProjections
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, resid_name
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Streams(Shown):
    """A model's last residual stream at chosen positions, and the scale of each layer's attention output there.

    ``attention_scale`` is 1 in architectures without a norm between attention and residual stream.
    """

    resid: Float[Tensor, "example d_model"]
    attention_scale: Float[Tensor, "example layer"]


@ranged
def answer_streams(
    pair: Pair, data: Data | str | Sequence[str], *, max_length: Length | None = None, batch_tokens: Count = 1024
) -> Streams:
    """The pruned model's last residual stream before right and wrong answers differ, one row per example.

    Raises:
        RequestError: the data have no usable contrast.
    """
    contexts, _ = contrasts(pair, as_data(data), max_length)
    return streams_at(pair.pruned, OutputProjections.of(pair.pruned), contexts, batch_tokens)


def contrasts(
    pair: Pair, data: Data, max_length: int | None
) -> tuple[list[TokenSequence], Int[Tensor, "example choice"]]:
    """For every example the tokens before right and wrong answers differ, and the two different tokens."""
    max_length = fitting_length(max_length, pair.context)
    if any(example.wrong is None for example in data.examples):
        raise RequestError(
            f"expected right and wrong answers, got {data.name}, whose examples have none; use a task such as boolq"
        )
    contexts, answers = [], []
    for right, wrong in filter(None, encode_answers(data, pair.tokenizer, max_length)):
        at = shared_prefix(right.tokens, wrong.tokens)
        if 0 < at < min(len(right), len(wrong)):
            contexts.append(TokenSequence(right.tokens[:at], at))
            answers.append([int(right.tokens[at]), int(wrong.tokens[at])])
    n_skipped = len(data.examples) - len(contexts)
    if n_skipped:
        logger.warning(
            "skipped %d of %d pairs: right and wrong answers do not differ within %d tokens",
            n_skipped, len(data.examples), max_length,
        )  # fmt: skip
    if not contexts:
        raise RequestError(
            f"expected pairs that differ within {max_length} tokens from {data.source}, got none; raise the limit"
        )
    return contexts, torch.tensor(answers)


def at_last(
    model: HookedModel, sequences: list[TokenSequence], names: list[str], batch_tokens: int
) -> dict[str, Tensor]:
    """Activations at named hook points at every sequence's last token, one row per sequence, in float32."""
    rows: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(sequences) for name in names}
    device = device_of(model)
    for batch in batches(sequences, max_tokens=batch_tokens):
        ends = TokenPositions.ends(batch).to(device)

        def reader(name: str, index: tuple[int, ...] = batch.index, ends: TokenPositions = ends) -> NamedHook:
            def read(value: Tensor, hook: Any) -> None:
                for row, vector in zip(index, value[ends.sequence, ends.position].float(), strict=True):
                    rows[name][row] = vector

            return name, read

        with torch.inference_mode():
            run_without_logits(model, batch.tokens.to(device), [reader(name) for name in names])
    stacked = {name: torch.stack(vectors) for name, vectors in rows.items()}
    for name, value in stacked.items():
        if not bool(torch.isfinite(value).all()):
            raise LensError(f"expected finite activations, got NaN or infinity at {name}; check the weights")
    return stacked


def streams_at(
    model: HookedModel, projections: OutputProjections, contexts: list[TokenSequence], batch_tokens: int
) -> Streams:
    """The last residual stream at every context's end, and the scales of the attention outputs there."""
    n_layers = int(model.cfg.n_layers)
    last, outputs = resid_name(n_layers - 1), [projections.hook_name(layer) for layer in range(n_layers)]
    activations = at_last(model, contexts, [last, *(outputs if projections.norms else [])], batch_tokens)
    resid = activations[last]
    if not projections.norms:
        return Streams(resid, torch.ones(len(resid), n_layers, device=resid.device))
    scales = [projections.scale(layer, activations[name]) for layer, name in enumerate(outputs)]
    return Streams(resid, torch.cat(scales, dim=-1))


def difference(logits: Float[Tensor, "*sample choice"]) -> Float[Tensor, "*sample"]:
    """The right answer's logit minus the wrong one's."""
    return logits[..., 0] - logits[..., 1]
