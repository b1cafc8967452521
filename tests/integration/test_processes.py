"""Runs that are killed lose little, and several processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copyfile, copytree

import pytest
import torch
from support import launched
from support.places import ROOT

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, temporary
from lcc_lens.core.machine import processes
from lcc_lens.data.datasets import load_data
from lcc_lens.models.hooked.offloading import shard_layers
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration

LAUNCH = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)  # fmt: skip


@pytest.fixture(scope="module")
def work(dense_dir: Path, pruned_dir: Path, question_file: Path, found: Scan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    copytree(dense_dir, folder / "dense")
    copytree(pruned_dir, folder / "pruned")
    copyfile(question_file, folder / "questions.jsonl")
    found.save(folder / "scan")
    return folder


@pytest.fixture(scope="module")
def unbroken(work: Path) -> Restoration:
    return launched.run(work, "unbroken")


def started(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, text=True, **pipes)


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_bits(first: Restoration, second: Restoration) -> bool:
    tensors, others = first._tensors(), second._tensors()
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.slow
def test_killed_process_loses_little_and_never_the_best(work: Path, unbroken: Restoration) -> None:
    with started("support.launched", str(work), "killed", "0", "ask") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        reported = 0
        while reported < 8:
            reported = int(process.stdout.readline().split()[1])
            if reported < 8:
                process.stdin.write("\n")
                process.stdin.flush()
        process.kill()
        process.wait()
    assert process.returncode == -9
    run = work / "killed"
    assert not (run / "restoration.safetensors").exists()
    measured = [step["validation_loss"] for step in logged(run) if step["validation_loss"] is not None][:-1]
    record = read_tensors(run / "checkpoint.safetensors")[1]
    assert 8 - int(record["step"]) <= launched.EVERY
    assert float(record["best_loss"]) == min(float(record["first_loss"]), *measured)
    assert min(measured) < float(record["first_loss"])
    half = temporary(run / "checkpoint.safetensors")
    half = half.with_name(half.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
    half.write_bytes(b"half")  # as if it had been killed while it wrote
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    resumed = launched.run(work, "killed", resume=True)
    assert same_bits(resumed, unbroken)
    assert resumed.record.losses == unbroken.record.losses
    assert not half.exists()
    steps = [[(step["step"], step["loss"]) for step in logged(work / name)] for name in ("killed", "unbroken")]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 8


@pytest.mark.slow
def test_finished_run_resumes_to_itself(work: Path, unbroken: Restoration) -> None:
    before = logged(work / "unbroken")
    assert same_bits(launched.run(work, "unbroken", resume=True), unbroken)
    assert logged(work / "unbroken") == before


@pytest.mark.slow
def test_two_processes_give_what_one_gives(work: Path, unbroken: Restoration) -> None:
    with started(*LAUNCH, "-m", "support.launched", str(work), "two", "0", "go") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("step 3") == 2  # both took every step
    together = Restoration.load(work / "two")
    assert together.record.losses["restored"] == pytest.approx(unbroken.record.losses["restored"], rel=1e-4)
    assert unbroken.record.losses["restored"] < unbroken.record.losses["pruned"] - 0.1
    expected, got = unbroken._tensors(), together._tensors()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert torch.allclose(got[name].double(), tensor.double(), atol=1e-3 * scale), name
    steps = [[(step["step"], step["n_targets"]) for step in logged(work / name)] for name in ("two", "unbroken")]
    assert steps[0] == steps[1]  # one process wrote, and counted the tokens of both
    losses = [[step["loss"] for step in logged(work / name)] for name in ("two", "unbroken")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_killed_worker_ends_the_run_and_its_checkpoint_goes_on(work: Path, unbroken: Restoration) -> None:
    with started(*LAUNCH, "-m", "support.launched", str(work), "worker", "5", "go") as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "Signal 9" in errors or "exitcode  : -9" in errors
    assert not (work / "worker" / "restoration.safetensors").exists()
    assert 5 - int(read_tensors(work / "worker" / "checkpoint.safetensors")[1]["step"]) <= launched.EVERY
    resumed = launched.run(work, "worker", resume=True)  # alone
    assert resumed.record.losses["restored"] == pytest.approx(unbroken.record.losses["restored"], rel=1e-4)


@pytest.mark.slow
def test_commands_in_two_processes_give_what_one_gives(work: Path) -> None:
    models = (str(work / "dense"), str(work / "pruned"))
    scanning = ("--data", str(work / "questions.jsonl"), "--examples", "200")
    settings = ("--data", str(work / "questions.jsonl"), "--selector", "mse", "--heads", "0.5", "--lr", "0.1")
    said: list[int] = []
    for name, launch in (("alone", ("lcc_lens",)), ("launched", (*LAUNCH, "-m", "lcc_lens"))):
        run = str(work / f"{name}-commands")
        for arguments in (("scan", *models, run, *scanning), ("restore", *models, run, *settings)):
            with started(*launch, *arguments) as process:
                output, errors = process.communicate()
            assert process.returncode == 0, errors
            said.append(output.count(run))
    assert said[:2] == said[2:]  # one process says what came of it
    assert min(said) > 0
    alone, together = (work / f"{name}-commands" for name in ("alone", "launched"))
    for file in ("scan.safetensors", "scan.json"):
        assert (alone / file).read_bytes() == (together / file).read_bytes()
    first, second = (Restoration.load(run) for run in (alone, together))
    assert first.heads == second.heads
    assert float(first.constants.abs().max()) > 0.01
    assert torch.allclose(first.constants, second.constants, atol=1e-3 * float(first.constants.abs().max()))
    for name, loss in first.record.losses.items():
        assert second.record.losses[name] == pytest.approx(loss, rel=1e-4)
    assert first.record.losses["restored"] < first.record.losses["pruned"] - 0.01


@pytest.mark.slow
def test_killed_worker_ends_a_scan_and_finished_shards_stay(work: Path) -> None:
    with started(*LAUNCH, "-m", "support.launched", str(work), "scan-killed", "3", "scan") as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "Signal 9" in errors or "exitcode  : -9" in errors
    assert not (work / "scan-killed" / "scan.json").exists()
    state = work / "scan-killed" / ".scan.unfinished"
    assert len(list(state.glob("features_*.safetensors"))) >= 1
    for name in ("scan-killed", "scan-whole"):  # alone
        launched.scan_until(work, name, 0)
    assert not state.exists()
    for file in ("scan.safetensors", "scan.json"):
        assert (work / "scan-killed" / file).read_bytes() == (work / "scan-whole" / file).read_bytes()


@pytest.mark.slow
def test_layers_divided_among_processes_give_the_same_scan(work: Path, pair: Pair) -> None:
    with started(*LAUNCH, "-m", "support.launched", str(work), "sharded", "0", "sharded") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    expected = scan(pair, load_data(str(work / "questions.jsonl"), n=20), display=2)._tensors()
    found = Scan.load(work / "sharded")._tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_layers_divided_among_processes_are_trained_through(work: Path) -> None:
    with started(*LAUNCH, "-m", "support.launched", str(work), "trained", "0", "restore-sharded") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    expected = launched.restore_sharded(work, "trained-alone")._tensors()
    found = Restoration.load(work / "trained")._tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name
    assert logged(work / "trained")[-1]["loss"] == pytest.approx(logged(work / "trained-alone")[-1]["loss"], rel=1e-5)


def test_weights_that_processes_share_are_not_changed(
    pair: Pair, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.restoration.checks.is_sharded", lambda _: True)
    with pytest.raises(RequestError, match=r"expected a method of constants .* several processes share, got low-rank"):
        restore(pair, None, (), load_data(str(question_file)), method="low-rank")


def test_one_process_divides_no_model(pair: Pair) -> None:
    with pytest.raises(RequestError, match="expected several processes to shard a model over, got one"):
        shard_layers(pair.pruned)


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's, without a launcher
    monkeypatch.setattr(processes, "_state", lambda: pytest.fail("accelerate was asked"))
    tensors = [torch.ones(2)]
    assert processes.summed(tensors)[0] is tensors[0]
    assert processes.own_part([1, 2, 3]) == [1, 2, 3]
    with processes.first_process_first():
        pass
    assert processes.is_first_process()


def test_lost_process_is_said_in_one_line() -> None:
    message = r"another process of this run has ended \(Connection closed by peer\)"
    with pytest.raises(LensError, match=message), processes._others_alive():
        raise RuntimeError("Connection closed by peer\nmore")
