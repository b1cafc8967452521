"""Recipes of the paper's tables: what to prune, what to compare and what the paper found, read from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_json
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.models.architecture.sparsity_patterns import Unstructured, parse_pattern
from lcc_lens.pruning.methods.settings import Method, PruneConfig

Status = Literal["not run at size", "run at size"]
#: Rows of a table that no training makes.
BARE = ("dense", "pruned")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table: its name there, the entry that makes it here, and the paper's figures.

    ``entry`` is ``dense``, ``pruned`` or a line of a comparison (see
    :class:`~lcc_lens.evaluation.comparison.entry.Entry`); None where the
    recipe does not make the row. ``accuracy`` is the mean over tasks in per cent; both are None where the paper has no
    such row.
    """

    name: str
    entry: str | None
    accuracy: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class PruneStep:
    """How a recipe prunes; see :func:`~lcc_lens.pruning.jobs.prune`."""

    method: Method
    sparsity: float | None = None
    pattern: str | None = None
    calibration: str = "c4"
    n_samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    sliced: bool = False

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise RequestError(f"expected a sparsity or a pattern to prune to, got {self.sparsity} and {self.pattern}")
        pattern = parse_pattern(self.pattern) if self.pattern else Unstructured(self.sparsity or 0.0)
        PruneConfig(self.method, pattern, sliced=self.sliced)  # refuses what does not go together


@dataclass(frozen=True)
class PaperRecipe:
    """A group of rows of the paper's tables, as one job.

    ``data`` are what restorations train on, one comparison each. ``compare`` holds what these share; without ``tasks``
    each comparison measures the task that it trains on. ``status`` says whether these numbers have ever been made
    with the model that is named.
    """

    title: str
    paper: str
    status: Status
    note: str
    model: str
    prune: PruneStep
    data: tuple[str, ...]
    seeds: int
    compare: CompareConfig
    rows: tuple[PaperRow, ...]

    def __post_init__(self) -> None:
        if not self.data or self.seeds < 1 or not self.entries:
            raise RequestError(f"expected data, a seed and a row to train in {self.title!r}, got none; add some")
        for entry in self.entries:
            Entry.parse(entry)

    @property
    def entries(self) -> tuple[str, ...]:
        """The lines of the comparison."""
        return tuple(dict.fromkeys(row.entry for row in self.rows if row.entry and row.entry not in BARE))

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
        RequestError: no such file, an unknown key, a missing one, or a value that does not go; names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"expected a recipe, got {path}, which is no file; name one of recipes/*.json")
    values = dict(_mapping(read_json(path), str(path)))
    for key, part in (("prune", PruneStep), ("compare", CompareConfig)):
        values[key] = _build(part, values.get(key, {}), f"{key} of {path}")
    rows = values.get("rows")
    if not isinstance(rows, Sequence):
        raise RequestError(f"expected a list of rows in {path}, got {rows!r}")
    values["rows"] = tuple(_build(PaperRow, row, f"row {n} of {path}") for n, row in enumerate(rows, 1))
    return _build(PaperRecipe, values, str(path))


def dry(recipe: PaperRecipe) -> PaperRecipe:
    """The same job with the least data that every step takes: whether it runs, not what comes of it."""
    config = replace(
        recipe.compare, examples=8, validation=2, responses=2, blocks=2, block_length=32, limit=4, max_length=384,
        scan_examples=16, batch_size=8, epochs=1, low_rank=2, lora_rank=2, refit_samples=3,
        speed_rounds=2,
    )  # fmt: skip
    return replace(recipe, prune=replace(recipe.prune, n_samples=16, seq_len=64), seeds=1, compare=config)


def _build(kind: type[_T], values: Any, where: str) -> _T:
    """A frozen dataclass of a JSON object; lists become tuples."""
    given = _mapping(values, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise RequestError(f"expected {', '.join(fields)} in the {where}, got {unknown[0]!r} too; correct the name")
    absent = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in given and f.default is absent and f.default_factory is absent]
    if missing:
        raise RequestError(f"expected {missing[0]!r} in the {where}, got none; add it")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(value, hints[name], f"{name!r} in the {where}") for name, value in given.items()})


def _typed(value: Any, hint: Any, what: str) -> Any:
    """A value of JSON as what a field takes: lists become tuples, whole numbers may stand for others."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    value = tuple(value) if isinstance(value, list) else value
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if get_origin(option) is tuple and isinstance(value, tuple):
            if all(isinstance(item, get_args(option)[0]) for item in value):
                return value
        elif isinstance(option, type) and type(value) is option:
            return value
    wanted = [
        ", ".join(map(str, get_args(o))) if get_origin(o) is Literal else getattr(o, "__name__", o) for o in options
    ]
    raise RequestError(f"expected {' or '.join(map(str, wanted))} for {what}, got {value!r}")


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise RequestError(f"expected an object with fields in the {where}, got {values!r}")
    return values
