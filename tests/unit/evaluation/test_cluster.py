"""Comparisons on a cluster: a job a run, each computed once, with the results of one process."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import call, refused

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.evaluation.comparison.cluster import JOBS, Cluster, compare_on_cluster, compute_one
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.runner import Runner

submitit = pytest.importorskip("submitit")
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
    """submitit's own executor for debugging: a job runs when it is waited for."""
    monkeypatch.setattr(submitit, "AutoExecutor", functools.partial(_executor, submitit.AutoExecutor))


def _executor(kind: Any, folder: Path, cluster: str) -> Any:
    return kind(folder, cluster="debug")


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
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *r: None if name == "submitit" else find(name, *r))
    command = ("compare", dense_dir, pruned_dir, tmp_path / "run", "--cluster", "local")
    refused(capsys, 2, "expected the package submitit for a cluster, got none", *command)
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
