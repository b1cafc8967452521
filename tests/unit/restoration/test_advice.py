"""After a restoration one line names what the committed study puts first, and what it would cost here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.places import ROOT

from lcc_lens.restoration.advice import COST, RECOVERED, better_method
from lcc_lens.restoration.best import BEST_ENTRY


def test_the_figures_are_those_of_the_committed_study() -> None:
    study = json.loads((ROOT / "benchmarks" / "restorations_wanda50.json").read_text())
    rows = {row["entry"]: row for row in study["summary"]}
    assert max(rows, key=lambda entry: rows[entry]["recovered"] or 0) == BEST_ENTRY
    for name, entry in (("lcc", "lcc"), ("best", BEST_ENTRY)):
        assert RECOVERED[name] == pytest.approx(100 * rows[entry]["recovered"], abs=0.05)
    whole = study["refit_seconds"] + rows[BEST_ENTRY]["training_seconds"]
    assert pytest.approx(whole / rows["lcc"]["training_seconds"], abs=0.05) == COST


@pytest.mark.parametrize(("seconds", "time"), [(20.0, "34 seconds"), (200.0, "6 minutes")])
def test_the_time_follows_from_the_run(seconds: float, time: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"seconds": {seconds}}}\n' * 3)
    advice = better_method("lcc", tmp_path, epochs=3)
    assert advice is not None
    assert "--method best recovers most in the committed study: 66 %" in advice
    assert advice.endswith(f"here it would take about {time}")


def test_nothing_is_said_after_the_best_or_of_time_where_nothing_was_trained(tmp_path: Path) -> None:
    assert better_method("best", tmp_path, epochs=1) is None
    assert "take about" not in str(better_method("mean-shift", tmp_path, epochs=1))
