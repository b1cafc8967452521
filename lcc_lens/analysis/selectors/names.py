"""The names of the selectors."""

from __future__ import annotations

from typing import Literal, get_args

SelectorName = Literal["probe", "interaction", "attribution", "patching", "mse", "kl", "gradient", "random"]
SELECTORS: tuple[str, ...] = get_args(SelectorName)
