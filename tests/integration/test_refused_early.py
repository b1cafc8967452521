"""Requests that cannot be served are refused before anything is loaded or written, whatever the command."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from support.commands import refused
from support.tiny import build_model, save_model

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.ranges import Range, ranges_of
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.task_recovery import TaskMeasures
from lcc_lens.frontends.cli.main import COMMANDS
from lcc_lens.frontends.demo import DemoConfig
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.self_written import DenseWriter
from lcc_lens.prompting.rewriting.jobs import PreferenceSource
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.reconstruct.reconstruct import ReconstructConfig
from lcc_lens.pruning.refit.refit import RefitConfig

#: What a command needs before its options: models, a recipe or runs that are not there.
POSITIONALS = {
    "prune": 2, "refit": 3, "reconstruct": 3, "scan": 3, "restore": 3, "compare": 3, "recipe": 1, "export": 2,
    "eval": 1, "report": 1, "figures": 2, "explore": 1, "merits": 1, "prompts": 3, "rewrite": 2, "rewrite-fit": 3,
    "doctor": 1, "demo": 0,
}  # fmt: skip


def numbers(kind: Any) -> Iterator[tuple[str, list[Range]]]:
    """Every option of a command that takes a number, with its ranges."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint)
        elif {int, float} & set(leaves(hint)):
            yield f"--{name.replace('_', '-')}", [found for _, found in [ranges_of(kind).get(name, (0, None))] if found]


def leaves(hint: Any) -> Iterator[Any]:
    """The types that a type is made of."""
    yield hint
    for part in get_args(hint):
        yield from leaves(part)


OPTIONS = [(command, *found) for command, kind in COMMANDS.items() for found in numbers(kind)]


def test_every_number_has_a_range() -> None:
    assert len(OPTIONS) > 45
    assert [option for _, option, ranges in OPTIONS if not ranges and option != "--positions"] == []


@pytest.mark.parametrize(("command", "option", "ranges"), [found for found in OPTIONS if found[2]])
def test_a_number_out_of_range_is_refused(
    command: str, option: str, ranges: list[Range], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / f"nowhere{place}" for place in range(POSITIONALS[command])]
    refused(capsys, 2, f"expected {option} {ranges[0]}, got -3; choose another number", command, *places, option, -3)
    assert list(tmp_path.iterdir()) == []


