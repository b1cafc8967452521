"""Task-specific recovery: which examples serve what, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import call, refused
from support.small_sets import write_sets

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import encode, load_data, load_records
from lcc_lens.evaluation.lm_eval_tasks import evaluate_task
from lcc_lens.evaluation.task_recovery import RECOVERY_TASKS, load_task_data
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_sets(tmp_path / "sets")
    monkeypatch.setenv("LCC_LENS_DATA", str(root))
    return root


@pytest.mark.parametrize("task", RECOVERY_TASKS)
def test_examples_of_a_task_are_right_answers_and_share_nothing(sets: Path, task: str) -> None:
    training, validation = load_task_data(task, 30, seed=3)
    probe, held_out = load_data(task, role="probe"), load_data(task, role="held-out")
    assert (len(training), training.role, validation.role) == (30, "train", "train")
    assert len(validation) == 8
    for first, second in ((training, validation), (training, probe), (training, held_out), (validation, held_out)):
        assert not first.groups & second.groups
    prompts = {example.prompt: example.response for example in load_data(task).examples}
    assert all(prompts[example.prompt] == example.response for example in training.examples)


def test_other_tasks_and_too_few_examples_are_refused(sets: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a task to recover \(boolq, .*\), got 'piqa'"):
        load_task_data("piqa")
    with pytest.raises(RequestError, match="expected 200 training examples of rte and 20 more to validate on, got "):
        load_task_data("rte")
    with pytest.raises(RequestError, match="expected at least 2 training examples of rte, got 1"):
        load_task_data("rte", 1)


@pytest.mark.parametrize(
    "task",
    # one of two choices and one of several; the others differ in their examples, which the first test reads
    [pytest.param(t, marks=() if t in ("rte", "openbookqa") else pytest.mark.slow) for t in RECOVERY_TASKS],
)
@pytest.mark.slow
def test_a_task_is_recovered_by_one_command(
    sets: Path, task: str, dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the exported model, measured as a plain one."""
    run, out = tmp_path / "run", tmp_path / "out"
    few = ("--task", task, "--examples", 30, "--items", 12, "--max-length", 128, "--quiet")
    assert call("restore", dense_dir, pruned_dir, run, *few, "--heads", 1, "--lr", 0.1) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["losses"].keys() == {"dense", "pruned", "restored"}
    found = metrics["recovery"]
    assert json.loads((run / "scan.json").read_text())["data"] == task
    settings = json.loads((run / "config.json").read_text())["restore"]
    assert (settings["epochs"], settings["limit"]) == (3, 30)
    assert call("export", run, out, "--quiet") == 0
    records = load_records(task, 12, role="held-out", seed=0)
    for name, path in (("dense", dense_dir), ("pruned", pruned_dir), ("restored", out)):
        model, tokenizer = load_plain(path), load_tokenizer(path)
        scores = found["models"][name]["tasks"]
        assert scores[task] == evaluate_task(model, tokenizer, task, records=records, with_items=True)
        assert scores[task]["n"] == 12
        blocks = encode(load_data("wikitext", role="held-out"), tokenizer, max_length=512, limit=16)
        assert scores["wikitext"]["loss"] == pytest.approx(sequence_loss(model, blocks)["loss"], rel=1e-5)
    losses = [found["models"][name]["tasks"]["wikitext"]["loss"] for name in ("pruned", "restored")]
    assert abs(losses[0] - losses[1]) > 1e-3
    items = [found["models"][name]["tasks"][task]["items"].count("1") for name in ("pruned", "restored")]
    assert found["gain"] == pytest.approx((items[1] - items[0]) / 12)
    assert found["gain_interval"][0] <= found["gain"] <= found["gain_interval"][1]
    assert "accuracy of the restored model above the pruned one's" in capsys.readouterr().out


def test_requests_that_contradict_a_task_are_refused(
    sets: Path, found, dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, rte = (dense_dir, pruned_dir, tmp_path / "run"), ("--task", "rte", "--examples", 30)
    refused(capsys, 2, "expected a task or data of your own, got both", "restore", *pair, *rte, "--data", "alpaca")
    refused(capsys, 2, "expected 200 training examples of rte", "restore", *pair, "--task", "rte")
    refused(capsys, 2, "got nothing there", "restore", *pair, *rte, "--text", tmp_path / "gone.txt")
    refused(capsys, 2, "expected running text to measure", "restore", *pair, *rte, "--text", "boolq")
    refused(capsys, 2, "expected --examples of at least 1, got 0", "restore", *pair, "--examples", 0)
    assert call("restore", *pair, "--task", "piqa") == 2
    capsys.readouterr()
    assert not (tmp_path / "run").exists()
    found.save(tmp_path / "run")
    refused(capsys, 2, "expected a scan of rte in", "restore", *pair, *rte)


@pytest.mark.slow
def test_the_best_method_recovers_a_task_too(
    sets: Path, text_file: Path, dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pair is the refitted model's, but the pruned one is measured as it was."""
    from lcc_lens.restoration import refitted

    real = refitted.refit
    monkeypatch.setattr(
        refitted, "refit", lambda *pair, **_: real(*pair, calibration=str(text_file), n_samples=3, seq_len=48)
    )
    few = ("--task", "arc_easy", "--examples", 30, "--items", 12, "--method", "best", "--quiet")
    assert call("restore", dense_dir, pruned_dir, tmp_path / "run", *few) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["recovery"]["models"]
    model, tokenizer = load_plain(pruned_dir), load_tokenizer(pruned_dir)
    blocks = encode(load_data("wikitext", role="held-out"), tokenizer, max_length=512, limit=16)
    plain = sequence_loss(model, blocks)["loss"]
    assert found["pruned"]["tasks"]["wikitext"]["loss"] == pytest.approx(plain, rel=1e-5)
    assert abs(found["restored"]["tasks"]["wikitext"]["loss"] - plain) > 1e-3
