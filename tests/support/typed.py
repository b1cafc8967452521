"""Check the types and shapes of every call into the package, in tests only: users pay nothing for it.

As ``--jaxtyping-packages`` does, at half its cost: a function without shapes gets beartype's check alone, and a
function inside another one, which would be decorated anew at each call, gets none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

from beartype import beartype
from jaxtyping import jaxtyped

PACKAGE = "lcc_lens"
_SHAPES = {"Bool", "Float", "Int", "Num", "Shaped", "UInt8"}
_IMPORTS = ast.parse(
    f"from {__name__} import types_checked as checked_by_tests, types_and_shapes_checked as shapes_checked_by_tests"
).body


def check_types() -> None:
    """Check every module of the package that is imported from now on."""
    if any(name.partition(".")[0] == PACKAGE for name in sys.modules):
        raise RuntimeError(f"expected to check {PACKAGE} before it is imported")
    sys.meta_path.insert(0, _Finder())


types_and_shapes_checked = jaxtyped(typechecker=beartype)


def types_checked(function: Any) -> Any:
    """Check the types of a call; a name that is imported for the type checker alone counts as no annotation."""
    hints = function.__annotations__
    known = {}
    for name, hint in hints.items():
        with suppress(NameError):
            known[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
    function.__annotations__ = known
    checked = beartype(function)
    checked.__annotations__ = function.__annotations__ = hints
    return checked


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        kept_apart = partial(cache_from_source, optimization="typed2")
        with mock.patch("importlib._bootstrap_external.cache_from_source", kept_apart):
            return super().get_code(fullname)

    def source_to_code(self, data: Any, path: Any, *args: Any, _optimize: int = -1) -> CodeType:
        tree = ast.parse(data, path)
        _decorate(tree)
        n_before = sum(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        n_before += ast.get_docstring(tree) is not None
        tree.body[n_before:n_before] = _IMPORTS
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


def _decorate(parent: ast.Module | ast.ClassDef) -> None:
    """Add a checking decorator to the functions, methods and dataclasses of a module or class."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            node.decorator_list.insert(0, _decorator("shapes_checked_by_tests", node))
            _decorate(node)
        elif isinstance(node, ast.FunctionDef):
            hints = [node.args, *([node.returns] if node.returns else [])]
            names = {part.id for hint in hints for part in ast.walk(hint) if isinstance(part, ast.Name)}
            node.decorator_list.append(
                _decorator("shapes_checked_by_tests" if names & _SHAPES else "checked_by_tests", node)
            )


def _decorator(code: str, node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.parse(code, mode="eval").body, node)
