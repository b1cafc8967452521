"""The code blocks of README and guide run as they stand, on a tiny model, and do what the page says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import call
from support.places import ROOT
from support.small_sets import write_sets
from support.tiny import build_model, save_model, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence

import lcc_lens as lcc
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import encode
from lcc_lens.models.loading import references
from lcc_lens.restoration.budget import Speed
from lcc_lens.restoration.result import Restoration

PAGES = {path: (ROOT / path).read_text() for path in ("README.md", "docs/guide.md", "docs/cli.md")}
#: Sizes that a command is given beside what the page says, so that it takes seconds.
SMALLER = {
    "prune": "--n-samples 8 --seq-len 64", "scan": "--examples 16 --selector-examples 8",
    "restore": "--examples 96 --scan-examples 16 --refit-samples 6 --items 8",
    "prompts": "--examples 4 --seeds 1 --variants clear filler", "merits": "--examples 4",
    "refit": "--calibration c4 --n-samples 4 --seq-len 32",
    "compare": "--seeds 1 --examples 8 --responses 4 --blocks 2 --max-length 64 --speed-rounds 0 --limit 2",
    "eval": "--limit 2 --length 64", "report": "--no-latency", "figures": "--formats html",
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in a language; commands stand in blocks without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(page: str) -> list[list[str]]:
    """The commands of a page, word by word."""
    lines = [line for block in blocks(page, "") for line in block.splitlines() if re.match(r"lcc-lens [a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"), n=1200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sets: Path) -> Path:
    """A tiny model that has learned to respond, so that pruning takes something away."""
    tokenizer, model = tiny_tokenizer(), build_model(initializer_range=0.08).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCC_LENS_DATA", str(sets))
        sequences = encode(lcc.load_data("alpaca", n=200, role="train", seed=5), tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        batch = [sequences[(8 * step + i) % len(sequences)] for i in range(8)]
        tokens = pad_sequence([sequence.tokens for sequence in batch], batch_first=True)
        position, starts = torch.arange(tokens.shape[1]), torch.tensor([[s.loss_from] for s in batch])
        ends = torch.tensor([[len(sequence)] for sequence in batch])
        labels = tokens.where((position >= starts) & (position < ends), -100)
        model(tokens, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return save_model(model.eval(), tmp_path_factory.mktemp("trained") / "smollm2")


@pytest.fixture
def place(trained: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where ``smollm2`` is the tiny model and every data set has a small copy."""
    monkeypatch.setattr(references, "embedded_model", lambda: trained)
    slow = Speed(read=1e-3, trained=0.05, solved=10.0, loaded=1.0)  # where a budget of minutes takes seconds
    monkeypatch.setattr("lcc_lens.restoration.budget.measure_speed", lambda *_: slow)
    monkeypatch.setenv("LCC_LENS_DATA", str(sets))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(page: str, wanted: Callable[[list[str]], bool]) -> list[str]:
    """Run a page's commands in their order, in smaller sizes; gives the names of those that ran."""
    ran = []
    for command in filter(wanted, commands(page)):
        words = SMALLER.get(command[0], "").split()  # of an option that is given twice, the last one counts
        words = ["--panel-blocks", "1"] if "--budget" in command else words
        again = ["--overwrite"] if command[0] in ("scan", "prune") and (Path(command[2]) / "scan.json").exists() else []
        assert call(*command, *words, *again, "--quiet") == 0, command
        ran.append(command[0])
    return ran


def assert_restored(losses: dict[str, float]) -> None:
    assert losses["dense"] < losses["restored"] < losses["pruned"], losses


def test_the_python_example_restores_and_its_export_has_an_effect(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports, export = [], lcc.export
    monkeypatch.setattr(lcc, "export", lambda *arguments: reports.append(export(*arguments)))
    (example,) = blocks("README.md", "python")
    space: dict[str, Any] = {}
    exec(re.sub(r"\bn=(\d+)", lambda size: f"n={int(size[1]) // 4}", example), space)
    assert_restored(space["restoration"].record.losses)
    assert reports[0].logit_effect > 1e-3
    assert len(space["heads"]) == 4


def test_the_commands_of_the_readme_restore(place: Path) -> None:
    ran = run_commands("README.md", lambda command: True)
    assert ran == ["prune", "scan", "restore", "export", "eval", "explore"]
    assert_restored(Restoration.load("runs/mine").record.losses)
    assert read_json(Path("runs/mine/metrics.json"))["heads"] == 4
    assert Path("runs/mine/explorer.html").exists()


@pytest.mark.slow
def test_the_guide_runs_from_pruning_to_an_interactive_session(place: Path) -> None:
    ran = run_commands("docs/guide.md", lambda command: command[0] != "compare")
    assert ran == ["prune", "scan", "restore", "export", "report", "figures"]
    assert_restored(Restoration.load("runs/mine").record.losses)
    pair, scan = lcc.load_pair("smollm2", "out/wanda50"), None
    scan = lcc.scan(pair, lcc.load_data("boolq", n=16, role="probe"))
    space: dict[str, Any] = {"lcc": lcc, "pair": pair, "scan": scan}
    lens, session = blocks("docs/guide.md", "python")
    exec(lens, space)
    exec(session.replace('"out/restored"', '"out/session"'), space)
    losses = space["session"].loss()
    assert_restored(losses)
    assert Path("out/session/config.json").exists()


@pytest.mark.slow
def test_the_commands_of_the_overview_run_in_their_order(place: Path) -> None:
    elsewhere = {"recipe", "demo", "compare", "rewrite"}  # they have tests of their own, and take minutes
    ran = run_commands("docs/cli.md", lambda command: command[0] not in elsewhere)
    measured = {"eval", "report", "doctor", "figures", "explore", "merits", "prompts"}
    assert measured | {"prune", "scan", "restore", "refit", "export"} == set(ran)
