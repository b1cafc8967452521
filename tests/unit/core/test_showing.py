"""Representations are short whatever a result holds, and tables are written as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import HeadList, HeadTuple, all_heads
from lcc_lens.core.showing import Record, Shown, described, write_table


@dataclass(frozen=True, repr=False)
class Result(Shown):
    weights: torch.Tensor
    names: tuple[str, ...]
    note: str = "<b>\n bold"


def test_values_take_one_line_each() -> None:
    text = repr(Result(torch.zeros(30, 9, 64), tuple(f"layer {i}" for i in range(500))))
    assert text.splitlines() == [
        "Result",
        "  weights  float32 [30, 9, 64]",
        "  names    500: layer 0, layer 1, layer 2, layer 3, layer 4, layer 5, layer 6, layer 7, …",
        "  note     <b> bold",
    ]
    assert described("x" * 1000) == "x" * 95 + "…"
    assert described({}) == "none"


def test_a_notebook_shows_the_same_as_text_not_markup() -> None:
    page = Result(torch.zeros(2), ())._repr_html_()
    assert "float32 [2]" in page
    assert "&lt;b&gt; bold" in page
    assert "<b>" not in page


def test_no_more_than_15_lines() -> None:
    record = Record({f"entry {i}": i for i in range(40)})
    assert len(repr(record).splitlines()) == 15
    assert repr(record).endswith("27 more")
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("kind", [HeadList, HeadTuple])
def test_heads_are_shown_by_label_and_stay_what_they_are(kind: type) -> None:
    heads = all_heads(30, 9)
    shown = kind(heads)
    assert list(shown) == heads
    assert shown == (heads if kind is HeadList else tuple(heads))
    assert len(repr(shown).splitlines()) <= 15
    assert "270 heads  L0H0 L0H1" in repr(shown)
    assert list(shown.table()["label"][:2]) == ["L0H0", "L0H1"]
    assert "none" in repr(kind())


def test_tables_are_written_by_suffix(tmp_path: Path) -> None:
    table = pd.DataFrame({"head": ["L0H1", "L2H0"], "loss": [0.25, None]})
    write_table(tmp_path / "a.csv", table)
    write_table(tmp_path / "a.json", table)
    assert (tmp_path / "a.csv").read_text() == "head,loss\nL0H1,0.25\nL2H0,\n"
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows == [{"head": "L0H1", "loss": 0.25}, {"head": "L2H0", "loss": None}]
    with pytest.raises(RequestError, match=r"expected a file ending in \.csv or \.json, got .*a\.xlsx; name one"):
        write_table(tmp_path / "a.xlsx", table)
