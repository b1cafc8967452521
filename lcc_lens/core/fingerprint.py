"""Hash everything that decides a result, to tell whether two requests are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def fingerprint(*parts: Any) -> str:
    """Hash what decides a result, so that only the same request resumes or reuses finished work.

    Args:
        *parts: JSON values, dataclasses, paths, sets, mappings, tensors; anything else is hashed by its ``str``.

    Returns:
        The SHA-256 of the parts as canonical JSON, in hexadecimal.

    Example:
        >>> fingerprint({"seed": 0, "rank": 8}) == fingerprint({"rank": 8, "seed": 0})
        True
    """
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(str(item) for item in value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if hasattr(value, "detach"):  # a tensor: its type, shape and bytes
        import torch

        array = value.detach().cpu().contiguous()
        content = array.reshape(-1).view(torch.uint8).numpy()
        return [str(array.dtype), list(array.shape), hashlib.sha256(content).hexdigest()]
    return value.as_posix() if isinstance(value, Path) else str(value)
