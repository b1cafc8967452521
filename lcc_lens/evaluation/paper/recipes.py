"""Recipes of the paper's tables, read from JSON: what to prune, what to compare, and the paper's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.models.architecture.sparsity_patterns import Unstructured, parse_pattern
from lcc_lens.pruning.methods.settings import PruneConfig

Status = Literal["not run at size", "run at size"]
#: Rows of a table that need no training.
UNRESTORED = ("dense", "pruned")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table: its name there, our entry for it, and the paper's figures.

    ``entry`` is ``dense``, ``pruned`` or an entry of a comparison (see
    :class:`~lcc_lens.evaluation.comparison.entry.Entry`); None if the recipe leaves the row out. ``accuracy`` is the
    mean over tasks in per cent. Accuracy and perplexity are None if the paper has no such row.
    """

    name: str
    entry: str | None
    accuracy: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class PruneStep:
    """How a recipe prunes; see :func:`~lcc_lens.pruning.jobs.prune`."""

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    calibration: str = "c4"
    n_samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    sliced: bool = False

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise RequestError(
                f"expected a sparsity or a pattern to prune to, got {self.sparsity} and {self.pattern}; name one"
            )
        pattern = parse_pattern(self.pattern) if self.pattern else Unstructured(self.sparsity or 0.0)
        PruneConfig(self.method, pattern, sliced=self.sliced)  # refuses settings that contradict each other


@dataclass(frozen=True)
class PaperRecipe:
    """A group of rows of the paper's tables and how to reproduce them.

    ``data`` are the sets that restorations train on, with one comparison for each. ``compare`` are the settings that
    these share; without ``tasks`` each comparison measures the task that it trains on. ``status`` says whether the
    recipe has ever been run with ``model``.
    """

    title: str
    paper: str
    status: Status
    note: str
    model: str
    prune: PruneStep
    data: tuple[str, ...]
    seeds: int
    rows: tuple[PaperRow, ...]
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        if not self.data or self.seeds < 1 or not self.entries:
            raise RequestError(f"expected data, a seed and a row to train in {self.title!r}, got none; add some")
        for entry in self.entries:
            Entry.parse(entry)

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the comparison."""
        return tuple(dict.fromkeys(row.entry for row in self.rows if row.entry and row.entry not in UNRESTORED))

    @property
    def is_of_tasks(self) -> bool:
        """Whether each comparison measures the task that it trains on."""
        return not self.compare.tasks

    def comparison(self, data: str) -> CompareConfig:
        """The settings of the comparison that trains on one data set."""
        return replace(self.compare, data=data, tasks=self.compare.tasks or (data,))


def read_recipe(path: str | Path) -> PaperRecipe:
    """Read a recipe.

    Raises:
        RequestError: no such file, an unknown or missing key, or a value of another type; names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"expected a recipe, got {path}, which is no file; name one of recipes/*.json")
    return _build(PaperRecipe, read_json(path), str(path))


def dry(recipe: PaperRecipe) -> PaperRecipe:
    """The same recipe with as little data as its steps take, to try whether they run; the results mean nothing."""
    config = replace(
        recipe.compare, examples=8, validation=2, responses=2, blocks=2, block_length=32, limit=4, max_length=384,
        scan_examples=16, batch_size=8, epochs=1, low_rank=2, lora_rank=2, refit_samples=3,
        speed_rounds=2,
    )  # fmt: skip
    return replace(recipe, prune=replace(recipe.prune, n_samples=16, seq_len=64), seeds=1, compare=config)


def _build(kind: type[_T], values: Any, where: str) -> _T:
    """A dataclass from a JSON object, with every field checked against its type."""
    if not isinstance(values, Mapping):
        raise RequestError(f"expected an object with fields in the {where}, got {values!r}; correct it")
    fields = {known.name: known for known in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise RequestError(f"expected {', '.join(fields)} in the {where}, got {unknown[0]!r} too; correct the name")
    missing = [
        n for n, f in fields.items() if n not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise RequestError(f"expected {missing[0]!r} in the {where}, got none; add it")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(value, hints[name], name, where) for name, value in values.items()})


def _typed(value: Any, hint: Any, name: str, where: str) -> Any:
    """A JSON value as its field's type: lists become tuples, objects dataclasses, and integers floats if need be."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        kind, args = get_origin(option) or option, get_args(option)
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return _build(option, value, f"{name} of {where}")
        if kind is tuple and isinstance(value, list):
            if isinstance(args[0], type) and dataclasses.is_dataclass(args[0]):
                return tuple(_build(args[0], item, f"{name[:-1]} {n} of {where}") for n, item in enumerate(value, 1))
            if all(type(item) is args[0] for item in value):
                return tuple(value)
        elif kind is float and type(value) is int:
            return float(value)
        elif value in args if kind is Literal else type(value) is kind:
            return value
    expected = " or ".join(map(_type_name, options))
    raise RequestError(f"expected {expected} for {name!r} in the {where}, got {value!r}; correct it")


def _type_name(option: Any) -> str:
    """A type as a recipe's author knows it."""
    args = get_args(option)
    if get_origin(option) is Literal:
        return ", ".join(map(str, args))
    if get_origin(option) is tuple:
        return f"a list of {'objects' if dataclasses.is_dataclass(args[0]) else args[0].__name__}"
    return str(getattr(option, "__name__", option))
