"""Requests that cannot be served are refused before anything is loaded or written, whatever the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from support.commands import refused

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Range
from lcc_lens.frontends.cli.main import COMMANDS
from lcc_lens.frontends.cli.options import ranges_of

#: What a command needs before its options: models, a recipe or runs that are not there.
POSITIONALS = {
    "prune": 2, "refit": 3, "scan": 3, "restore": 3, "compare": 3, "recipe": 1, "export": 2, "eval": 1, "report": 1,
    "figures": 2, "explore": 1, "doctor": 1, "demo": 0,
}  # fmt: skip


def numbers(kind: Any) -> Iterator[tuple[str, list[Range]]]:
    """Every option of a command that takes a number, with its ranges."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint)
        elif {int, float} & set(leaves(hint)):
            yield f"--{name.replace('_', '-')}", ranges_of(hint)


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
        ("eval", ["--tasks", "boolqq"], "boolq"),
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


@pytest.mark.parametrize("command", ["scan", "restore", "refit", "compare"])
def test_dense_and_pruned_in_the_wrong_order_are_refused(
    command: str, dense_dir: Path, pruned_dir: Path, text_file: Path, question_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = {
        "scan": ["--data", question_file], "restore": ["--data", question_file, "--scan-data", question_file],
        "refit": ["--calibration", text_file, "--n-samples", 2, "--seq-len", 16],
        "compare": ["--data", question_file, "--texts", text_file, "--methods", "lcc"],
    }  # fmt: skip
    message = f"expected the dense model before the pruned one, got {pruned_dir} with 50% zeros"
    refused(capsys, 2, message, command, pruned_dir, dense_dir, tmp_path / "run", *data[command])
    assert not (tmp_path / "run").exists()


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
    monkeypatch.setattr(Runner, "measure_baselines", lambda *_: None)
    monkeypatch.setattr(Runner, "run", fails)
    monkeypatch.setattr(Runner, "time", lambda *_: timed.append(1))
    data = ("--data", question_file, "--texts", text_file, "--methods", "lcc", "--seeds", 2, "--quiet")
    message = "expected a run that succeeds, got 2 that failed; the first: lcc: out of luck"
    refused(capsys, 1, message, "compare", dense_dir, pruned_dir, tmp_path / "run", *data)
    assert timed == []
