"""Comparisons on a cluster: a job a run, each computed once, with the results of one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import call, refused
from support.jobs import run_here
from support.small_sets import write_sets

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.machine.cluster import JOBS, Cluster
from lcc_lens.evaluation.comparison.cluster import compare_on_cluster, compute_one
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.runner import Runner

pytest.importorskip("submitit")
ENTRIES = ("norms", "mean-shift")


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> CompareConfig:
    rows = ({"prompt": f"Say number {i} twice:", "response": f" number {i}, number {i}"} for i in range(240))
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return CompareConfig(
        data=str(tmp_path / "many.jsonl"), texts=(str(text_file),), examples=24, validation=4, responses=4, blocks=2,
        block_length=16, scan_examples=24, batch_size=8, max_length=64, speed_rounds=0,
    )  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entries that were computed, in order."""
    done: list[str] = []
    run = Runner.run

    def counted(self: Runner, entry: Any, *rest: Any) -> dict[str, Any]:
        done.append(entry.text)
        return run(self, entry, *rest)

    monkeypatch.setattr(Runner, "run", counted)
    return done


@pytest.mark.filterwarnings("ignore")
def test_jobs_give_the_results_of_one_process(
    in_this_process: None, computed: list[str], dense_dir: Path, pruned_dir: Path, config: CompareConfig,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    models, cluster = (dense_dir, pruned_dir), Cluster("local")
    whole = compare(*models, tmp_path / "whole", ENTRIES, seeds=1, config=config)
    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr("lcc_lens.evaluation.comparison.cluster.compute_one", _fails)
        first = compare_on_cluster(*models, tmp_path / "run", ENTRIES, seeds=1, config=config, cluster=cluster)
    assert first["cells"] == {}
    assert "norms | 0 failed: " in caplog.text
    found = compare_on_cluster(*models, tmp_path / "run", ENTRIES, seeds=1, config=config, cluster=cluster)
    assert computed == list(ENTRIES)
    for name in ("norms | 0", "mean-shift | 0"):
        assert found["cells"][name]["perplexity"] == whole["cells"][name]["perplexity"]
    compare_on_cluster(*models, tmp_path / "run", ENTRIES, seeds=1, config=config, cluster=cluster)
    compute_one(str(dense_dir), str(pruned_dir), tmp_path / "run", ENTRIES, (1, 2), {"seeds": 1, "config": config})
    assert computed == list(ENTRIES)  # finished runs get no job, and a late job computes nothing again


def _fails(*_: Any) -> None:
    raise LensError("no machine today")


def test_what_cannot_be_submitted_is_refused(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert Cluster.parse("slurm", ["timeout_min=240", "slurm_partition=gpu"]).options == {
        "timeout_min": 240, "slurm_partition": "gpu"
    }  # fmt: skip
    with pytest.raises(RequestError, match="expected options name=value such as timeout_min=240, got 'gpu'"):
        Cluster.parse("slurm", ["gpu"])
    command = ("compare", dense_dir, pruned_dir, tmp_path / "run", "--cluster", "local")
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr("importlib.util.find_spec", lambda name, *r: None if name == "submitit" else find(name, *r))
        refused(capsys, 2, "expected the package submitit for a cluster, got none", *command)
    refused(
        capsys, 2, "options that submitit takes, got \"Parameter 'colour'", *command, "--cluster-options", "colour=1"
    )
    monkeypatch.setattr("shutil.which", lambda *_: None)
    slurm = (*command[:-1], "slurm")
    refused(capsys, 2, "expected a cluster and options that submitit takes, got", *slurm)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # every job is a process that imports everything
def test_the_command_runs_jobs_in_processes(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path
) -> None:
    settings = ("--data", config.data, "--texts", *config.texts, "--examples", 16, "--max-length", 32, "--responses", 4)
    command = ("compare", dense_dir, pruned_dir, tmp_path / "run", "--methods", *ENTRIES, "--seeds", 1, *settings)
    assert call(*command, "--blocks", 2, "--speed-rounds", 0, "--cluster", "local", "--quiet") == 0
    cells = json.loads((tmp_path / "run" / "comparison.json").read_text())["cells"]
    assert [name for name, cell in cells.items() if "perplexity" in cell] == ["norms | 0", "mean-shift | 0"]
    assert len(list((tmp_path / "run" / JOBS).glob("*_result.pkl"))) == 2


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two runs that train nothing."""
    rows = [{"name": name, "entry": name} for name in ("dense", "pruned", *ENTRIES)]
    values = {
        "title": "Two runs", "paper": "none", "status": "not run at size", "note": "", "model": "none", "seeds": 1,
        "prune": {"method": "magnitude", "sparsity": 0.5}, "data": ["rte"], "rows": rows,
    }  # fmt: skip
    path = tmp_path / "two.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs_its_comparisons_as_jobs(
    recipe: Path, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path / "sets", n=240)))
    submitted = run_here(monkeypatch)
    command = ("recipe", recipe, "--dry-run", dense_dir, "--quiet", "--out")
    for name, options in (("whole", ()), ("jobs", ("--cluster", "local")), ("jobs", ("--cluster", "local"))):
        assert call(*command, tmp_path / name, *options) == 0
    assert submitted == ["norms | 0", "mean-shift | 0"]
    whole, jobs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "jobs"))
    kept = ("entry", "perplexity", "accuracy", "errors")
    found = [[[row[key] for key in kept] for row in one["comparisons"]["rte"]["rows"]] for one in (whole, jobs)]
    assert found[0] == found[1]
    assert [row[3] for row in found[1]] == [[], []]


@pytest.mark.slow
def test_the_recipes_jobs_are_processes(
    recipe: Path, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path / "sets", n=240)))
    out = tmp_path / "run"
    assert call("recipe", recipe, "--dry-run", dense_dir, "--quiet", "--out", out, "--cluster", "local") == 0
    rows = json.loads((out / "results.json").read_text())["comparisons"]["rte"]["rows"]
    assert [(row["entry"], row["seeds"], row["errors"]) for row in rows] == [(entry, 1, []) for entry in ENTRIES]
    assert len(list((out / "rte" / JOBS).glob("*_result.pkl"))) == 2
