"""The command line: files written, exit codes, one-line errors, and nothing left behind by a refusal."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import call, refused
from support.places import ROOT
from support.restorations import restoration_of
from support.tiers import mostly_slow
from support.tiny import build_model, save_model
from transformers import AutoModelForCausalLM

import lcc_lens
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import DiskFullError, RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.heads import Head
from lcc_lens.core.outputs.folders import MARK
from lcc_lens.frontends.cli.main import COMMANDS, parse, run
from lcc_lens.models.hooked.losses import sequence_loss


def test_whole_method_from_the_command_line(
    dense_dir: Path, text_file: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned, work, out = tmp_path / "pruned", tmp_path / "run", tmp_path / "out"
    tables = {name: tmp_path / f"{name}.csv" for name in ("prune", "scan", "restore", "export", "figures")}
    few = ("--calibration", text_file, "--n-samples", 4, "--seq-len", 40, "--out", tables["prune"])
    assert call("prune", dense_dir, pruned, *few) == 0
    data = ("--data", question_file, "--examples", 8, "--out", tables["scan"])
    assert call("scan", dense_dir, pruned, work, *data) == 0
    settings = ("--data", question_file, "--heads", 0.5, "--selector", "mse", "--lr", 0.1, "--checkpoint-every", 1)
    assert call("restore", dense_dir, pruned, work, *settings, "--out", tables["restore"]) == 0
    assert call("export", work, out, "--out", tables["export"]) == 0
    assert call("explore", work) == 0
    assert "<script" in (work / "explorer.html").read_text()
    assert call("figures", work, tmp_path / "figures", "--formats", "html", "--out", tables["figures"]) == 0
    drawn = {path.suffix for path in (tmp_path / "figures").iterdir() if path.name != MARK}
    assert drawn == {".html", ".js"}
    tasks = ("--tasks", text_file, question_file, "--length", 50, "--limit", 4)
    assert call("eval", dense_dir, pruned, out, *tasks, "--out", tmp_path / "results.json") == 0

    sha = {name: sha256_file(d / "model.safetensors") for name, d in (("dense", dense_dir), ("pruned", pruned))}
    for name in ("config.json", "scan.json", "metrics.json"):
        record = json.loads((work / name).read_text())
        assert (record["dense_sha256"], record["pruned_sha256"]) == (sha["dense"], sha["pruned"])
        assert record["version"]
        assert record["seed"] == 0
    assert len(json.loads((work / "config.json").read_text())["restore"]["heads"]) == 8
    assert (work / "log.jsonl").read_text().count("\n") >= 2
    assert (work / "loss_map.html").stat().st_size > 1_000_000
    assert json.loads((pruned / "pruning.json").read_text())["sparsity"] == pytest.approx(0.5, abs=0.01)
    results = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(results) == ["dense", "pruned", "out"]
    assert results["out"]["path"] == str(out)
    assert results["out"]["tasks"][str(text_file)]["perplexity"] > 1
    assert results["out"]["tasks"][str(text_file)]["tokens"] == 4 * 49
    assert AutoModelForCausalLM.from_pretrained(out).config.attention_bias is True
    assert "recovered" in capsys.readouterr().out
    heads = {name: [line.split(",") for line in file.read_text().splitlines()] for name, file in tables.items()}
    assert {name: rows[0][0] for name, rows in heads.items()} == {
        "prune": "matrix", "scan": "layer", "restore": "model", "export": "name", "figures": "figure",
    }  # fmt: skip
    assert {name: len(rows) for name, rows in heads.items() if name in ("prune", "scan", "restore")} == {
        "prune": 1 + 3 * 7, "scan": 1 + 3 * 5, "restore": 1 + 3,
    }  # fmt: skip


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("explore", "rewrite-fit")])
def test_a_table_of_another_kind_is_refused_before_anything_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(COMMANDS[command].example)
    option = "--table" if command == "recipe" else "--out"
    refused(capsys, 2, "expected a file ending in .csv or .json, got t.xlsx", command, *arguments, option, "t.xlsx")
    assert not list(tmp_path.iterdir())


def test_an_input_is_not_replaced_by_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preferences = tmp_path / "preferences.json"
    preferences.write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    before = preferences.read_text()
    refused(capsys, 2, "an earlier output of this command", "merits", preferences, "--out", preferences)
    assert preferences.read_text() == before


def test_doctor_writes_its_findings(pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", pruned_dir, "--out", tmp_path / "doctor.json", "--quiet") == 0
    rows = json.loads((tmp_path / "doctor.json").read_text())
    assert {row["subject"] for row in rows} == {"model", "machine"}
    capsys.readouterr()
    assert call("doctor", pruned_dir, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reference"] == str(pruned_dir)
    assert [row["name"] for row in rows] == [row["name"] for row in (*printed["model"], *printed["machine"])]
    assert call("eval", pruned_dir, "--tasks", pruned_dir.parent / "text.txt", "--limit", 2, "--length", 20,
                "--out", tmp_path / "scores.csv") == 0  # fmt: skip
    assert (tmp_path / "scores.csv").read_text().startswith("model,task,perplexity,")


def test_results_are_shown_where_the_disk_is_full_by_then(
    dense_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr("lcc_lens.frontends.cli.measuring.write_json", full)
    assert (
        call("eval", dense_dir, "--tasks", text_file, "--limit", 1, "--length", 20, "--out", tmp_path / "r.json") == 1
    )
    said = capsys.readouterr()
    assert "perplexity" in said.out
    assert "no space left" in said.err


def test_magnitude_and_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    model = save_model(build_model(head_dim=8), tmp_path / "dense")
    assert call("prune", model, tmp_path / "out", "--method", "magnitude", "--pattern", "2:4", "--quiet") == 0
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert capsys.readouterr().err == ""
    unread = ("--calibration", "nope", "--seq-len", 99999, "--overwrite")
    assert call("prune", model, tmp_path / "out", "--method", "magnitude", "--pattern", "3:4", *unread) == 0
    assert "magnitude reads no calibration data: ignored what was named for it, and its length" in caplog.text
    assert "unstructured, pruned to 3:4" in capsys.readouterr().out
    assert call("report", tmp_path / "out", "--no-latency", "--out", tmp_path / "report.json") == 0
    assert "pruned to 3:4" in " ".join(capsys.readouterr().out.split())
    (entry,) = json.loads((tmp_path / "report.json").read_text())["models"].values()
    assert (entry["pattern"], entry["pattern_asked"]) == ("unstructured", "3:4")
    refused(capsys, 2, "expected a pattern N:M, got ''", "prune", model, tmp_path / "x", "--pattern", "")
    message = "expected a sparsity or a pattern, got both"
    refused(capsys, 2, message, "prune", model, tmp_path / "x", "--pattern", "2:4", "--sparsity", 0.3)


@pytest.mark.slow
def test_interrupted_restore_goes_on(
    dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lcc_lens.restoration import restore as recipe

    class Stopping(recipe.RunFolder):
        def add(self, step) -> None:
            super().add(step)
            if step.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    data = ("--data", question_file, "--scan-data", question_file, "--heads", 1, "--selector", "mse", "--batch-size", 4)
    for name in ("whole", "broken"):
        with monkeypatch.context() as patch:
            if name == "broken":
                patch.setattr(recipe, "RunFolder", Stopping)
            code = call("restore", dense_dir, pruned_dir, tmp_path / name, *data, "--quiet")
        assert code == (0 if name == "whole" else 130)
    assert "stopped after step 2" in capsys.readouterr().err
    assert call("restore", dense_dir, pruned_dir, tmp_path / "broken", *data, "--resume", "--quiet") == 0
    whole, resumed = (load_file(tmp_path / n / "restoration.safetensors") for n in ("whole", "broken"))
    assert all((whole[key] == resumed[key]).all() for key in whole)
    capsys.readouterr()
    message = "holds a restoration already"
    refused(capsys, 2, message, "restore", dense_dir, pruned_dir, tmp_path / "whole", *data)


def test_missing_paths(dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    refused(capsys, 2, "which is not there", "prune", nowhere, out, "--method", "magnitude")
    refused(capsys, 2, "which is not there", "scan", dense_dir, nowhere, out)
    refused(capsys, 2, "got none; make it with lcc-lens restore", "export", nowhere, out)
    refused(capsys, 2, "which is not there", "eval", nowhere, "--tasks", "boolq")
    refused(capsys, 2, "got nothing there", "prune", dense_dir, out, "--calibration", tmp_path / "gone.txt")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_unknown_task_is_refused_before_any_model_is_loaded(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Index:
        all_tasks = ("boolq", "lambada")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    refused(capsys, 2, "expected a task, got 'frobnicate'", "eval", tmp_path / "nowhere", "--tasks", "frobnicate")
    refused(capsys, 2, "expected the file", "eval", dense_dir, "--tasks", tmp_path / "gone.jsonl")


def test_existing_scan_is_kept(
    dense_dir: Path, pruned_dir: Path, question_file: Path, found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found.save(tmp_path)
    before = (tmp_path / "scan.json").read_text()
    refused(capsys, 2, "holds a scan already", "scan", dense_dir, pruned_dir, tmp_path, "--data", question_file)
    assert (tmp_path / "scan.json").read_text() == before


def test_mismatched_pair_writes_nothing(
    dense_dir: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(build_model(num_hidden_layers=2), tmp_path / "other")
    message = "expected two models of the same shape"
    refused(capsys, 2, message, "scan", dense_dir, other, tmp_path / "run", "--data", question_file)
    assert not (tmp_path / "run").exists()


def test_too_little_calibration_text(
    dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "got text for"
    refused(capsys, 2, message, "prune", dense_dir, tmp_path / "o", "--calibration", text_file, "--n-samples", 9999)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["frob"], ["prune"], ["prune", "a", "b", "--method", "frob"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_and_ends_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--quiet" in text
    assert "usage: lcc-lens" in text
    assert "None" not in text
    example = text.strip().splitlines()[-1].removeprefix("Example: lcc-lens ")
    assert type(parse(shlex.split(example))) is COMMANDS[command]


def test_every_help_text_is_one_line_in_the_code() -> None:
    """Tyro keeps a line break of the code in the middle of a sentence."""
    for file in (ROOT / "lcc_lens" / "frontends" / "cli").glob("*.py"):
        for found in ast.walk(ast.parse(file.read_text())):
            for field, text in itertools.pairwise(found.body if isinstance(found, ast.ClassDef) else ()):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert "\n" not in ast.literal_eval(text.value), (file.name, ast.unparse(field.target))


def test_help_groups_options_and_pairs_what_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    run(["restore", "--help"])
    text = capsys.readouterr().out
    places = [text.index(option) for option in ("--method", "data options", "training options", "memory options")]
    assert places == sorted(places)
    run(["report", "--help"])
    assert "--latency, --no-latency" in capsys.readouterr().out
    assert parse(["report", "smollm2", "--no-latency"]).timing.latency is False


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"lcc-lens {lcc_lens.__version__}\n"
    assert lcc_lens.__version__ == package_version() != "0+unknown"


def test_unexpected_failure_is_one_line(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcc_lens.pruning import jobs as pruning_jobs

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(pruning_jobs, "prune_checkpoint", broken)
    message = "ZeroDivisionError: first line"
    refused(capsys, 1, message, "prune", dense_dir, tmp_path / "out", "--method", "magnitude")

    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning_jobs, "prune_checkpoint", stopped)
    message = "interrupted; finished steps are kept"
    refused(capsys, 130, message, "prune", dense_dir, tmp_path / "out", "--method", "magnitude")
    monkeypatch.setattr("lcc_lens.evaluation.doctor.examine", stopped)
    refused(capsys, 130, "interrupted; the same command starts anew", "doctor", dense_dir)


@pytest.mark.parametrize(
    ("stop", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was measured is in"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory"),
        (RequestError("expected a model, got none"), 1, "expected a model, got none"),
    ],
)
def test_finished_tasks_are_given_where_eval_is_stopped(
    stop: BaseException, code: int, says: str, dense_dir: Path, pruned_dir: Path, text_file: Path, question_file: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[int] = []

    def stopped_at_the_fourth(*arguments: Any, **settings: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise stop
        return sequence_loss(*arguments, **settings)

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("lcc_lens.evaluation.evaluate.sequence_loss", stopped_at_the_fourth)
    out, tasks = tmp_path / "r.json", (text_file, question_file)
    command = ("eval", dense_dir, pruned_dir, "--tasks", *tasks, "--limit", 2, "--length", 48, "--quiet")
    assert call(*command, "--out", out) == code
    said, results = capsys.readouterr(), json.loads(out.read_text())
    assert says in said.err
    assert f"not measured: pruned on {question_file}" in said.out
    assert results["missing"] == {"pruned": [str(question_file)]}
    measured = {name: [*model["tasks"]] for name, model in results["models"].items()}
    assert measured == {"dense": [*map(str, tasks)], "pruned": [str(text_file)]}
    assert call(*command, "--out", out) == 0
    whole = json.loads(out.read_text())
    assert "missing" not in whole
    assert whole["models"]["dense"] == results["models"]["dense"]


def test_text_is_scanned_and_trained_in_as_many_blocks_as_asked(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paragraphs = [f"Paragraph {i}: {i} and {i + 1} make {2 * i + 1}, as all agree." for i in range(300)]
    texts = tmp_path / "long.txt", tmp_path / "long.jsonl"
    texts[0].write_text("\n\n".join(paragraphs))
    texts[1].write_text("\n".join(json.dumps({"text": paragraph}) for paragraph in paragraphs))
    losses = []
    for text in texts:
        run = tmp_path / f"run_{text.suffix[1:]}"
        settings = ("--data", text, "--scan-data", text, "--scan-examples", 3, "--examples", 10, "--max-length", 32)
        assert call("restore", dense_dir, pruned_dir, run, *settings, "--selector", "mse", "--quiet") == 0
        assert json.loads((run / "scan.json").read_text())["n_examples"] == 3
        losses.append(json.loads((run / "metrics.json").read_text())["validation"])
        assert losses[-1]["sequences"] == 8
        assert (run / "log.jsonl").read_text().count("\n") == 2
    assert losses[0] == losses[1]


def test_the_papers_settings_at_once_and_options_that_go_before_them(
    dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", question_file, "--scan-data", question_file, "--paper")
    assert call("restore", dense_dir, pruned_dir, tmp_path / "run", *data, "--epochs", 1) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["restore"]
    scanned = json.loads((tmp_path / "run" / "scan.json").read_text())["selected_by"]
    assert (settings["epochs"], settings["lr"], settings["batch_size"], len(settings["heads"])) == (1, 1e-3, 8, 4)
    assert scanned["probe"]["settings"]["solver"] == "published"
    assert "--method best recovers most in the committed study" in capsys.readouterr().out


@pytest.mark.parametrize("method", mostly_slow(["offset", "mean-shift", "random-basis"], "mean-shift"))
def test_controls_of_the_method_export_like_it(
    method: str, dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "run", tmp_path / "out"
    settings = ("--data", question_file, "--scan-data", question_file, "--selector", "mse", "--quiet")
    assert call("restore", dense_dir, pruned_dir, work, "--method", method, *settings) == 0
    assert call("export", work, out, "--quiet") == 0
    card = (out / "README.md").read_text()
    trained = {"offset": 4 * 6, "mean-shift": 0, "random-basis": 4 * 12}[method]
    assert f"| method | {method} |" in card
    assert f"| trained parameters | {trained} |" in card


def test_refit_by_command(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--calibration", text_file, text_file, "--n-samples", 3, "--seq-len", 16, "--quiet")
    assert call("refit", dense_dir, pruned_dir, tmp_path / "out", *few) == 0
    assert "matrices refitted, zeros kept" in capsys.readouterr().out
    old, new = (load_file(path / "model.safetensors") for path in (pruned_dir, tmp_path / "out"))
    assert all(((old[name] == 0) == (new[name] == 0)).all() for name in old if old[name].ndim > 1)
    assert any((old[name] != new[name]).any() for name in old)
    record = json.loads((tmp_path / "out" / "refit.json").read_text())
    assert record["calibration"]["sequences"] == 3
    assert record["calibration"]["groups"]
    refused(capsys, 2, "expected at least one calibration sequence of each data set, got 1 for 2", "refit", dense_dir,
            pruned_dir, tmp_path / "other", *few[:4], 1)  # fmt: skip
    refused(capsys, 2, "exists already", "refit", dense_dir, pruned_dir, tmp_path / "out", *few)
    assert not (tmp_path / "other").exists()


def test_reconstruct_by_command(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--calibration", text_file, "--n-samples", 5, "--seq-len", 16, "--window", 2, "--quiet")
    table = tmp_path / "table.csv"
    assert call("reconstruct", dense_dir, pruned_dir, tmp_path / "out", *few, "--out", table) == 0
    assert "windows of layers trained, zeros kept" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert [window["last_layer"] for window in record["windows"]] == [1, 2]
    assert table.read_text().splitlines()[0] == ",".join(record["windows"][0])
    refused(capsys, 2, "exists already", "reconstruct", dense_dir, pruned_dir, tmp_path / "out", *few)


def test_refit_of_other_models_is_refused_by_command(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--calibration", text_file, "--n-samples", 4, "--seq-len", 48, "--quiet")
    out, gone = tmp_path / "out", tmp_path / "gone"
    other_heads = save_model(build_model(num_key_value_heads=5), tmp_path / "heads")
    sliced = ("--method", "slimgpt", "--sparsity", 0.3, "--sliced")
    assert call("prune", dense_dir, tmp_path / "sliced", *sliced, *few) == 0
    capsys.readouterr()
    refused(capsys, 2, f"got '{gone}', which is not there", "refit", gone, pruned_dir, out, *few)
    refused(capsys, 2, f"got '{gone}', which is not there", "refit", dense_dir, gone, out, *few)
    mismatch = "expected a dense model and the same model with zeros"
    refused(capsys, 2, mismatch, "refit", dense_dir, tmp_path / "sliced", out, *few)
    refused(capsys, 2, mismatch, "refit", other_heads, pruned_dir, out, *few)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "sliced"]


def test_explore_takes_one_run_or_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "expected one run, or two to compare, got 3", "explore", *(tmp_path / name for name in "abc"))
    refused(capsys, 2, "expected", "explore", tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_doctor_by_command(dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", dense_dir) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (" loads under hooks", "constants in an export", "number format"))
    broken = save_model(build_model(vocab_size=200), tmp_path / "broken")
    refused(
        capsys, 1, f"expected a model that loads and passes its checks, got {broken}; see ✗ above", "doctor", broken
    )
    assert call("doctor", tmp_path / "nowhere", "--quiet") == 1
    found = capsys.readouterr()
    assert "✗ files" in found.out
    assert "number format" in found.out
    assert len(found.err.strip().splitlines()) == 1


def test_export_in_another_format_and_other_files_is_sent(
    pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcc_lens.exporters import hub

    sent: list[tuple[Path, str]] = []

    def send(directory: Path, repository: str) -> str:
        assert (directory / "config.json").exists()  # verified, under its name
        sent.append((directory, repository))
        return "https://hub/commit"

    monkeypatch.setattr(hub, "push_to_hub", send)
    work, out = tmp_path / "run", tmp_path / "out"
    restoration_of(pruned_dir, heads=[Head(1, 2)]).save(work)
    refused(capsys, 2, "expected a repository owner/name", "export", work, out, "--push-to-hub", "restored")
    refused(capsys, 2, "expected a size such as 5GB", "export", work, out, "--max-shard-size", "large")
    assert call("export", work, out, "--dtype", "int8") == 2
    assert not out.exists()
    capsys.readouterr()
    settings = ("--dtype", "bfloat16", "--max-shard-size", "20KB", "--push-to-hub", "me/restored")
    assert call("export", work, out, *settings, "--quiet") == 0
    assert "https://hub/commit" in capsys.readouterr().out
    assert sent == [(out, "me/restored")]
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).config.attention_bias is True
