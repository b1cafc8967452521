"""After a restoration one line names what the committed study puts first."""

from __future__ import annotations

import json

import pytest
from support.places import ROOT

from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.restoration.advice import RECOVERED, better_method


def test_the_figures_are_those_of_the_committed_study() -> None:
    files = [ROOT / "benchmarks" / f"domains_mix_51k{steps}.json" for steps in ("", "_batch2")]
    studies = [json.loads(file.read_text())["summary"] for file in files]
    rows = sorted((row for study in studies for row in study), key=lambda row: row["recovered_mean"])
    assert Entry.parse(rows[-1]["entry"]).trains_like(Entry.parse("best"))
    lora = next(row for row in reversed(rows) if row["entry"].startswith("lora"))
    assert Entry.parse(lora["entry"]).method == "lora-all"
    measured = {"best": 100 * rows[-1]["recovered_mean"], "lora-all": 100 * lora["recovered_mean"]}
    assert pytest.approx(measured, abs=0.05) == RECOVERED


def test_it_is_said_after_any_other_method() -> None:
    assert "--method best recovers most in the committed study: 63 %" in str(better_method("lcc"))
    assert better_method("best") is None
