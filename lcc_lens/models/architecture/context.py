"""How many tokens a model reads at most, and the length of sequences that fits it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lcc_lens.core.errors import RequestError

logger = logging.getLogger(__name__)
#: Tokens per sequence where nobody asks for another number.
DEFAULT_LENGTH = 512
#: What architectures call the number of their positions.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
#: Rotary embeddings that depend on the longest sequence of a batch once it passes the original context.
_BY_LENGTH = ("longrope", "dynamic", "su")
#: What they call the window of local attention.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


def context_of(config: Any) -> int | None:
    """The tokens that a model reads at most, by its configuration; None where any number will do (ALiBi).

    Rotary embeddings whose scaling depends on the length (longrope, dynamic) count up to their original context: beyond
    it, a sequence's result would depend on its neighbours in the batch and on the key-value cache.

    Raises:
        RequestError: the configuration names fewer positions than a token to read and one to predict.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _NAMES]
    for rope in _rope_parameters(text):
        if (rope.get("rope_type") or rope.get("type")) in _BY_LENGTH:
            limits += [rope.get("original_max_position_embeddings"), _original(text)]
    known = [limit for limit in limits if isinstance(limit, int)]
    if known and min(known) < 2:
        raise RequestError(f"expected a model of at least 2 positions, got {min(known)} in config.json; correct it")
    return min(known) if known else None


def attention_window(config: Any) -> float:
    """The smallest window of a layer's attention in tokens, by the configuration; infinite without local attention."""
    text = getattr(config, "text_config", config)
    windows = [getattr(text, name, None) for name in _WINDOWS]
    return min((float(window) for window in windows if window), default=float("inf"))


def fitting_length(
    asked: int | None, context: int | None, *, default: int = DEFAULT_LENGTH, option: str = "--max-length"
) -> int:
    """The tokens per sequence: what was asked for (by ``option``), or the default, cut to the context and said so.

    Raises:
        RequestError: more was asked for than the context.
    """
    length = default if asked is None else asked
    if context is None or length <= context:
        return length
    if asked is not None:
        raise RequestError(
            f"expected a limit within the models' context of {context} tokens, got {asked}; lower {option}"
        )
    logger.warning("sequences of %d tokens, the model's context (%d by default)", context, default)
    return context


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings, of every kind of layer where they differ."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, Mapping):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, Mapping))


def _original(config: Any) -> Any:
    return getattr(config, "original_max_position_embeddings", None)
