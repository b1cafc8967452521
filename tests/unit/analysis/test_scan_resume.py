"""A scan that is interrupted goes on and ends with the same bits; a pair may hold one model at a time."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import flip_byte
from support.tiers import mostly_slow

from lcc_lens.analysis.scan import passes
from lcc_lens.analysis.scan import shards as scan_work
from lcc_lens.analysis.scan.scan import UNFINISHED, has_scan, scan
from lcc_lens.analysis.selectors.evidence import Evidence
from lcc_lens.analysis.selectors.registry import score
from lcc_lens.core.errors import InterruptedRun, LensError, RequestError
from lcc_lens.core.progress import tracked_by
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.hooked.activations import SITES
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.pair import Pair, load_pair

scan_module = import_module("lcc_lens.analysis.scan.scan")  # lcc_lens.analysis.scan.scan is the function
SETTINGS = {
    "positions": "last", "batch_tokens": 70, "display": 0, "sites": ("z",), "selectors": ("probe", "interaction")
}  # fmt: skip
N_SHARDS = 4
Passes = list[tuple[str, int]]


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=14)


@pytest.fixture(scope="module")
def whole(pair: Pair, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scan that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "SHARD", 4)
        scan(pair, data, **SETTINGS, run=run)
    return run


@pytest.fixture(autouse=True)
def done(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Shards of four examples, and a record of every pass over one: which model, and its first example."""
    monkeypatch.setattr(passes, "SHARD", 4)
    seen: Passes = []

    def spy(name: str) -> Callable[..., Any]:
        run = getattr(passes, name)

        def spied(pair: Any, plan: Any, shard: Any, *rest: Any) -> Any:
            seen.append((name.removesuffix("_pass"), shard[0]))
            return run(pair, plan, shard, *rest)

        return spied

    for name in ("dense_pass", "pruned_pass"):
        monkeypatch.setattr(scan_work, name, spy(name))
    return seen


@pytest.fixture
def one_model(dense_dir: Path, pruned_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, list[str]]:
    """A pair of one model at a time, and what was loaded; loading one while the other one lives is an error."""
    alive: list[weakref.ref[Any]] = []
    loads: list[str] = []

    def load(reference: Path, **options: Any) -> Any:
        assert not any(model() is not None for model in alive)
        loaded = load_hooked(reference, **options)
        alive.append(weakref.ref(loaded.model))
        loads.append(Path(reference).name)
        return loaded

    monkeypatch.setattr("lcc_lens.models.pair.load_hooked", load)
    return load_pair(dense_dir, pruned_dir, one_at_a_time=True), loads


def interrupted(n_batches: int, work: Callable[[], Any]) -> None:
    """Press Ctrl-C after so many batches."""

    def tracker(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        assert total >= n_batches
        for i, item in enumerate(items, 1):
            yield item
            if i == n_batches:
                raise KeyboardInterrupt

    with tracked_by(tracker):
        work()


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.iterdir()) if file.is_file()}


@pytest.mark.parametrize(
    ("changes", "finished"),
    mostly_slow(
        [({}, 1), ({}, 2), ({"positions": "all", "sites": SITES}, 3), ({"causes": True}, 2)],
        ({"positions": "all", "sites": SITES}, 3),
        ({"causes": True}, 2),
    ),
)
def test_interrupted_scan_goes_on_to_the_same_bits(
    pair: Pair, data: Data, done: Passes, tmp_path: Path, changes: dict[str, Any], finished: int
) -> None:
    settings = {**SETTINGS, **changes}
    scan(pair, data, **settings, run=tmp_path / "whole")
    expected = list(done)
    per_shard = 2 if changes else 4  # batches; a shard is finished when the next batch is asked for
    run = tmp_path / "run"
    with pytest.raises(
        InterruptedRun, match="finished examples and selectors are kept, run the same command again to go on"
    ):
        interrupted(finished * per_shard + 1, lambda: scan(pair, data, **settings, run=run))
    assert finished == len(list((run / UNFINISHED).glob("features_*.safetensors")))
    assert not files(run)
    done.clear()
    again = scan(pair, data, **settings, run=run)
    assert done == expected[2 * finished :]
    assert files(run) == files(tmp_path / "whole")
    assert not (run / UNFINISHED).exists()
    assert again.record.n_examples == 14


