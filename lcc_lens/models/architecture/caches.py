"""The cache of keys and values in calls of transformers' models, which transformers 5.24 gave another name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

#: The name of the cache before transformers 5.24.
PAST = "past_key_values"


def cache_name(compute: Callable[..., Any]) -> str:
    """The name by which a model's ``forward`` takes a cache; its ``generate`` takes it by the same."""
    return "cache" if "cache" in inspect.signature(compute).parameters else PAST


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    return output.cache if hasattr(output, "cache") else getattr(output, PAST, None)
