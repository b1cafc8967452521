"""Check the inputs of a scan before any forward pass: sequences, their length, and the selectors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from lcc_lens.analysis.causes.division import causes_refusal
from lcc_lens.analysis.selectors.evidence import ScoreSettings
from lcc_lens.analysis.selectors.linear_probe import MIN_PAIRS
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED, SCORED_BY_DEFAULT
from lcc_lens.analysis.selectors.registry import named_selector
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data, encode
from lcc_lens.data.labels import ONE_CLASS, encode_answers, one_class
from lcc_lens.models.hooked.activations import Positions, sampled_positions
from lcc_lens.models.hooked.weights import is_changed
from lcc_lens.models.pair import OneAtATime, Pair

logger = logging.getLogger(__name__)

_DEFAULT_LENGTH = 512


def pair_sequences(
    data: Data, pair: Pair, length: int, limit: int | None
) -> tuple[list[TokenSequence], tuple[TokenSequence, ...] | None]:
    """The sequences to scan, with the wrong answers of contrastive pairs (None without).

    Answers are cut at ``length`` tokens; pairs that no longer differ then are skipped.
    """
    if any(example.wrong is None for example in data.examples):
        return encode(data, pair.tokenizer, max_length=length, limit=limit), None
    encoded = encode_answers(data, pair.tokenizer, length, limit)
    fitting = [p for p in encoded if p is not None and not torch.equal(p[0].tokens, p[1].tokens)]
    if len(fitting) < len(encoded):
        logger.warning(
            "skipped %d of %d pairs longer than %d tokens", len(encoded) - len(fitting), len(encoded), length
        )
    if not fitting:
        raise RequestError(_no_pairs(data, pair, length, limit))
    return [right for right, _ in fitting], tuple(wrong for _, wrong in fitting)


def _no_pairs(data: Data, pair: Pair, length: int, limit: int | None) -> str:
    """The error message if no pair fits the limit, with the length of the shortest one."""
    pairs = encode_answers(data, pair.tokenizer, sys.maxsize, limit)
    lengths = [max(map(len, answers)) for answers in pairs if answers is not None]
    shortest = f" (shortest: {min(lengths)})" if lengths else ""
    return (
        f"no contrastive pairs of at most {length} tokens in {data.name}{shortest}; "
        "raise --max-length, or name other data with --scan-data"
    )


def check_plan(
    sequences: Sequence[TokenSequence],
    positions: Positions,
    settings: ScoreSettings,
    selectors: Sequence[str],
    d_head: int,
) -> None:
    """Refuse positions that hardly any sequence has, and probes that the pairs or the heads cannot have.

    Args:
        sequences: what is scanned; where probes are scored, the right answers of the pairs.
        selectors: what is scored; ``d_head``: the heads' width.
    """
    n = sum(len(sampled_positions(sequence, positions)) for sequence in sequences)
    if n < 2:
        longest = max(map(len, sequences))
        raise RequestError(
            f"expected at least 2 positions to compare, got {n}; scan more examples, or other positions (the longest "
            f"example has {longest} tokens)"
        )
    if "probe" in selectors and settings.folds is not None and settings.folds > len(sequences):
        raise RequestError(
            f"expected at most {len(sequences)} folds (the number of pairs), got {settings.folds}; scan more examples"
        )
    if settings.rank > d_head and not {"probe", "interaction"}.isdisjoint(selectors):
        raise RequestError(f"expected a probe rank of at most d_head = {d_head}, got {settings.rank}; lower it")


def possible_selectors(
    named: Sequence[str] | None, pair: Pair, data: Data, n_examples: int, wrong: Sequence[TokenSequence] | None
) -> list[str]:
    """The selectors to compute, by default those that the inputs allow; refuses a named one whose needs are not met.

    Args:
        n_examples: on which selectors run the models again.
    """
    names = [name for name in (SCORED_BY_DEFAULT if named is None else named) if name not in ALWAYS_SCORED]
    on_pairs = _with_need(names, "pairs")
    reason, label = None, one_class(data)
    if wrong is None:
        reason = f"expected questions with right and wrong answers, got none in {data.name}; scan other data"
    elif len(wrong) < MIN_PAIRS:
        reason = f"expected at least {MIN_PAIRS} pairs, got {len(wrong)}; scan more examples"
    elif label is not None:
        reason = ONE_CLASS.format(label=label, n=len(data))
    if reason is not None and on_pairs:
        if named is not None:
            raise RequestError(reason)
        if wrong is not None:
            logger.warning("no probe scores: %s", reason)
        names = [name for name in names if name not in on_pairs]
    if pair.one_at_a_time and named is not None:
        check_in_memory(named)
    if _with_need(names, "causes") and (refusal := causes_refusal(pair)) is not None:
        raise RequestError(refusal)
    on_gradients = _with_need(names, "gradients") if n_examples < 2 else []
    if named is not None and on_gradients:
        raise RequestError(
            f"expected at least 2 examples for {', '.join(on_gradients)}, got {n_examples}; raise --selector-examples "
            "(or --examples)"
        )
    on_models = _with_need(names, "models") if named is None and pair.one_at_a_time else []
    return [name for name in names if name not in (*on_gradients, *on_models)]


def has_changed_models(pair: Pair) -> bool:
    """Whether hooks or changed weights act on a model in memory, which then is not its checkpoint's; loads none."""
    models = pair.models
    loaded = (models.in_memory,) if isinstance(models, OneAtATime) else (models.dense, models.pruned)
    return any(map(is_changed, loaded))


def wants_causes(requested: bool, selectors: Sequence[str], pair: Pair) -> bool:
    """Whether to find the causes of differences; warns where they are requested but cannot be found."""
    if not requested:
        return bool(_with_need(selectors, "causes"))
    refusal = causes_refusal(pair)
    if refusal is not None:
        logger.warning("no causes: %s", refusal)
    return refusal is None


def check_in_memory(names: Sequence[str]) -> None:
    """Refuse selectors that run both models where only one fits into memory.

    Raises:
        RequestError: names them, and the selectors that serve.
    """
    both = ", ".join(_with_need(names, "models"))
    if both:
        raise RequestError(
            f"expected both models in memory for {both}, got one at a time; load both, or choose mse or probe"
        )


def _with_need(names: Sequence[str], need: str) -> list[str]:
    return [name for name in names if need in named_selector(name).needs]
