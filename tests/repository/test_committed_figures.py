"""The committed figures are of the committed measurements, and every PNG is of the JSON beside it.

The JSON is compared exactly: it is text with rounded numbers. A PNG is compared by the hash that it holds of its
figure, since the pixels of two machines differ with their fonts.
"""

from __future__ import annotations

import importlib.util

import plotly.io
import pytest
from support.places import ROOT

from lcc_lens.frontends.plotting.writing import drawn_from, figure_json, figure_sha256

FIGURES = ROOT / "figures"


@pytest.mark.slow
def test_figures_are_rebuilt_from_the_measurements() -> None:
    spec = importlib.util.spec_from_file_location("make", FIGURES / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    figures, lacking = make.measured()
    assert len(figures) + len(lacking) == len(make.SOURCES)
    assert set(figures) >= {"selector_study", "comparison", "report", "recovery_by_heads"}
    for name, figure in figures.items():
        assert figure_json(figure) == (FIGURES / f"{name}.json").read_text(), f"{name} is old: make figures"


def test_every_png_shows_the_figure_beside_it() -> None:
    names = {path.stem for path in FIGURES.glob("*.json")}
    assert names == {path.stem for path in FIGURES.glob("*.png")}
    assert names >= {"loss_map", "selectors", "spectra", "logit_gain", "promoted_tokens", "training"}
    for name in names:
        figure = plotly.io.read_json(FIGURES / f"{name}.json")
        assert drawn_from(FIGURES / f"{name}.png") == figure_sha256(figure), f"{name}.png is old: make figures"
        assert figure.layout.width in (420, 852)