def test_a_percentage_is_refused_with_the_fraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [tmp_path / name for name in ("dense", "pruned", "run")]
    refused(
        capsys, 2, "expected --heads above 0 and at most 1, got 25; write 0.25 for 25 %", "restore", *where, "--heads",
        25,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "options", "near"),
    [
        ("prune", ["--method", "wandaa"], "wanda"),
        ("prune", ["--calibration", "boolqq"], "boolq"),
        ("refit", ["--calibration", "boolqq"], "boolq"),
        ("scan", ["--data", "boolqq"], "boolq"),
        ("scan", ["--data", "boolq", "--selectors", "atribution"], "attribution"),
        ("restore", ["--method", "lccc"], "lcc"),
        ("restore", ["--selector", "atribution"], "attribution"),
        ("restore", ["--data", "boolqq"], "boolq"),
        ("restore", ["--objective", "distilation"], "distillation"),
        ("restore", ["--data", "boolq", "--scan-data", "boolqq"], "boolq"),
        ("compare", ["--methods", "loraa"], "lora"),
        ("compare", ["--methods", "lcc@denze"], "dense"),
        ("compare", ["--selector", "atribution"], "attribution"),
        ("compare", ["--data", "boolqq"], "boolq"),
        ("compare", ["--texts", "boolqq"], "boolq"),
        pytest.param("eval", ["--tasks", "boolqq"], "boolq", marks=pytest.mark.slow),  # reads all of lm-eval's tasks
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    command: str, options: list[str], near: str, dense_dir: Path, pruned_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = [dense_dir, pruned_dir, tmp_path / "run"] if POSITIONALS[command] == 3 else [dense_dir, tmp_path / "run"]
    places = places[: POSITIONALS[command]]
    refused(capsys, 2, f"did you mean {near!r}", command, *places, *options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


@pytest.mark.parametrize("command", ["scan", "restore", "refit", "reconstruct", "compare"])
def test_dense_and_pruned_in_the_wrong_order_are_refused(
    command: str, dense_dir: Path, pruned_dir: Path, text_file: Path, question_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = {
        "scan": ["--data", question_file], "restore": ["--data", question_file, "--scan-data", question_file],
        "refit": ["--calibration", text_file, "--n-samples", 2, "--seq-len", 16],
        "reconstruct": ["--calibration", text_file, "--n-samples", 3, "--seq-len", 16],
        "compare": ["--data", question_file, "--texts", text_file, "--methods", "lcc"],
    }  # fmt: skip
    message = f"expected the dense model before the pruned one, got {pruned_dir}"
    refused(capsys, 2, message, command, pruned_dir, dense_dir, tmp_path / "run", *data[command])
    assert not (tmp_path / "run").exists()


def test_models_of_different_architectures_are_not_to_be_swapped(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_model(build_model(hidden_size=50), tmp_path / "small")
    advice = "; name the model that this one was pruned from"
    for models in ((dense_dir, small), (small, dense_dir)):
        message = f"expected two models of the same shape, got {models[0]} (llama of 3 layers, "
        refused(capsys, 2, message, "scan", *models, tmp_path / "run")
        with pytest.raises(RequestError, match=advice):
            lcc.load_pair(*models)
    wide = build_model(intermediate_size=64)
    wide.model.layers[1].mlp.up_proj.weight.data.zero_()
    refused(capsys, 2, advice, "scan", save_model(wide, tmp_path / "wide"), dense_dir, tmp_path / "run")


@pytest.fixture
def no_text_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that the dense model writes takes minutes, so whoever asks for it has checked everything else."""

    def write(*_: object) -> None:
        raise AssertionError("data were read first")

    monkeypatch.setattr(DenseWriter, "write", write)


@pytest.mark.usefixtures("no_text_is_written")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("prune DENSE OUT", ["--calibration", "self", "--pattern", "4:7"], "expected"),
        ("prune DENSE OUT", ["--calibration", "self", "--method", "sparsegpt", "--n-samples", 1, "--seq-len", 8],
         "calibration tokens for sparsegpt"),
        ("prune DENSE OUT", ["--calibration", "self", "--seq-len", 9999], "context of 512 tokens, got 9999"),
        ("refit PRUNED DENSE OUT", ["--calibration", "self"], "expected the dense model before the pruned one"),
        ("refit DENSE OTHER OUT", ["--calibration", "self"], "expected the dense model that"),
        ("refit DENSE PRUNED OUT", ["--calibration", "self", "--seq-len", 9999], "tokens, got 9999"),
        ("refit DENSE PRUNED OUT", ["--calibration", "mix", "--n-samples", 4], "got 4 for 5; raise --n-samples"),
        ("scan DENSE PRUNED COPY", ["--data", "self"], "expected a run directory, got the model in"),
        ("scan PRUNED DENSE OUT", ["--data", "self"], "expected the dense model before the pruned one"),
        ("scan DENSE PRUNED OUT", ["--data", "self", "--max-length", 9999], "context of 512 tokens, got 9999"),
        ("scan DENSE PRUNED OUT", ["--data", "self", "--one-at-a-time", "--selectors", "patching"], "both models"),
        ("restore PRUNED DENSE OUT", ["--data", "self"], "expected the dense model before the pruned one"),
        ("restore PRUNED DENSE OUT", ["--data", "self", "--method", "best"], "before the pruned one"),
        ("restore DENSE OTHER OUT", ["--data", "self", "--method", "best"], "expected the dense model that"),
        ("restore DENSE PRUNED OUT", ["--data", "self", "--max-length", 9999], "context of 512 tokens, got 9999"),
        ("restore DENSE PRUNED OUT", ["--data", "self", "--refit-samples", 4], "got 4 for 5; raise --refit-samples"),
        ("restore DENSE PRUNED COPY", ["--data", "self", "--examples", 4], "expected a run directory, got the model"),
        ("restore DENSE PRUNED COPY", ["--budget", "5m"], "expected a run directory, got the model in"),
        ("compare PRUNED DENSE OUT", ["--data", "self", "--texts", "self"], "before the pruned one"),
        ("compare DENSE OTHER OUT", ["--data", "self", "--methods", "best"], "expected the dense model that"),
        ("prompts DENSE PRUNED OUT", ["--data", "self"], "got the running text self"),
    ],
)  # fmt: skip
def test_all_else_is_checked_before_data_are_read(
    command: str, options: list[Any], message: str, dense_dir: Path, pruned_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other"  # was pruned from another model
    shutil.copytree(pruned_dir, other)
    write_json(other / "pruning.json", {"dense_sha256": "0" * 64})
    copy = shutil.copytree(pruned_dir, tmp_path / "copy")
    places = {"DENSE": dense_dir, "PRUNED": pruned_dir, "OTHER": other, "COPY": copy, "OUT": tmp_path / "out"}
    name, *words = command.split()
    refused(capsys, 2, message, name, *(places[word] for word in words), *options)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in copy.iterdir()} == {path.name for path in pruned_dir.iterdir()}


def test_every_model_is_checked_before_the_first_is_measured(
    dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(dense_dir, tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr("lcc_lens.evaluation.evaluate.load_plain", None)
    refused(capsys, 2, str(weights), "eval", dense_dir, tmp_path / "cut", "--tasks", text_file)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("self", "expected text that is the same for every model, got self, which the dense model writes; name other"),
        ("mix", "which the dense model writes; name wikipedia+howto+questions+python"),
        ("text.txt+nope", "got 'nope'"),
        ("short.txt", "expected sequences of up to 48 tokens from"),
        ("empty.jsonl", "expected responses in"),
        ("gsm8k", "expected the data of lm-eval's task gsm8k, got none (no hub); let the hub be reached, or leave the"),
        ("lambada", "expected a task scored by accuracy, got lambada; run it with lm-eval itself"),
    ],
)
def test_every_task_is_checked_before_the_first_model_is_loaded(
    task: str, message: str, dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def load(names: list[str]) -> dict[str, Any]:
        if names == ["gsm8k"]:
            raise ConnectionError("no hub")
        return {"tasks": {"lambada": SimpleNamespace(aggregation=lambda: {"perplexity": sum})}}

    shutil.copy(text_file, tmp_path / "text.txt")
    (tmp_path / "short.txt").write_text("two words")
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "response": ""}\n')
    manager = SimpleNamespace(all_tasks=["gsm8k", "lambada"], load=load)
    monkeypatch.setattr("lcc_lens.evaluation.lm_eval_tasks._all_tasks", lambda: manager)
    monkeypatch.setattr("lcc_lens.evaluation.evaluate.load_plain", None)
    monkeypatch.chdir(tmp_path)
    refused(capsys, 2, message, "eval", dense_dir, "--tasks", "text.txt", task, "--length", 48, "--out", "r.json")
    assert not (tmp_path / "r.json").exists()


def test_a_sliced_model_in_the_place_of_the_dense_one_is_refused(
    dense_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = {"method": "slimgpt", "sparsity": 0.3, "sliced": True, "n_samples": 4, "seq_len": 48}
    lcc.prune(dense_dir, tmp_path / "sliced", calibration=str(text_file), **settings)
    with pytest.raises(RequestError, match="expected the dense model before the pruned one"):
        lcc.load_pair(tmp_path / "sliced", dense_dir)


def test_an_existing_folder_is_refused_before_the_model_is_loaded(
    pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.restorations import restoration_of

    from lcc_lens.exporters import huggingface

    restoration_of(pruned_dir).save(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    monkeypatch.setattr(huggingface, "load_hooked", None)
    refused(capsys, 2, "exists already", "export", tmp_path / "run", tmp_path / "out")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_missing_package_is_named_before_any_model_is_loaded(
    tmp_path: Path, text_file: Path, question_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lcc_lens.restoration.injections import methods

    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    message = "expected the package peft for lora, got none; pip install 'lcc-lens[baselines]'"
    where = [tmp_path / name for name in ("dense", "pruned", "run")]
    refused(capsys, 2, message, "compare", *where, "--methods", "lcc", "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_in_which_every_run_fails_ends_with_1_and_times_nothing(
    dense_dir: Path, pruned_dir: Path, text_file: Path, question_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lcc_lens.evaluation.comparison.runner import Runner

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    timed: list[object] = []
    monkeypatch.setattr(Runner, "require_data", lambda *_: None)
    monkeypatch.setattr(Runner, "measure_baselines", lambda *_: None)
    monkeypatch.setattr(Runner, "run", fails)
    monkeypatch.setattr(Runner, "time", lambda *_: timed.append(1))
    data = ("--data", question_file, "--texts", text_file, "--methods", "lcc", "--seeds", 2, "--quiet")
    message = "expected a run that succeeds, got 2 that failed; the first: lcc: out of luck"
    refused(capsys, 1, message, "compare", dense_dir, pruned_dir, tmp_path / "run", *data)
    assert timed == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lcc.scan(Path("out"), None), "expected a Pair for pair, got 'out'; pass load_pair(dense, pruned)"),
        (lambda: lcc.plot_loss_map("runs/mine"), "got 'runs/mine'; pass scan(pair, data), or Scan.load(run)"),
        (lambda: lcc.plot_head_types(None), "got a value of type NoneType; pass head_types(pair), or HeadTypes.load"),
        (lambda: lcc.export("runs/mine", "out", "in"), "expected a Restoration for restoration, got 'runs/mine'; pass"),
        (
            lambda: lcc.prune(None, "out"),
            "expected a name or a path for model, got a value of type NoneType; pass a",
        ),
        (lambda: lcc.refit("a", "b", 3), "expected a name or a path for out, got a value of type int; pass a string"),
        (lambda: lcc.evaluate("a", ["boolq"]), "expected a list for references, got 'a'; pass ['a']"),
        (lambda: lcc.compare("a", "b", "c", "lcc"), "expected a list for entries, got 'lcc'; pass ['lcc']"),
        (lambda: resolve(3), "expected a name or a path for reference, got a value of type int; pass a string"),
        (
            lambda: lcc.RestoreSession("a", None, None),
            "expected a Pair for pair, got 'a'; pass load_pair(dense, pruned)",
        ),
        (lambda: lcc.RestoreWidget(3), "expected a RestoreSession for session, got a value of type int; pass Restore"),
        (
            lambda: lcc.plot_upstream("runs/mine"),
            "expected an Upstream for upstream, got 'runs/mine'; pass trace_up",
        ),
        (lambda: lcc.register_selector("x", 3), "expected a function for function, got a value of type int; pass one"),
        (
            lambda: lcc.register_method("x", 3),
            "expected a Method or a Preset for method, got a value of type int; pass M",
        ),
        (lambda: lcc.merits(None), "expected a text for text, got a value of type NoneType; pass a string"),
        (lambda: lcc.restore(None, None, [], "alpaca"), "expected a Pair for pair, got a value of type NoneType"),
    ],
)
def test_a_name_in_the_place_of_a_result_says_what_makes_one(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        call()


#: What serves a command's options in Python.
SERVING = {
    "prune": [lcc.prune, PruneConfig], "refit": [lcc.refit, RefitConfig],
    "reconstruct": [lcc.reconstruct, ReconstructConfig], "scan": [lcc.scan],
    "compare": [CompareConfig, lcc.compare],
    "restore": [lcc.TrainConfig, lcc.RestoreSettings, TaskMeasures], "recipe": [lcc.run_recipe], "eval": [lcc.evaluate],
    "report": [lcc.report], "rewrite-fit": [lcc.RewriterSettings, PreferenceSource], "demo": [DemoConfig],
}  # fmt: skip


def declared(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Range and default of every number that a function or a dataclass, with its groups, takes."""
    if not dataclasses.is_dataclass(kind):
        defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
        return {name: (found, defaults[name]) for name, found in ranges_of(kind).items()}
    own = {field.name: field for field in dataclasses.fields(kind)}
    known = {name: (found, own[name].default) for name, found in ranges_of(kind).items()}
    groups = [hint for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
    return known | {name: found for group in groups for name, found in declared(group).items()}


def test_python_and_the_command_line_share_ranges_and_defaults() -> None:
    shared = 0
    for command, serving in SERVING.items():
        options = declared(COMMANDS[command])
        for python in serving:
            for name in options.keys() & declared(python).keys():
                (range_, default), (python_range, python_default) = options[name], declared(python)[name]
                assert range_ == python_range, (command, name)
                assert default == python_default or None in (default, python_default), (command, name)
                shared += 1
    assert shared > 45


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (lcc.TrainConfig, {"lr": 1e308}, "expected lr above 0 and at most 1000, got 1e\\+308"),
    (lcc.TrainConfig, {"lr": float("nan")}, "expected lr above 0 and at most 1000, got nan"),
    (lcc.TrainConfig, {"seed": 2**64}, "expected seed of at least 0 and below 4294967296, got 18446744073709551616"),
    (lcc.prune, {"model": "a", "out": "b", "n_samples": 1.5}, r"a whole number for n_samples, got 1\.5; round it"),
    (lcc.TrainConfig, {"epochs": 10**400}, "expected epochs of at most 4294967296, got a larger number"),
    (lcc.report, {"references": ["a"], "repeats": "two"}, "expected repeats of at least 1, got 'two'"),
    (lcc.RestoreSettings, {"low_rank": 0}, "expected low_rank of at least 1, got 0"),
    (lcc.HeadRequest, {"fraction": 25.0}, "expected fraction above 0 and at most 1, got 25; write 0.25 for 25 %"),
    (lcc.RefitRequest, {"n_samples": -1}, "expected n_samples of at least 0, got -1"),
    (lcc.prune, {"model": "a", "out": "b", "n_samples": 0}, "expected n_samples of at least 1, got 0"),
    (lcc.prune, {"model": "a", "out": "b", "sparsity": 1.0}, r"expected sparsity above 0 and below 1, got 1"),
    (lcc.refit, {"dense": "a", "pruned": "b", "out": "c", "seed": -1}, "expected seed of at least 0"),
    (lcc.evaluate, {"references": [], "tasks": ["wikitext"]}, "expected at least one model, got none; name some"),
    (lcc.evaluate, {"references": ["a"], "tasks": ["wikitext"], "length": -1}, "expected length of at least 2, got -1"),
    (lcc.report, {"references": ["a"], "repeats": 0}, "expected repeats of at least 1, got 0"),
    (lcc.load_data, {"name": "boolq", "seed": 2**64}, "expected seed of at least 0 and below 4294967296"),
    (lcc.compare, {"dense": "a", "pruned": "b", "run": "c", "entries": [], "seeds": 0}, "expected seeds of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "values", "message"), WRONG)
def test_a_python_call_is_refused_before_it_does_anything(function: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        function(**values)


def test_a_bad_file_among_the_tasks_is_refused_before_any_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"colour": "red"}\n')
    tasks = ["--tasks", tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    refused(
        capsys, 2, "got colour; rename the fields", "eval", tmp_path / "nowhere", *tasks, "--out", tmp_path / "r.json"
    )
    assert not (tmp_path / "r.json").exists()


def test_other_scan_data_than_the_scans_are_refused(
    found: lcc.Scan,
    dense_dir: Path,
    pruned_dir: Path,
    tmp_path: Path,
    text_file: Path,
    question_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found.save(tmp_path / "run")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "run").iterdir())
    where = [dense_dir, pruned_dir, tmp_path / "run", "--data", question_file]
    refused(capsys, 2, f"expected a scan of {text_file} in", "restore", *where, "--scan-data", text_file)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "run").iterdir()) == before
