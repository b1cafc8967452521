"""The panel of domains: what is measured, what counts as recovered, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import call
from support.tiny import tiny_tokenizer

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.tables import comparison_tables
from lcc_lens.evaluation.panel import panel_blocks, panel_recovery, seen_domains
from lcc_lens.exporters.measured import panel_metrics

DENSE, PRUNED = {"c4": 2.0, "python": 1.0, "howto": 3.0}, {"c4": 3.0, "python": 2.0, "howto": 3.0}


def test_mean_and_worst_are_over_what_was_lost() -> None:
    found = panel_recovery(DENSE, PRUNED, {"c4": 2.2, "python": 2.1, "howto": 2.9}, {"web", "how-to"})
    assert {name: row["recovered"] for name, row in found["domains"].items()} == pytest.approx(
        {"c4": 0.8, "python": -0.1, "howto": None}
    )
    assert {name for name, row in found["domains"].items() if row["in_pool"]} == {"c4", "howto"}
    assert (found["mean"], found["worst"], found["worst_domain"]) == (
        pytest.approx(0.35),
        pytest.approx(-0.1),
        "python",
    )
    assert found["worse"] == ["python"]
    metrics = panel_metrics(found)
    assert metrics["c4"]["recovered"] == "80.0%"
    assert metrics["howto"]["recovered"] == "nothing was lost"
    assert metrics["worst domain (python)"] == {"recovered": "-10.0%"}
    assert metrics["warning"] == {"": "worse than the pruned model on python"}


def test_nothing_lost_anywhere_has_no_mean() -> None:
    found = panel_recovery(DENSE, DENSE, DENSE)
    assert (found["mean"], found["worst"], found["worst_domain"], found["worse"]) == (None, None, None, [])
    assert "mean over domains" not in panel_metrics(found)


def test_a_text_that_is_too_short_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "long.txt").write_text("\n\n".join(f"Sentence number {i} of many." for i in range(200)))
    (tmp_path / "short.txt").write_text("\n\n".join(f"{i}." for i in range(40)))
    (tmp_path / "none.txt").write_text("x\n\ny\n\nz")  # no paragraph of it is held out
    names = [str(tmp_path / name) for name in ("long.txt", "short.txt", "none.txt")]
    blocks = panel_blocks(tiny_tokenizer(), names, blocks=3, length=64)
    assert {name: len(own) for name, own in blocks.items()} == {names[0]: 3}
    for name in ("short.txt", "none.txt"):
        assert f"{name} holds less than 64 held-out tokens: left out of the panel" in caplog.text
    with pytest.raises(RequestError, match="expected at least one text with 64 held-out tokens, got none"):
        panel_blocks(tiny_tokenizer(), names[1:], length=64)


def test_what_chose_the_parameters_is_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Sentence number {i} of many." for i in range(200)))
    chosen = load_data(str(file), role="held-out").examples[0]
    tokenizer = tiny_tokenizer()
    first, other = (
        tokenizer.decode(panel_blocks(tokenizer, [str(file)], length=64, without=groups)[str(file)][0].tokens)
        for groups in (frozenset(), load_data(str(file), n=None, role="held-out").groups and _digests(chosen.group))
    )
    assert first.startswith(chosen.response)
    assert chosen.response not in other


def _digests(group: str) -> frozenset[str]:
    from lcc_lens.data.roles import digest

    return frozenset({digest(group)})


def test_a_refit_s_calibration_counts_as_seen(tmp_path: Path) -> None:
    assert seen_domains(tmp_path, "alpaca") == {"instructions"}
    (tmp_path / "refit.json").write_text(json.dumps({"calibration": {"data": "c4+mix"}}))
    assert seen_domains(tmp_path, "alpaca") >= {"instructions", "web", "self-written", "code"}


def test_restore_measures_the_panel_and_the_card_shows_it(
    dense_dir: Path, pruned_dir: Path, text_file: Path, question_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "own.txt").write_text("\n\n".join(f"My own sentence number {i} is here." for i in range(400)))
    settings = ("--data", question_file, "--method", "norms", "--panel", "python", tmp_path / "own.txt")
    run, out = tmp_path / "run", tmp_path / "out"
    assert call("restore", dense_dir, pruned_dir, run, *settings, "--panel-blocks", 1) == 0
    panel = json.loads((run / "metrics.json").read_text())["panel"]
    assert list(panel["domains"]) == ["python", "own"]
    assert not any(row["in_pool"] for row in panel["domains"].values())
    shown = capsys.readouterr().out
    has_lost = panel["mean"] is not None  # not always, on the code of another Python
    assert not has_lost or f"{panel['mean']:.1%}" in shown
    assert ("worse than the pruned model" in shown) == bool(panel["worse"])
    assert call("export", run, out, "--quiet") == 0
    card = (out / "README.md").read_text()
    assert not has_lost or f"| worst domain ({panel['worst_domain']}) | {panel['worst']:.1%} |" in card
    assert "| python |" in card


def test_texts_without_held_out_blocks_are_refused_before_the_work(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, run = tmp_path / "none.txt", tmp_path / "run"
    none.write_text("x\n\ny\n\nz")
    command = ("restore", dense_dir, pruned_dir, run, "--data", text_file, "--method", "norms", "--panel")
    assert call(*command, none) == 2
    assert "expected at least one text with 512 held-out tokens, got none; name longer texts" in capsys.readouterr().err
    (tmp_path / text_file.name).write_text(text_file.read_text())
    assert call(*command, text_file, tmp_path / text_file.name) == 2
    assert "expected texts of different names, got text twice" in capsys.readouterr().err
    assert not run.exists()


def test_a_file_that_was_trained_on_is_known_however_it_is_written(tmp_path: Path) -> None:
    own, other = (str(tmp_path / folder / "wikipedia.txt") for folder in ("a", "b"))
    again = str(tmp_path / "b" / ".." / "a" / "wikipedia.txt")
    losses = {again: 1.0, str(tmp_path / "notes.txt"): 1.0, "wikipedia": 1.0}
    found = panel_recovery(losses, losses, losses, seen_domains(tmp_path, own))
    seen = {label: row["in_pool"] for label, row in found["domains"].items()}
    assert seen == {"wikipedia.txt": True, "notes": False, "wikipedia": False}
    with pytest.raises(RequestError, match=r"expected texts of different names, got wikipedia.txt twice; rename one"):
        panel_recovery(*[{own: 1.0, other: 1.0}] * 3)
    with pytest.raises(RequestError, match=r"got wikipedia.txt twice"):
        CompareConfig(data="wikipedia", texts=(own, other))


def test_rows_of_a_comparison_have_every_domain() -> None:
    def measured(c4: float, python: float) -> dict:
        texts = {"c4": {"perplexity": c4, "losses": [1.0]}, "python": {"perplexity": python, "losses": [1.0]}}
        return {"perplexity": c4, "log_perplexity": 1.0, "kl": 0.1, "response_loss": 1.0, "texts": texts, "tasks": {}}

    results = {
        "settings": {"data": "alpaca", "refit_data": ["c4"], "texts": ["c4", "python"]},
        "bare": {"dense": measured(1.0, 1.0), "pruned": measured(10.0, 100.0)},
        "cells": {
            "lcc | 0": measured(10**0.5, 10.0),
            "lcc | 1": measured(10**0.25, 100.0),
            "refit+low-rank | 0": measured(1.0, 1000.0),
        },
    }
    lcc, refit = summary(results)
    assert lcc["domains"]["c4"] == {"recovered": pytest.approx(0.625), "in_pool": False}
    assert (lcc["recovered_mean"], lcc["recovered_worst"]) == (pytest.approx(0.4375), pytest.approx(0.25))
    assert refit["domains"]["c4"] == {"recovered": pytest.approx(1), "in_pool": True}
    assert refit["domains"]["python"]["recovered"] == pytest.approx(-0.5)
    table = comparison_tables(results["bare"], summary(results))[0]
    assert table.columns == ["", "mean", "worst", "c4", "python"]
    assert table.rows[1] == ["refit+low-rank", "25.0%", "-50.0%", "100.0%*", "-50.0%"]
    old = [{name: value for name, value in row.items() if not name.startswith(("domains", "recovered_mean"))}
           for row in summary(results)]  # fmt: skip
    assert comparison_tables(results["bare"], old)[0].columns[1] == "perplexity"
