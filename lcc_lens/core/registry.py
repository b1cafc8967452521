"""Registries of selectors, pruners, methods and data sets, which users extend at run time or with entry points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from lcc_lens.core.errors import RequestError

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name, as a message says it: the closest known one, if one is close."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else "choose one of these"


class Registry(Mapping[str, T], Generic[T]):
    """Named entries of one kind: from this package, from installed plug-ins, and registered at run time.

    An installed package adds an entry with an entry point of the group ``lcc_lens.<kind>s``, which is imported when the
    entry is first used.

    Args:
        kind: what messages call an entry, such as ``selector``.
        builtin: the package's own entries, in the order in which they are listed.
        lazy: further entries of the package as ``module:attribute``, imported when they are first used; for entries
            that are defined in a later folder than the registry.

    Example:
        >>> colours = Registry("colour", {"red": 0xFF0000})
        >>> colours.register("green", 0x00FF00)
        >>> sorted(colours)
        ['green', 'red']
    """

    def __init__(self, kind: str, builtin: Mapping[str, T], lazy: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = dict(builtin)
        self._lazy = {name: EntryPoint(name, value, kind) for name, value in (lazy or {}).items()}
        self._own = (*builtin, *self._lazy)
        self._plugins: dict[str, EntryPoint] | None = None

    def register(self, name: str, entry: T, *, replace: bool = False) -> None:
        """Add an entry.

        Args:
            name: lower-case letters, digits, ``-`` and ``_``.
        """
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"expected a {self.kind} name of lower-case letters, digits, - and _, got {name!r}; rename it"
            )
        if name in self and not replace:
            raise RequestError(f"expected a new {self.kind} name, got {name!r}, which is taken; pass replace=True")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """The entry of a name."""
        if name not in self._entries and name in self._entry_points():
            return cast("T", self._entry_points()[name].load())
        if name not in self._entries:
            raise RequestError(f"expected a {self.kind} ({', '.join(self)}), got {name!r}; {nearest(name, self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *self._entries, *self._entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _entry_points(self) -> dict[str, EntryPoint]:
        """The entries that are imported when first used: lazy ones, and entry points of installed packages."""
        if self._plugins is None:
            installed = {point.name: point for point in entry_points(group=f"lcc_lens.{self.kind}s")}
            self._plugins = {**self._lazy, **{name: p for name, p in installed.items() if name not in self._lazy}}
        return self._plugins
