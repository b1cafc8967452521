"""Griffe extension for the site: ``Example:`` sections, and defaults as values."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

_SHOWN = (int, float, str, bool, tuple, type(None))


class Docstrings(griffe.Extension):
    """Read ``Example:`` as a section of examples, and show the value of a default instead of its name."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **context: Any) -> None:
        named = [p for p in func.parameters if isinstance(p.default, griffe.Expr) or str(p.default).isidentifier()]
        if not named or func.parent is None or not func.parent.is_module:
            return
        defaults = inspect.signature(getattr(importlib.import_module(func.parent.path), func.name)).parameters
        for parameter in named:
            if parameter.name in defaults and isinstance(defaults[parameter.name].default, _SHOWN):
                parameter.default = repr(defaults[parameter.name].default)
