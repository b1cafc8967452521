"""Short views of results: at most 15 lines in a terminal, the same as a small table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json, write_text
from lcc_lens.core.outputs.places import require_file
from lcc_lens.core.text import visible

if TYPE_CHECKING:
    import pandas as pd

#: Lines of a representation, its title included, and characters of a value.
_LINES, _WIDTH = 15, 96
_TABLE_SUFFIXES = (".csv", ".json")
#: How JSON tables and results begin, as they are written here.
_TABLE_STARTS = (b"[", b'{\n  "models"')


class Shown:
    """A result whose representation is its class and a line per fact; never more than 15 lines."""

    def _facts(self) -> dict[str, Any]:
        """What is listed: values by name; the fields of a dataclass if a class says nothing else."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def table(self) -> pd.DataFrame:
        """What the representation lists, as columns ``name`` and ``value``."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["name", "value"])

    def __repr__(self) -> str:
        rows = self._rows()
        width = max((len(name) for name, _ in rows), default=0)
        return visible(
            "\n".join([type(self).__name__, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)])
        )

    def _repr_html_(self) -> str:
        cells = (
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in self._rows()
        )
        return f"<table><caption>{type(self).__name__}</caption>{''.join(cells)}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [(name, described(value)) for name, value in self._facts().items()]
        if len(rows) < _LINES:
            return rows
        return [*rows[: _LINES - 2], ("…", f"{len(rows) - _LINES + 2} more")]


class Record(Shown, dict[str, Any]):
    """A JSON object with a short representation."""

    def _facts(self) -> dict[str, Any]:
        return dict(self)


def described(value: Any) -> str:
    """A value in one line: tensors by their shape, long collections by their size and first items."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif value is None or isinstance(value, int | Path) or hasattr(value, "_fields"):  # a head is its label
        text = str(value)
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    elif isinstance(value, Mapping):
        text = _listed(value, ", ".join(f"{name}: {described(item)}" for name, item in list(value.items())[:8]))
    elif isinstance(value, Sequence | Set):
        text = _listed(value, ", ".join(described(item) for item in list(value)[:8]))
    elif isinstance(value, Shown):
        text = type(value).__name__
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _listed(value: Mapping[Any, Any] | Sequence[Any] | Set[Any], items: str) -> str:
    return items or "none" if len(value) <= 8 and len(items) <= _WIDTH else f"{len(value)}: {items}, …"


def require_table_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before the work, a file that no table can be written to.

    Raises:
        RequestError: the suffix is neither ``.csv`` nor ``.json``, or see
            :func:`~lcc_lens.core.outputs.places.require_file`.
    """
    _require_suffix(path)
    require_file(path, begins=_TABLE_STARTS if path.suffix == ".json" else (b"",), inputs=inputs)


def _require_suffix(path: Path) -> None:
    if path.suffix not in _TABLE_SUFFIXES or path.is_dir():
        got = f"the folder {path}" if path.is_dir() else str(path)
        raise RequestError(f"expected a file ending in {' or '.join(_TABLE_SUFFIXES)}, got {got}; name one")


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV or as a JSON list of rows, by the file's suffix; missing values are empty or null.

    Raises:
        RequestError: another suffix.
    """
    path = Path(path)
    _require_suffix(path)
    if path.suffix == ".csv":
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    else:
        write_json(path, json.loads(table.to_json(orient="records", double_precision=15)))
