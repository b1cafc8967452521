"""After a restoration one line names what the committed study puts first."""

from __future__ import annotations

import json

import pytest
from support.places import ROOT

from lcc_lens.restoration.advice import RECOVERED, better_method


def test_the_figures_are_those_of_the_committed_study() -> None:
    study = json.loads((ROOT / "benchmarks" / "restorations_wanda50.json").read_text())
    rows = {row["entry"]: row for row in study["summary"]}
    best = "refit+low-rank:text+distillation=0.005"
    assert max(rows, key=lambda entry: rows[entry]["recovered"] or 0) == best
    for name, entry in (("lcc", "lcc"), ("best", best)):
        assert RECOVERED[name] == pytest.approx(100 * rows[entry]["recovered"], abs=0.05)


def test_it_is_said_after_any_other_method() -> None:
    assert "--method best recovers most in the committed study: 66 %" in str(better_method("lcc"))
    assert better_method("best") is None
