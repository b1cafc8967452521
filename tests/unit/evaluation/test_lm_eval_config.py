"""Plain lm-eval, by the files that are written for it, gives the accuracies of ``lcc-lens eval``."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from support.commands import call, refused
from support.places import ROOT
from support.small_sets import write_sets

#: By recipe, the files of the published tables that it measures.
RECIPES = {
    "accuracies": ("restorations_wanda24_scored", "restorations_first"),
    "arc_easy": ("restorations_wanda60_arc_easy", "restorations_structured40_arc_easy"),
    "rte": ("restorations_wanda60_rte",),
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path / "data", 24)))
    return tmp_path / "data"


def _by_lm_eval(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> dict[str, dict]:
    """Run lm-eval's own command on a configuration; gives its results by task."""
    bare = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # its index takes 17 seconds
    monkeypatch.setattr(TaskManager, "__init__", bare)
    monkeypatch.setattr(sys, "argv", ["lm-eval", "--config", str(config), "--output_path", str(out), *map(str, more)])
    cli_evaluate()
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_itself_gives_the_same_numbers(
    dense_dir: Path, pruned_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, folder = ("boolq", "arc_easy", "hellaswag"), tmp_path / "yaml"
    command = ("eval", dense_dir, pruned_dir, "--tasks", *tasks, "wikitext", "--limit", 20, "--quiet")
    assert call(*command, "--out", tmp_path / "ours.json", "--lm-eval-yaml", folder) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["models"]
    theirs = {name: _by_lm_eval(folder / f"{name}.yaml", tmp_path / name, monkeypatch) for name in ("dense", "pruned")}
    assert theirs["dense"] != theirs["pruned"]
    for name, results in theirs.items():
        for task in tasks:
            scores = ours[name]["tasks"][task]
            assert results[task]["acc,none"] == pytest.approx(scores["acc"], abs=1e-12)
            assert 0 < scores["acc"] < 1
            if "acc_norm" in scores:
                assert results[task]["acc_norm,none"] == pytest.approx(scores["acc_norm"], abs=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs_without_the_hub(
    dense_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("eval", dense_dir, "--tasks", "arc_easy", "--quiet", "--out", tmp_path / "ours.json")
    assert call(*command, "--lm-eval-yaml", tmp_path / "yaml") == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["models"]["dense"]["tasks"]["arc_easy"]
    recipe = ROOT / "recipes" / "lm_eval" / "arc_easy.yaml"
    more = ("--include_path", tmp_path / "yaml" / "tasks", "--model_args", f"pretrained={dense_dir},max_length=128")
    found = _by_lm_eval(recipe, tmp_path / "out", monkeypatch, *more)["arc_easy"]
    assert found["acc,none"] == pytest.approx(ours["acc"], abs=1e-12)
    assert 0 < ours["acc"] < 1


def test_losses_alone_are_refused(dense_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ("eval", dense_dir, "--tasks", "wikitext", "--lm-eval-yaml", tmp_path / "yaml")
    refused(capsys, 2, "expected a task of lm-eval's, got wikitext; add one such as boolq", *command)
    assert not (tmp_path / "yaml").exists()


def test_a_foreign_file_is_refused_before_a_model_is_loaded(
    dense_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dense.yaml").write_text("mine")
    monkeypatch.setattr("lcc_lens.evaluation.evaluate.load_plain", None)
    message = "expected to replace only what lcc-lens wrote, got another dense.yaml"
    refused(capsys, 2, message, "eval", dense_dir, "--tasks", "boolq", "--lm-eval-yaml", tmp_path)


def test_every_published_table_has_its_recipe() -> None:
    files = {path.stem for path in (ROOT / "recipes" / "lm_eval").glob("*.yaml")}
    scored = {
        path.stem for path in (ROOT / "benchmarks").glob("restorations*.json")
        if json.loads(path.read_text())["settings"]["tasks"]
    }  # fmt: skip
    assert files == RECIPES.keys()
    assert scored == {name for names in RECIPES.values() for name in names}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_measures_what_its_tables_show(name: str) -> None:
    config = EvaluatorConfig.from_config(ROOT / "recipes" / "lm_eval" / f"{name}.yaml")
    for published in RECIPES[name]:
        settings = json.loads((ROOT / "benchmarks" / f"{published}.json").read_text())["settings"]
        assert (config.tasks, config.limit) == (settings["tasks"], settings["limit"])
