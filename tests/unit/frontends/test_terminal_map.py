"""The first picture of a scan: every head's colour in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from plotly.colors import sample_colorscale
from rich.console import Console
from rich.text import Text

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.frontends.cli import show
from lcc_lens.frontends.plotting.theme import SEQUENTIAL
from lcc_lens.frontends.terminal_map import terminal_map


def cells(picture: Text) -> list[list[str]]:
    """The colours of all layers, read from the drawn text."""
    styles = [(span.style.color, span.style.bgcolor) for span in picture.spans if span.style.color is not None]
    n = len(styles) // len([line for line in picture.plain.splitlines() if "▀" in line])
    rows = []
    for start in range(0, len(styles), n):
        inks, grounds = zip(*styles[start : start + n], strict=True)
        rows += [[color.name if color else "" for color in row] for row in (inks, grounds)]
    return [row for row in rows if any(row)]


def test_each_head_has_its_colour_on_the_scale() -> None:
    loss = torch.tensor([[0.0, 0.2], [0.4, 0.1], [0.3, 0.4]])
    picture = terminal_map(loss, [(), (1,), ()], 80)
    assert picture is not None
    expected = [[str(c).replace(" ", "") for c in sample_colorscale(SEQUENTIAL, (row / 0.4).tolist())] for row in loss]
    expected[1][1] = "grey37"
    assert cells(picture) == expected
    assert [line[:2] for line in picture.plain.splitlines()] == ["0 ", "2 ", "  "]
    assert picture.plain.endswith("40 % changed")


def test_heads_without_output_in_the_dense_model_are_darkest() -> None:
    picture = terminal_map(torch.tensor([[0.0, 0.2], [torch.inf, 0.4]]), [(), ()], 80)
    assert picture is not None
    assert cells(picture)[1][0] == cells(picture)[1][1] != cells(picture)[0][1]
    assert picture.plain.endswith("40 % changed")


@pytest.mark.parametrize(("columns", "cell"), [(80, 2), (67, 2), (65, 1), (34, None)])
def test_it_fits_the_width_or_is_left_out(columns: int, cell: int | None) -> None:
    picture = terminal_map(torch.rand(12, 32), [()] * 12, columns)
    if cell is None:
        assert picture is None
    else:
        assert picture is not None
        assert [len(line) for line in picture.plain.splitlines()[:-1]] == [3 + cell * 32] * 6


@pytest.mark.parametrize(("is_terminal", "drawn"), [(True, 1), (False, 0)])
def test_only_a_terminal_gets_it(
    found: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, drawn: int
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    terminal = Console(
        file=out, force_terminal=is_terminal, color_system="truecolor" if is_terminal else None, width=80
    )
    monkeypatch.setattr(show, "console", lambda: terminal)
    page = show.show_loss_map(found, tmp_path)
    out.seek(0)
    assert ("▀" in out.read()) == bool(drawn)
    assert page.stat().st_size > 10_000
