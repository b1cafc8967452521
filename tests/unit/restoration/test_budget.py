"""A time budget: the sizes that fit, from what this machine takes for each stage."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import call, refused
from support.tiny import build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.frontends.cli.restoring import Restore
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.budget import (
    BUDGET_FILE,
    BudgetPlan,
    _as_option,
    blocks_in_time,
    fit_budget,
    parse_budget,
    plan_budget,
)
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.result import RESTORATION_TENSORS
from lcc_lens.restoration.speed import Costs, Speed, measure_speed
from lcc_lens.restoration.training.config import TrainConfig

SLOW = Costs(Speed(read=1e-3, trained=5e-3, solved=1.0, loaded=5.0, step_written=0.05, text_written=0.002))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), (" 1h ", 3600)])
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["15", "m", "0m", "-5m", "5 minutes", "1d", "nanm", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="such as 5m, 15m or 1h"):
        parse_budget(text)


@given(st.floats(400, 10_000), st.floats(1, 20), st.integers(0, 20_000))
def test_all_stages_fit_and_nearly_fill_the_budget(budget: float, solved: float, n_measured: int) -> None:
    costs = Costs(Speed(1e-3, 5e-3, solved, 5.0, 0.02, 1e-3), n_measured=n_measured)
    plan = fit_budget(costs, budget, 10.0)
    assert 0.95 * budget >= sum(plan.seconds.values()) > 0.95 * budget - 60  # a batch of written text more


def test_a_longer_budget_refits_and_trains_on_more() -> None:
    short, long = (fit_budget(SLOW, 60.0 * minutes) for minutes in (10, 60))
    assert 0 < short.refit_samples < long.refit_samples
    assert short.examples < long.examples


def test_a_short_refit_takes_half_of_the_time_and_a_long_one_a_third() -> None:
    costs = Costs(Speed(4e-4, 3.6e-3, 0.5, 5.0))
    short, long = (fit_budget(costs, 60.0 * minutes) for minutes in (5, 15))
    left = {plan.budget: 0.95 * plan.budget - plan.seconds["measure"] for plan in (short, long)}
    assert short.refit_samples == 96
    assert left[300.0] * 0.35 < short.seconds["refit"] < left[300.0] * 0.5
    assert left[900.0] * 0.3 < long.seconds["refit"] < left[900.0] * 0.35


def test_a_refit_that_is_not_worth_its_fixed_cost_is_left_out() -> None:
    plan = fit_budget(Costs(Speed(1e-3, 5e-3, 10.0, 5.0)), 600.0)
    assert plan.refit_samples == 0
    assert plan.seconds["refit"] == 0
    assert "refit" not in str(plan)


def test_the_dense_model_writes_nothing_where_that_would_take_much_of_a_short_budget() -> None:
    short, long = (fit_budget(SLOW, 60.0 * minutes, may_skip_writing=True) for minutes in (5, 15))
    assert (short.writes, long.writes) == (False, True)
    assert short.seconds["write text"] == 0
    assert short.examples > fit_budget(SLOW, 300.0).examples
    assert short.refitting.calibration == ("wikipedia", "howto", "questions", "python")
    assert str(short).endswith("; no text that the dense model writes")
    assert long.refitting.calibration is None  # the mix
    assert long == fit_budget(SLOW, 900.0)
    assert fit_budget(SLOW, 300.0).writes  # unless it may leave that out


@pytest.mark.parametrize(("options", "skips"), [([], True), (["--data", "mix"], False), (["--data", "python"], True)])
def test_text_that_is_asked_for_by_name_is_written(
    options: list[str], skips: bool, dense_dir: Path, pruned_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[dict[str, object]] = []

    def plan(*_: object, **options: object) -> BudgetPlan:
        asked.append(options)
        raise RequestError("enough")

    monkeypatch.setattr("lcc_lens.restoration.budget.plan_budget", plan)
    assert call("restore", dense_dir, pruned_dir, tmp_path / "run", "--budget", "5m", *options) == 2
    assert [options["may_skip_writing"] for options in asked] == [skips]


@pytest.mark.parametrize("writes", [True, False])
def test_a_plan_says_what_is_trained_on(
    writes: bool, dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = BudgetPlan(300.0, 24, 16, {}, writes=writes), []
    monkeypatch.setattr("lcc_lens.restoration.budget.plan_budget", lambda *_, **__: plan)
    monkeypatch.setattr(Restore, "_examples", lambda self, spec, name, n: asked.append(name) or refuse())

    def refuse() -> None:
        raise RequestError("enough")

    assert call("restore", dense_dir, pruned_dir, tmp_path / "run", "--budget", "5m") == 2
    assert asked == ["mix" if writes else "wikipedia+howto+questions+python"]


def test_a_budget_below_the_smallest_stage_names_one_that_will_do() -> None:
    with pytest.raises(RequestError, match=r"expected a budget of at least (\d+)(s|m) here, got 10s") as refused:
        fit_budget(SLOW, 10.0)
    named = str(refused.value).split("at least ")[1].split(" ")[0]
    assert fit_budget(SLOW, parse_budget(named)).examples >= 16


def test_a_plan_reads_no_more_than_the_models_context(tmp_path: Path, text_file: Path) -> None:
    save_model(build_model(max_position_embeddings=24), tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "pruned", calibration=str(text_file), n_samples=2, seq_len=16)
    plan = plan_budget(tmp_path / "dense", tmp_path / "pruned", "5m")
    assert plan.costs is not None
    assert plan.costs.length == 24
    with pytest.raises(RequestError, match="expected a limit within the models' context of 24 tokens, got 48"):
        plan_budget(tmp_path / "dense", tmp_path / "pruned", "5m", length=48)


@pytest.mark.parametrize(("needed", "named"), [(100.2, "101s"), (120.0, "2m"), (299.0, "299s"), (301.0, "6m")])
def test_a_refusal_names_times_as_the_option_reads_them(needed: float, named: str) -> None:
    assert _as_option(needed) == named
    assert parse_budget(named) >= needed


def test_a_method_without_a_refit_is_refused(dense_dir: Path, pruned_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a method that refits first for a budget, got lcc"):
        plan_budget(dense_dir, pruned_dir, "5m", method="lcc")


@pytest.mark.slow
def test_restore_keeps_its_plan_and_trains_on_what_it_says(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "lcc_lens.restoration.budget.measure_speed", lambda *_: Speed(1e-3, 2e-2, 1e-3, 0.0, 1e-3, 1e-3)
    )
    out = tmp_path / "run"
    command = (
        "restore", dense_dir, pruned_dir, out, "--data", text_file, "--max-length", "32", "--budget", "60s",
        "--panel-blocks", "0",
    )  # fmt: skip
    assert call(*command, "--quiet") == 0
    printed = " ".join(capsys.readouterr().out.split())
    kept = read_json(out / BUDGET_FILE)
    plan = kept["plan"]
    assert f"plan for 1 minutes: refit on {plan['refit_samples']} sequences" in printed
    assert (out / RESTORATION_TENSORS).exists()
    assert read_json(out / "config.json")["restore"]["limit"] == kept["trained"] <= plan["examples"]
    assert read_json(out / "refit" / "refit.json")["calibration"]["sequences"] == plan["refit_samples"]


def test_less_is_trained_on_where_the_refit_took_longer(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    pair, spec, config = load_pair(dense_dir, pruned_dir), MethodSpec.parse("best"), TrainConfig()
    costs = Costs(measure_speed(pair, spec, config, 16), length=16)
    plan = BudgetPlan(1e6, 24, 900, {}, costs)
    assert blocks_in_time(plan, pair, spec, config, tmp_path) == 900
    late = replace(plan, budget=60.0, started=time.monotonic() - 57.0)
    assert blocks_in_time(late, pair, spec, config, tmp_path) < 900
    too_late = replace(plan, budget=60.0, started=time.monotonic() - 100.0)
    assert blocks_in_time(too_late, pair, spec, config, tmp_path) == 16


@given(st.floats(30, 400), st.floats(0.01, 2))
def test_the_smallest_training_fits_beside_every_refit(budget: float, solved: float) -> None:
    costs = Costs(Speed(6e-4, 4e-3, solved, 3.0, 0.05, 5e-3))
    try:
        plan = fit_budget(costs, budget)
    except RequestError:
        return
    assert plan.examples >= 16
    assert sum(plan.seconds.values()) <= 0.95 * budget + 1e-6


def test_a_resumed_run_keeps_its_number_of_blocks(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.restoration.budget.measure_speed", lambda *_: Speed(1e-3, 5e-3, 1e-3, 0.0))
    pair, spec, config = load_pair(dense_dir, pruned_dir), MethodSpec.parse("best"), TrainConfig()
    plan = plan_budget(dense_dir, pruned_dir, "5m", length=16, run=tmp_path)
    slower = replace(plan, started=plan.started - 200)
    blocks = blocks_in_time(slower, pair, spec, config, tmp_path)
    assert blocks < plan.examples
    # what is measured at the end may change
    again = plan_budget(dense_dir, pruned_dir, "5m", length=16, n_measured=64, run=tmp_path, resume=True)
    assert (again, blocks_in_time(again, pair, spec, config, tmp_path, resume=True)) == (plan, blocks)
    assert blocks_in_time(plan, pair, spec, config, tmp_path) > blocks  # one that begins anew has its time again


def test_a_plan_is_used_again_for_its_own_request_alone(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(
        "lcc_lens.restoration.budget.measure_speed", lambda *_: measured.append(0) or Speed(1e-3, 5e-3, 1e-3, 0.0)
    )
    plan = plan_budget(dense_dir, pruned_dir, "5m", length=16, run=tmp_path)
    others: list[tuple[dict[str, object], str]] = [
        ({"budget": "6m"}, "time budget"), ({"method": "polish"}, "method"), ({"length": 8}, "length"),
        ({"self_written": 1.0}, "choice of data"), ({"config": TrainConfig(batch_size=1)}, "set of training options"),
        ({"pruned": dense_dir}, "pruned model"),
    ]  # fmt: skip
    settings = {"dense": dense_dir, "pruned": pruned_dir, "budget": "5m", "length": 16, "run": tmp_path}
    for other, what in others:
        with pytest.raises(RequestError, match=f"got another {what}; repeat them, or start without --resume"):
            plan_budget(**(settings | other), resume=True)
    assert plan_budget(**settings) == plan
    assert len(measured) == 1
    for other in ({"config": TrainConfig(batch_size=1)}, {"n_measured": 64}):
        plan_budget(**(settings | other))
    assert len(measured) == 3


def test_a_run_of_named_sizes_is_not_resumed_with_a_budget(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "refit").mkdir()
    with pytest.raises(RequestError, match="got one of named sizes; repeat --examples and --refit-samples"):
        plan_budget(dense_dir, pruned_dir, "5m", run=tmp_path, resume=True)
    assert not (tmp_path / BUDGET_FILE).exists()


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], "best"), (["--data", "mix"], "best"), (["--budget", "5m"], "best"), (["--heads", "0.5"], "lcc"),
        (["--selector", "mse"], "lcc"), (["--paper"], "lcc"), (["--task", "rte"], "lcc"), (["--rank", "2"], "lcc"),
        (["--one-at-a-time"], "lcc"), (["--method", "offset"], "offset"),
        (["--heads", "1", "--method", "best"], "best"),
    ],
)  # fmt: skip
def test_the_best_method_runs_unless_options_of_the_papers_are_named(
    options: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Restore, "execute", lambda self: asked.append(self.chosen_method))
    assert call("restore", "dense", "pruned", "run", *options) == 0
    assert asked == [method]


def test_sizes_beside_a_budget_are_refused(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("restore", dense_dir, pruned_dir, tmp_path / "run", "--method", "best", "--budget", "5m")
    refused(capsys, 2, "expected --budget to choose the sizes, got --examples too", *command, "--examples", 9)
