"""A time budget: the sizes that fit, from what this machine takes for each stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import call, refused

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.restoration.budget import BUDGET_FILE, Speed, fit_budget, parse_budget, plan_budget
from lcc_lens.restoration.result import RESTORATION_TENSORS

SLOW = Speed(read=1e-3, trained=5e-3, solved=1.0, loaded=5.0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), (" 1h ", 3600)])
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["15", "m", "0m", "-5m", "5 minutes", "1d", "nanm", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="such as 5m, 15m or 1h"):
        parse_budget(text)


@given(st.floats(400, 40_000), st.floats(1, 20), st.integers(0, 20_000))
def test_all_stages_fit_and_nearly_fill_the_budget(budget: float, solved: float, n_measured: int) -> None:
    plan = fit_budget(Speed(1e-3, 5e-3, solved, 5.0), budget, 10.0, n_measured=n_measured)
    assert sum(plan.seconds.values()) <= budget
    one_more = plan.seconds["train"] / plan.examples
    assert sum(plan.seconds.values()) > budget - 2 * one_more


def test_a_longer_budget_refits_and_trains_on_more() -> None:
    short, long = (fit_budget(SLOW, 60.0 * minutes) for minutes in (10, 60))
    assert 0 < short.refit_samples < long.refit_samples
    assert short.examples < long.examples


def test_a_refit_that_is_not_worth_its_fixed_cost_is_left_out() -> None:
    plan = fit_budget(Speed(1e-3, 5e-3, 10.0, 5.0), 600.0)
    assert plan.refit_samples == 0
    assert plan.seconds["refit"] == 0
    assert "refit" not in str(plan)


def test_a_budget_below_the_smallest_stage_names_one_that_will_do() -> None:
    with pytest.raises(RequestError, match=r"expected a budget of at least (\d+)(s|m) here, got 10 s") as refused:
        fit_budget(SLOW, 10.0)
    named = str(refused.value).split("at least ")[1].split(" ")[0]
    assert fit_budget(SLOW, parse_budget(named)).examples >= 16


def test_a_method_without_a_refit_is_refused(dense_dir: Path, pruned_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a method that refits first for a budget, got lcc"):
        plan_budget(dense_dir, pruned_dir, "5m", method="lcc")


def test_restore_keeps_its_plan_and_trains_on_what_it_says(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lcc_lens.restoration.budget.measure_speed", lambda *_: Speed(5e-3, 2e-2, 1e-3, 0.0))
    out = tmp_path / "run"
    command = (
        "restore", dense_dir, pruned_dir, out, "--method", "polish", "--data", text_file, "--max-length", "32",
        "--budget", "60s", "--panel-blocks", "0",
    )  # fmt: skip
    assert call(*command, "--quiet") == 0
    printed = " ".join(capsys.readouterr().out.split())
    plan = read_json(out / BUDGET_FILE)["plan"]
    assert f"plan for 1 minutes: refit on {plan['refit_samples']} sequences" in printed
    assert (out / RESTORATION_TENSORS).exists()
    assert read_json(out / "config.json")["restore"]["limit"] == plan["examples"]
    assert read_json(out / "refit" / "refit.json")["calibration"]["sequences"] == plan["refit_samples"]


def test_sizes_beside_a_budget_are_refused(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("restore", dense_dir, pruned_dir, tmp_path / "run", "--method", "best", "--budget", "5m")
    refused(capsys, 2, "expected --budget to choose the sizes, got --examples too", *command, "--examples", 9)
