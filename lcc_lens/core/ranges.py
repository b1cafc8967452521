"""Ranges of numbers, named once beside each setting and option, and checked for Python and the command line alike.

Functions also check here that a result of this package is one, such as a scan and not its folder.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from lcc_lens.core.errors import RequestError

_LARGEST = 2**32
#: What is checked of a type with parameters: that there are several, or that it can be called.
_GENERIC: Mapping[Any, Any] = {Sequence: Sequence, Iterable: Sequence, Collection: Sequence, Callable: Callable}
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``.

    Args:
        least: the smallest number.
        most: the largest one.
        above: leave out ``least`` itself.
        below: leave out ``most`` itself.

    Example:
        >>> str(Range(0, 1, above=True)), str(Range(1))
        ('above 0 and at most 1', 'of at least 1')
    """

    least: int | float
    most: int | float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        if self.least == -math.inf:
            return "of a finite size"
        low = f"{'above' if self.above else 'of at least'} {self.least}"
        return low if self.most == math.inf else f"{low} and {'below' if self.below else 'at most'} {self.most}"

    def __contains__(self, number: int | float) -> bool:
        is_inside = self.least < number if self.above else self.least <= number
        return is_inside and number < math.inf and (number < self.most or (number == self.most and not self.below))

    def require(self, name: str, number: Any) -> None:
        """Refuse a number outside the range; None, for a default that is chosen later, is inside.

        Raises:
            RequestError: says the range, and how to write a percentage as a fraction.
        """
        if number is None or (_is_number(number) and number in self):
            return
        shown = f"{number:g}" if isinstance(number, float) else repr(number)
        is_percentage = self.most == 1 and _is_number(number) and 1 < number <= 100
        advice = f"write {float(number) / 100:g} for {shown} %" if is_percentage else "choose another number"
        raise RequestError(f"expected {name} {self}, got {shown}; {advice}")


#: How many of something there are, at least one.
Count = Annotated[int, Range(1)]
#: How many of something there are, perhaps none.
Natural = Annotated[int, Range(0)]
#: Tokens of a sequence: one to read and one to predict.
Length = Annotated[int, Range(2)]
#: What every generator of random numbers takes.
Seed = Annotated[int, Range(0, 2**32, below=True)]
#: A fraction of which something must be there.
Share = Annotated[float, Range(0, 1, above=True)]
Fraction = Annotated[float, Range(0, 1)]
#: A fraction of the weights to remove.
Sparsity = Annotated[float, Range(0, 1, above=True, below=True)]
Positive = Annotated[float, Range(0, above=True)]
#: Any number that is one.
Finite = Annotated[float, Range(-math.inf, above=True)]
#: A learning rate; far larger ones overflow.
Rate = Annotated[float, Range(0, 1000, above=True)]


def check_numbers(settings: Any, spell: Callable[[str], str] = str) -> None:
    """Refuse a number outside the range that its field's type names; groups of settings are checked too.

    Args:
        settings: a dataclass, such as ``TrainConfig`` or a subcommand.
        spell: how a field is called in the message.

    Raises:
        RequestError: names the field and its range.
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for value in values.values():
        if is_dataclass(value) and not isinstance(value, type):
            check_numbers(value, spell)
    kind: Any = type(settings)
    _check(ranges_of(kind), values, spell)


def check_number(name: str, value: Any, kind: Any) -> None:
    """Refuse a number outside the range that a type such as :data:`Count` names.

    Raises:
        RequestError: names the number and its range.
    """
    found = _range_in(kind)
    _check({} if found is None else {name: found}, {name: value}, str)


def ranged(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check what a function is called with, before it does anything; its parameters' types say what it takes.

    Numbers have to lie in the ranges that they name. Texts have to be strings, functions callable, several of something
    no single name, and results of this package, such as a scan, have to be one: a folder in their place is refused, and
    the message says what makes one.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs).arguments
        for name, kinds in _kinds_of(function).items():
            if name in given:
                _require_kind(name, given[name], kinds)
        _check(ranges_of(function), given, str)
        return function(*args, **kwargs)

    return checked


def _require_kind(name: str, value: Any, kinds: Sequence[Any]) -> None:
    """Refuse a value of none of the kinds: texts, paths, functions, results of this package, several of anything."""
    several = Sequence in kinds
    classes = tuple(os.PathLike if kind is Path else kind for kind in kinds if kind is not Sequence)
    is_name = isinstance(value, str | Path)
    if isinstance(value, classes) or (several and not is_name and isinstance(value, Iterable)):
        return
    got = repr(str(value)) if is_name else f"a value of type {type(value).__name__}"
    names = {str: "name" if Path in kinds else "text", Path: "path", Sequence: "list", Callable: "function"}
    expected = " or a ".join(names.get(kind, getattr(kind, "__name__", "")) for kind in kinds if kind is not NoneType)
    makers = [kind.made_by for kind in kinds if hasattr(kind, "made_by")]
    others = f"[{got}]" if several and is_name else "a list" if several else "a string" if str in kinds else "one"
    article = "an" if expected[0] in "AEIOU" else "a"
    raise RequestError(f"expected {article} {expected} for {name}, got {got}; pass {makers[0] if makers else others}")


@functools.cache
def _kinds_of(function: Callable[..., Any]) -> Mapping[str, tuple[Any, ...]]:
    """By parameter that takes such kinds alone, which of them; see :func:`_require_kind`."""
    found = {}
    for name, hint in _hints_of(function).items():
        is_union = get_origin(hint) in (Union, UnionType)
        parts = get_args(hint) if is_union else (hint,)
        kinds = tuple(_GENERIC.get(get_origin(part), part) for part in parts)
        if all(kind in (str, Path, Sequence, Callable, NoneType) or hasattr(kind, "made_by") for kind in kinds):
            found[name] = kinds
    return found


def _hints_of(declared: Any) -> Mapping[str, Any]:
    """The types of a dataclass's fields or a function's parameters, without those that only type checkers import."""
    if isinstance(declared, type):
        return get_type_hints(declared, include_extras=True)
    known, found = vars(sys.modules[declared.__module__]), dict[str, Any]()
    for name, written in declared.__annotations__.items():
        with suppress(NameError):
            found |= get_type_hints(SimpleNamespace(__annotations__={name: written}), known, include_extras=True)
    return found


@functools.cache
def ranges_of(declared: Any) -> Mapping[str, tuple[type, Range]]:
    """The type and range of every number that a dataclass's fields or a function's parameters declare."""
    hints = _hints_of(declared)
    return {name: found for name, hint in hints.items() if (found := _range_in(hint)) is not None}


def _range_in(hint: Any) -> tuple[type, Range] | None:
    """The type and the range that a hint names, at any depth."""
    own = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range))
    found = next(((get_args(hint)[0], part) for part in own), None)
    return found or next((deeper for part in get_args(hint) if (deeper := _range_in(part)) is not None), None)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _check(ranges: Mapping[str, tuple[type, Range]], values: Mapping[str, Any], spell: Callable[[str], str]) -> None:
    for name, (kind, allowed) in ranges.items():
        value = values.get(name)
        if kind is int and _is_number(value) and not isinstance(value, Integral):
            raise RequestError(f"expected a whole number for {spell(name)}, got {value}; round it")
        allowed.require(spell(name), value)
        if kind is int and value is not None and value > _LARGEST:
            raise RequestError(f"expected {spell(name)} of at most {_LARGEST}, got a larger number; lower it")
