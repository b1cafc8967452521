"""A comparison's summary and tables, of numbers made by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from support.commands import call

from lcc_lens.core.errors import LensError
from lcc_lens.evaluation.baselines import methods as baselines
from lcc_lens.evaluation.comparison.accuracies import (
    accuracy_difference,
    mean_accuracy,
    mean_rows,
    task_rows,
    tasks_made_worse,
)
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.evaluation.comparison.entry import BASELINES, all_entries
from lcc_lens.evaluation.comparison.measures import Measures
from lcc_lens.evaluation.comparison.tables import comparison_tables, failures
from lcc_lens.evaluation.formatting import count


def scores(**items: str) -> dict:
    found = {}
    for task, right in items.items():
        acc = right.count("1") / len(right)
        found[task] = {
            "acc": acc,
            "stderr": (acc * (1 - acc) / (len(right) - 1)) ** 0.5,
            "n": len(right),
            "items": right,
        }
    return found


BARE = {
    "dense": scores(rte="1111101111" * 4, boolq="111011" * 10),
    "pruned": scores(rte="0101001010" * 4, boolq="100010" * 10),
}
SEEDS = [scores(rte="0111101010" * 4, boolq="100110" * 10), scores(rte="0111001110" * 4, boolq="110010" * 10)]


def resampled(tasks: list[tuple[list[float], list[float]]], n: int = 4000) -> list[float]:
    """Oracle: shares of the loss recovered, drawing the items of every task anew, one draw at a time."""
    generator, shares = torch.Generator().manual_seed(5), []
    for _ in range(n):
        gain = loss = 0.0
        for gained, lost in tasks:
            drawn = torch.randint(len(gained), (len(gained),), generator=generator).tolist()
            gain += statistics.mean(gained[i] for i in drawn)
            loss += statistics.mean(lost[i] for i in drawn)
        shares.append(gain / loss)
    return shares


def test_difference_of_accuracies_is_paired_by_item() -> None:
    """Every task counts alike, every seed too; what both answer alike does not widen the interval."""
    first, second = scores(rte="1100", boolq="11111111"), scores(rte="1000", boolq="11110000")
    difference, interval = accuracy_difference([first, second], [second, second], ["rte", "boolq"])
    assert difference == pytest.approx((0.25 + 0.5) / 2 / 2)
    assert interval is not None
    assert interval[0] < difference < interval[1]
    assert accuracy_difference([first], [first], ["rte", "boolq"]) == (0.0, (0.0, 0.0))
    assert accuracy_difference([scores(rte="1111")], [scores(rte="0000")], ["rte"]) == (1.0, (1.0, 1.0))
    assert accuracy_difference([second], [first], ["boolq"])[0] == -0.5


def test_mean_accuracy_and_share_recovered_are_paired_by_item() -> None:
    row = mean_rows(BARE, SEEDS)
    by_hand = [
        statistics.mean(cell[task]["acc"] for task in ("rte", "boolq"))
        for cell in (BARE["dense"], BARE["pruned"], *SEEDS)
    ]
    dense, pruned, first, second = by_hand
    assert row["accuracy"] == pytest.approx((first + second) / 2)
    assert row["accuracy_sd"] == pytest.approx(abs(first - second) / 2**0.5)
    errors = [SEEDS[0][task]["stderr"] for task in ("rte", "boolq")]
    assert row["accuracy_stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert mean_accuracy(BARE["dense"])[0] == pytest.approx(dense)
    share = ((first + second) / 2 - pruned) / (dense - pruned)
    assert row["accuracy_recovered"] == pytest.approx(share)
    tasks = []
    for task in ("rte", "boolq"):
        bits = [[int(bit) for bit in cell[task]["items"]] for cell in (BARE["dense"], BARE["pruned"], *SEEDS)]
        d, p, a, b = bits
        tasks.append(
            ([(x + y) / 2 - z for x, y, z in zip(a, b, p, strict=True)], [x - z for x, z in zip(d, p, strict=True)])
        )
    quantiles = torch.quantile(torch.tensor(resampled(tasks)), torch.tensor([0.025, 0.975])).tolist()
    assert row["accuracy_recovered_interval"] == pytest.approx(quantiles, abs=0.03)
    low, high = row["accuracy_gain_interval"]
    assert 0 < low < (first + second) / 2 - pruned < high


def test_no_share_where_nothing_is_lost_or_nothing_is_restored() -> None:
    nothing = mean_rows({"dense": BARE["pruned"], "pruned": BARE["pruned"]}, SEEDS)
    assert (nothing["accuracy_recovered"], nothing["accuracy_recovered_interval"]) == (None, None)
    control = mean_rows(BARE, SEEDS[:1], is_restoration=False)
    assert (control["accuracy_recovered"], control["accuracy_sd"]) == (None, None)
    little = {"dense": scores(rte="1110"), "pruned": scores(rte="0110")}
    unsure = mean_rows(little, [scores(rte="1111")])
    assert unsure["accuracy_recovered"] == pytest.approx(2.0)
    assert unsure["accuracy_recovered_interval"] is None


def test_tasks_that_pruning_made_better_are_left_out_of_a_share_of_their_own() -> None:
    better = scores(rte="11100", boolq="00000", piqa="1101")
    bare = {
        "dense": scores(rte="11111", boolq="01000", piqa="0001"),
        "pruned": scores(rte="10000", boolq="00001", piqa="1111"),
    }
    assert tasks_made_worse(bare) == ["rte"]  # as many right in boolq, fewer in piqa
    further = {**bare, "dense": {**bare["dense"], **scores(arc="1111")}}  # scored, and the pruned model not yet
    assert tasks_made_worse(further) == ["rte"]
    row = mean_rows(bare, [better, scores(rte="11000", boolq="11111", piqa="1111")])
    assert row["worse_accuracy"] == pytest.approx((0.6 + 0.4) / 2)
    assert row["worse_recovered"] == pytest.approx((0.5 - 0.2) / (1.0 - 0.2))
    alone = [{"rte": cell["rte"]} for cell in (bare["dense"], bare["pruned"], better)]
    same = mean_rows({"dense": alone[0], "pruned": alone[1]}, alone[2:])
    assert mean_rows(bare, [better])["worse_recovered_interval"] == same["accuracy_recovered_interval"]
    assert (same["worse_recovered"], same["worse_accuracy"]) == (same["accuracy_recovered"], same["accuracy"])
    nothing = mean_rows({"dense": bare["pruned"], "pruned": bare["pruned"]}, [better])
    assert [nothing[f"worse_{key}"] for key in ("accuracy", "recovered", "recovered_interval")] == [None] * 3


def test_a_share_of_the_tasks_that_lost_stands_beside_that_of_all(found: dict) -> None:
    for name in ("dense", "pruned"):
        found["bare"][name]["tasks"] = {**found["bare"][name]["tasks"], "piqa": scores(piqa="1010")["piqa"]}
    for cell in found["cells"].values():
        if "tasks" in cell:
            cell["tasks"] = {**cell["tasks"], "piqa": scores(piqa="1110")["piqa"]}
    rows = summary(found)
    mean = comparison_tables(found["bare"], rows)[4]
    assert mean.columns[4:] == ["recovered", "interval", "recovered in rte, boolq", "interval", "seeds"]
    assert mean.rows[2][6] == f"{mean_rows(BARE, SEEDS)['accuracy_recovered']:.0%}"
    assert mean.rows[2][4] == f"{rows[0]['accuracy_recovered']:.0%}" != mean.rows[2][6]
    assert {len(row) for row in mean.rows} == {len(mean.columns)}


def measured(perplexity: float, tasks: dict) -> dict:
    losses = [2.0 + perplexity / 100, 2.1 + perplexity / 90]
    log = sum(losses) / 2
    return {
        "perplexity": perplexity, "log_perplexity": log, "kl": 0.1, "response_loss": 2.0, "tasks": tasks,
        "texts": {name: {"perplexity": perplexity, "losses": losses} for name in ("wikitext", "c4")},
    }  # fmt: skip


@pytest.fixture
def found() -> dict:
    costs = {"n_trained": 1200, "n_added": 90, "zeros_kept": 1.0, "training_seconds": 3.0, "memory_mib": 2048}
    cells = {
        f"lcc | {seed}": {**measured(40.0 + seed, tasks), **costs} for seed, tasks in enumerate(SEEDS)
    }  # fmt: skip
    cells |= {"lcc@dense | 0": {**measured(60.0, SEEDS[0]), **costs}, "lora | 0": {"error": "no adapters today"}}
    ratio = {"median": 1.25, "interval": [1.2, 1.3]}
    return {
        "bare": {"dense": measured(30.0, BARE["dense"]), "pruned": measured(60.0, BARE["pruned"])}, "cells": cells,
        "inference": {"biases": {"prefill_ratio": ratio, "decode_ratio": ratio}},
    }  # fmt: skip


def test_tables_show_all_that_was_measured(found: dict) -> None:
    rows = summary(found)
    by_entry = {row["entry"]: row for row in rows}
    assert by_entry["lcc"]["tasks"] == task_rows(BARE["pruned"], SEEDS)
    assert by_entry["lcc"].items() >= mean_rows(BARE, SEEDS).items()
    assert by_entry["lcc@dense"]["accuracy_recovered"] is None
    assert "accuracy" not in by_entry["lora"]
    domains, recovery, costs, texts, mean, tasks = comparison_tables(found["bare"], rows)
    assert [row[0] for row in recovery.rows] == ["dense", "pruned", "lcc", "lcc@dense", "lora"]
    lcc = recovery.rows[2]
    assert lcc[1] == "40.50 ± 0.71"
    assert lcc[2].startswith(f"{by_entry['lcc']['recovered']:.1%} ± ")
    assert lcc[2].endswith("]")
    assert lcc[-1] == "2"
    assert costs.rows[0] == ["lcc", "1.2k", "90", "100%", "1.25×", "1.25×", "3 ± 0", "2,048"]
    assert costs.rows[2] == ["lora"] + 7 * [""]
    assert texts.columns == ["", "wikitext", "c4"]
    assert [row[0] for row in mean.rows] == ["dense", "pruned", "lcc", "lcc@dense"]
    assert mean.rows[2][4] == f"{by_entry['lcc']['accuracy_recovered']:.0%}"
    assert mean.rows[2][-1] == "2"
    assert mean.rows[3][4:] == ["", "", "1"]
    assert tasks.columns == ["", "rte", "boolq"]
    assert all(
        len(row) == len(table.columns) for table in (domains, recovery, costs, texts, mean, tasks) for row in table.rows
    )
    assert failures(rows) == ["lora: 1 failed: no adapters today"]
    assert [count(n) for n in (None, 960, 34_600, 2_400_000)] == ["", "960", "34.6k", "2.4M"]


def test_entries_without_accuracies_stand_in_the_other_tables_alone(found: dict) -> None:
    """As they are while accuracies are added to a finished comparison, and where scoring failed."""
    found["cells"]["lcc | 1"].pop("tasks")
    found["cells"]["lcc@dense | 0"]["tasks"] = {}
    rows = summary(found)
    _, recovery, _, _, mean, tasks = comparison_tables(found["bare"], rows)
    assert [row[0] for row in recovery.rows] == ["dense", "pruned", "lcc", "lcc@dense", "lora"]
    assert [row[0] for row in mean.rows] == [row[0] for row in tasks.rows] == ["dense", "pruned", "lcc"]
    assert (recovery.rows[2][-1], mean.rows[2][-1]) == ("2", "1")
    assert rows[0]["accuracy"] == mean_accuracy(SEEDS[0])[0]


def test_baselines_and_controls_come_once() -> None:
    assert all_entries(["lcc", "lora"]) == ("lcc", "lora")
    every = all_entries(["lora", "lcc"], baselines=True, controls=True, heads=0.25)
    assert every[:2] == ("lora", "lcc")
    assert {*BASELINES, "lcc@dense", "lcc@shuffled", "lcc@random-heads", "random-basis", "offset"} < {*every}
    assert len(set(every)) == len(every)
    assert "lcc@random-heads" not in all_entries([], controls=True)


def test_compare_by_command(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A cell that fails is reported, the rest is measured, and one file holds cells and rows."""
    data = tmp_path / "many.jsonl"
    lines = (json.dumps({"prompt": f"Say {i} twice:", "response": f" {i}, {i}"}) for i in range(300))
    data.write_text("\n".join(lines))
    few = ("--data", data, "--examples", 16, "--texts", text_file, "--blocks", 2, "--responses", 4, "--seeds", 1)
    few = (*few, "--speed-rounds", 0, "--refit-samples", 9)
    methods = ("--methods", "lora", "norms", "gain")

    def broken(*args: object, **kwargs: object) -> None:
        raise LensError("no adapters today")

    original = Measures.of

    def diverging(self, pair, model, injection, teacher):
        found = original(self, pair, model, injection, teacher)
        return {**found, "kl": math.nan} if injection is not None and "gain" in str(injection).lower() else found

    monkeypatch.setattr(baselines, "adapters", broken)
    monkeypatch.setattr(Measures, "of", diverging)
    assert call("compare", dense_dir, pruned_dir, tmp_path / "run", *few, *methods, "--quiet") == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [(row["entry"], row["failed"]) for row in saved["summary"]] == [("lora", 1), ("norms", 0), ("gain", 1)]
    assert saved["cells"]["gain | 0"]["error"].startswith("expected finite figures, got a kl of nan")
    assert "lora: 1 failed: no adapters today" in printed
    assert "parameters trained and added" in printed
    assert "comparison.json" in printed
    assert saved["settings"]["refit_samples"] == 9
