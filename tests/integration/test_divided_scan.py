"""A scan that several processes divide gives the bits of one; threads stand in for processes here."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiers import mostly_slow

from lcc_lens.analysis.scan import passes
from lcc_lens.analysis.scan import shards as scan_work
from lcc_lens.analysis.scan.scan import UNFINISHED, Scan, scan
from lcc_lens.analysis.scan.state import ScanState
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.machine import processes
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.frontends.cli.main import COMMANDS
from lcc_lens.frontends.cli.main import run as run_command
from lcc_lens.models.hooked.activations import SITES
from lcc_lens.models.pair import Pair, load_pair

scan_module = import_module("lcc_lens.analysis.scan.scan")  # lcc_lens.analysis.scan.scan is the function
LAST: dict[str, Any] = {"positions": "last", "batch_tokens": 70, "display": 1}
ALL: dict[str, Any] = {"positions": "all", "batch_tokens": 150, "display": 0, "sites": SITES}

CAUSES: dict[str, Any] = {**LAST, "causes": True}


class Together:
    """Runs one function in several threads that count as processes; notes which shards each one read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._own = patch, threading.local()
        self.shards: list[tuple[int, str, int]] = []
        patch.setattr(passes, "SHARD", 4)
        for name in ("dense_pass", "pruned_pass"):
            patch.setattr(scan_work, name, self._noting(name))

    def run(self, n: int, work: Callable[[int], Any]) -> list[Any]:
        """What each gives, or the error that ended it."""
        barrier = threading.Barrier(n)

        def one(index: int) -> Any:
            self._own.index = index
            try:
                return work(index)
            except (LensError, ZeroDivisionError) as error:
                barrier.abort()  # as the others see it when a process has ended
                return error

        with self._patch.context() as patch, ThreadPoolExecutor(n) as pool:
            patch.setattr(processes, "n_processes", lambda: n)
            patch.setattr(scan_module, "n_processes", lambda: n)
            patch.setattr(processes, "process_index", lambda: self._own.index)
            patch.setattr(processes, "_state", lambda: SimpleNamespace(wait_for_everyone=barrier.wait))
            return list(pool.map(one, range(n)))

    def _noting(self, name: str) -> Callable[..., Any]:
        run = getattr(passes, name)

        def noted(pair: Any, plan: Any, shard: Any, *rest: Any) -> Any:
            self.shards.append((getattr(self._own, "index", 0), name.removesuffix("_pass"), shard[0]))
            return run(pair, plan, shard, *rest)

        return noted


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Together:
    return Together(monkeypatch)


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=22)


@pytest.fixture(scope="module")
def pairs(dense_dir: Path, pruned_dir: Path) -> list[Pair]:
    return [load_pair(dense_dir, pruned_dir, one_at_a_time=one) for one in (False, False, False, True, True)]


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.iterdir())}


@pytest.mark.parametrize(
    ("settings", "chosen"),
    mostly_slow([(LAST, (0, 1)), (ALL, (0, 1, 2)), (LAST, (3, 4)), (CAUSES, (0, 1))], (LAST, (0, 1)), (CAUSES, (0, 1))),
)
def test_processes_give_the_bits_of_one(
    pairs: list[Pair], data: Data, together: Together, tmp_path: Path, settings: dict[str, Any], chosen: tuple[int, ...]
) -> None:
    scan(pairs[chosen[0]], data, **settings, run=tmp_path / "one")
    alone, together.shards = together.shards, []
    found = together.run(len(chosen), lambda i: scan(pairs[chosen[i]], data, **settings, run=tmp_path / "run"))
    assert files(tmp_path / "run") == files(tmp_path / "one")  # which also says that nothing unfinished stays
    assert sorted(step[1:] for step in together.shards) == sorted(step[1:] for step in alone)  # each read once
    assert {index for index, *_ in together.shards} == set(range(len(chosen)))
    for result in found:
        assert isinstance(result, Scan)
        assert result.heads.n_samples == found[0].heads.n_samples >= 22
        assert all(torch.equal(t, found[0]._tensors()[name]) for name, t in result._tensors().items())


def test_wide_spectra_agree_within_rounding(
    pairs: list[Pair], data: Data, together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.analysis.statistics._WIDE", 8)
    settings = {**ALL, "spectra": ("z", "mlp")}
    expected = scan(pairs[0], data, **settings).others["mlp"].singular_values
    found, _ = together.run(2, lambda i: scan(pairs[i], data, **settings, run=tmp_path / "run"))
    values = found.others["mlp"].singular_values
    assert float((values - expected).abs().max()) < 1e-4 * float(expected.max())
    assert float(expected.max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("next_time", [1, 2, 3])
def test_ended_process_ends_all_and_finished_shards_stay(
    pairs: list[Pair], data: Data, together: Together, tmp_path: Path, next_time: int
) -> None:
    scan(pairs[0], data, **LAST, run=tmp_path / "one")
    together.shards = []
    read = scan_work.pruned_pass

    def breaking(pair: Pair, *rest: Any) -> Any:
        if pair is pairs[1] and sum(index == 1 for index, *_ in together.shards) > 2:
            raise ZeroDivisionError
        return read(pair, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_work, "pruned_pass", breaking)
        first, second = together.run(2, lambda i: scan(pairs[i], data, **LAST, run=tmp_path / "run"))
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, LensError)
    assert "another process of this run has ended" in str(first)
    assert "run the same command again to go on" in str(first)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [UNFINISHED]
    waiting = {file.name for file in (tmp_path / "run" / UNFINISHED).glob("part_*")}
    assert waiting  # of a shard after the one that was lost
    done, together.shards = {step[2] for step in together.shards if step[1] == "pruned"}, []
    together.run(next_time, lambda i: scan(pairs[i], data, **LAST, run=tmp_path / "run"))
    assert files(tmp_path / "run") == files(tmp_path / "one")
    again = {step[2] for step in together.shards}
    assert again
    if next_time > 1:  # a process alone makes anew what comes after a lost shard
        assert not again & done


def test_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    ScanState(tmp_path / "here", "one").begin()
    ScanState(tmp_path / "here", "one", joined=True)
    for folder, request in ((tmp_path / "there", "one"), (tmp_path / "here", "two")):
        with pytest.raises(RequestError, match=r"expected the state of the first process's scan in .* machines share"):
            ScanState(folder, request, joined=True)
    assert (tmp_path / "here").exists()
    with pytest.raises(LensError, match=r"expected 3 finished parts of the scan in .*, got 0; put the run on a disk"):
        ScanState(tmp_path / "here", "one").require_done(3)


def test_shards_of_a_lost_folder_are_missed(pairs: list[Pair], data: Data, together: Together, tmp_path: Path) -> None:
    keep = ScanState.keep_part

    def losing(state: ScanState, shard: int, *rest: Any) -> None:
        keep(state, shard, *rest)
        if shard % 2:
            (state.folder / state._part_file(shard)).unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanState, "keep_part", losing)
        first, _ = together.run(2, lambda i: scan(pairs[i], data, **LAST, run=tmp_path / "run"))
    assert isinstance(first, LensError)
    assert "expected 6 finished parts of the scan" in str(first)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"scan", "restore"}))
def test_commands_that_cannot_be_divided_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for variable, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)  # the example's paths do not exist: nothing is looked at before the refusal
    assert run_command([*name.split("-"), *shlex.split(COMMANDS[name].example)]) == 2
    advice = "start its parts with --part" if name == "compare" else "run it without a launcher"
    message = f"expected scan or restore in 2 processes, got {name.replace('-', ' ')}; {advice}"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