@pytest.mark.slow
def test_scan_may_stop_many_times(pair: Pair, data: Data, whole: Path, done: Passes, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):  # before anything is finished
        interrupted(1, lambda: scan(pair, data, **SETTINGS, run=tmp_path / "run"))
    for _ in range(N_SHARDS - 1):
        with pytest.raises(InterruptedRun):  # six batches are more than one shard takes, and fewer than two do
            interrupted(6, lambda: scan(pair, data, **SETTINGS, run=tmp_path / "run"))
    scan(pair, data, **SETTINGS, run=tmp_path / "run")
    assert len({shard for model, shard in done if model == "pruned"}) == N_SHARDS
    assert files(tmp_path / "run") == files(whole)


@pytest.mark.parametrize(
    ("changes", "n_done"),
    [
        ({"batch_tokens": 90}, 0),
        pytest.param({"positions": "end"}, 0, marks=pytest.mark.slow),
        pytest.param({"sites": ("z", "mlp")}, 0, marks=pytest.mark.slow),
        pytest.param({"limit": 13}, 0, marks=pytest.mark.slow),
        ({"seed": 3, "selectors": ("probe",), "display": 1, "probe_folds": 2}, 1),  # these come after the passes
    ],
)
def test_only_the_same_scan_goes_on(
    pair: Pair, data: Data, done: Passes, tmp_path: Path, changes: dict[str, Any], n_done: int
) -> None:
    with pytest.raises(InterruptedRun):
        interrupted(5, lambda: scan(pair, data, **SETTINGS, run=tmp_path / "run"))
    done.clear()
    settings = {**SETTINGS, **changes}
    scan(pair, data, **settings, run=tmp_path / "run")
    assert sum(model == "pruned" for model, _ in done) == N_SHARDS - n_done
    scan(pair, data, **settings, run=tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.slow
def test_other_models_and_damaged_state_begin_anew(
    pair: Pair, dense_dir: Path, data: Data, whole: Path, done: Passes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    unpruned = load_pair(dense_dir, dense_dir)
    for first, second, damage in ((pair, unpruned, False), (pair, pair, True)):
        with pytest.raises(InterruptedRun):
            interrupted(6, lambda first=first: scan(first, data, **SETTINGS, run=run))
        state = run / UNFINISHED / "state.safetensors"
        if damage:
            state.write_bytes(state.read_bytes()[:40])
        done.clear()
        found = scan(second, data, **SETTINGS, run=run)
        assert len(done) == 2 * N_SHARDS
        assert (float(found.relative_loss.max()) < 1e-5) == (second is unpruned)
    assert files(run) == files(whole)


def test_interruption_after_the_passes_repeats_none(
    pair: Pair, data: Data, whole: Path, done: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*anything: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr(scan_module, "score", stop)
        scan(pair, data, **SETTINGS, run=tmp_path / "run")
    done.clear()
    scan(pair, data, **SETTINGS, run=tmp_path / "run")
    assert not done
    assert files(tmp_path / "run") == files(whole)


def test_finished_selectors_are_not_scored_again(
    pair: Pair, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with other settings are; the result has the same bits."""
    settings = {**SETTINGS, "selectors": ("interaction", "probe"), "selector_examples": 2}
    scored: list[str] = []
    stops_at = "probe"

    def spy(names: Iterable[str], evidence: Evidence) -> Any:
        scored.extend(names)
        if stops_at in names:
            raise KeyboardInterrupt
        return score(names, evidence)

    monkeypatch.setattr(scan_module, "score", spy)
    with pytest.raises(InterruptedRun):
        scan(pair, data, **settings, run=tmp_path / "run")
    with pytest.raises(InterruptedRun):
        scan(pair, data, **settings, seed=1, run=tmp_path / "run")
    assert scored == ["interaction", "probe"] * 2
    stops_at = "nothing"
    scored.clear()
    scan(pair, data, **settings, run=tmp_path / "run")
    assert scored == ["probe"]
    scan(pair, data, **settings, run=tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("ends", ["well", "by Ctrl-C", "with an error"])
def test_without_a_run_no_temporary_folder_stays(
    pair: Pair, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if ends == "well":
        scan(pair, data, **SETTINGS)
    elif ends == "by Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            interrupted(5, lambda: scan(pair, data, **SETTINGS))
    else:
        monkeypatch.setattr(sys.modules["lcc_lens.analysis.scan.scan"], "score", lambda names, evidence: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scan(pair, data, **SETTINGS)
    assert not list(tmp_path.glob("lcc_lens_scan_*"))


@pytest.mark.slow
def test_one_model_at_a_time_gives_the_same_scan(pair: Pair, data: Data, one_model: Any, tmp_path: Path) -> None:
    single, loads = one_model
    wanted = {**SETTINGS, "sites": SITES, "display": 1, "selectors": ("probe", "interaction", "kl")}
    expected = scan(pair, data, **wanted)._tensors()
    found = scan(single, data, **wanted)._tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert loads == ["dense", "pruned"] * 3  # checked against each other, scanned, shown token by token


@pytest.mark.parametrize(
    ("n_batches", "n_dense", "loaded"), mostly_slow([(6, 2, ["pruned"]), (12, 4, [])], (6, 2, ["pruned"]))
)
def test_one_model_at_a_time_goes_on_in_either_phase(
    whole: Path, data: Data, done: Passes, one_model: Any, tmp_path: Path,
    n_batches: int, n_dense: int, loaded: list[str],
) -> None:  # fmt: skip
    """Seven batches of the dense model come first; whichever model was at work is still there."""
    single, loads = one_model
    with pytest.raises(InterruptedRun):
        interrupted(n_batches, lambda: scan(single, data, **SETTINGS, run=tmp_path / "run"))
    assert ("pruned" in {model for model, _ in done}) == (n_batches == 12)
    assert len(list((tmp_path / "run" / UNFINISHED).glob("dense_*.safetensors"))) == (n_dense if n_batches == 6 else 2)
    done.clear()
    loads.clear()
    scan(single, data, **SETTINGS, run=tmp_path / "run")
    assert sum(model == "dense" for model, _ in done) == N_SHARDS - n_dense
    assert loads == loaded
    assert files(tmp_path / "run") == files(whole)
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_selectors_that_need_both_models_are_refused(found, data: Data, one_model: Any, done: Passes) -> None:
    single, _ = one_model
    for name in ("attribution", "gradient", "patching"):
        with pytest.raises(RequestError, match=f"expected both models in memory for {name}, got one at a time"):
            scan(single, data, selectors=("probe", name))
    assert not done
    with pytest.raises(RequestError, match="expected both models in memory for this selector"):
        Evidence(single, [], found.heads, found.components).require_models()


@pytest.mark.parametrize("name", ["state", "features_00000"])
def test_a_flipped_byte_of_the_state_is_noticed(
    name: str, pair: Pair, data: Data, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InterruptedRun):
        interrupted(6, lambda: scan(pair, data, **SETTINGS, run=run))
    flip_byte(run / UNFINISHED / f"{name}.safetensors")
    scan(pair, data, **SETTINGS, run=run)
    assert "got a changed file" in caplog.text
    assert files(run) == files(whole)


def test_a_missing_file_of_a_finished_shard_is_named(pair: Pair, data: Data, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        interrupted(6, lambda: scan(pair, data, **SETTINGS, run=tmp_path))
    next((tmp_path / UNFINISHED).glob("features_*.safetensors")).unlink()
    with pytest.raises(LensError, match=r"got a missing or damaged file; delete .* and scan again"):
        scan(pair, data, **SETTINGS, run=tmp_path)


def test_an_unfinished_scan_is_not_taken_for_the_one_that_it_replaces(
    pair: Pair, data: Data, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(InterruptedRun):
        interrupted(6, lambda: scan(pair, data, **SETTINGS, run=run))
    assert not has_scan(run)
    scan(pair, data, **SETTINGS, run=run)
    (run / UNFINISHED).mkdir()  # a process killed before it could delete its state
    assert has_scan(run)
    assert not (run / UNFINISHED).exists()
