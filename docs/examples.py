"""Docstrings say ``Example:`` where griffe reads code from ``Examples:`` only."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Read ``Example:`` as the section of examples that it is."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
