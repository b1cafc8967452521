"""The code blocks of the documentation, and small models and data to run them on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import call
from support.places import ROOT
from support.tiny import build_model, save_model, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence

import lcc_lens as lcc
from lcc_lens.data.datasets import encode

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
#: Sizes that a command is given beside what the page says, so that it takes seconds.
SMALLER = {
    "prune": "--n-samples 8 --seq-len 64", "scan": "--examples 16 --selector-examples 8",
    "restore": "--examples 96 --scan-examples 16 --refit-samples 6 --items 8",
    "prompts": "--examples 4 --seeds 1 --variants clear filler", "merits": "--examples 4",
    "refit": "--calibration c4 --n-samples 4 --seq-len 32",
    "compare": "--seeds 1 --examples 8 --responses 4 --blocks 2 --max-length 400 --speed-rounds 0 --limit 2 --texts c4",
    "eval": "--limit 2 --length 64", "report": "--no-latency", "figures": "--formats html",
    "rewrite fit": "--examples 8 --candidates 4 --version-tokens 8 --steps 2 --batch-size 2",
    "rewrite": "--n 2 --max-new-tokens 8",
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in a language; commands stand in blocks without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(page: str) -> list[list[str]]:
    """The commands of a page, word by word."""
    lines = [line for block in blocks(page, "") for line in block.splitlines() if re.match(r"lcc-lens [a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def name_of(command: list[str]) -> str:
    """The name of a command, which may be two words."""
    return "rewrite fit" if command[:2] == ["rewrite", "fit"] else command[0]


def run_commands(page: str, wanted: Callable[[list[str]], bool] = bool, **places: object) -> list[str]:
    """Run a page's commands in their order, in smaller sizes; gives the names of those that ran.

    Args:
        places: what stands for words in capitals, such as DENSE.
    """
    ran = []
    for command in filter(wanted, commands(page)):
        command = [str(places.get(word, word)) for word in command]
        words = SMALLER.get(name_of(command), "").split()  # of an option that is given twice, the last one counts
        words = ["--panel-blocks", "1"] if "--budget" in command else words
        written = {"prune": 2, "scan": 3}.get(command[0])
        again = ["--overwrite"] if written is not None and _is_written(Path(command[written])) else []
        assert call(*command, *words, *again, "--quiet") == 0, command
        ran.append(name_of(command))
    return ran


def _is_written(folder: Path) -> bool:
    """Whether a folder has a scan or a pruned model already, of an earlier page."""
    return any((folder / name).exists() for name in ("scan.json", "pruning.json"))


def assert_restored(losses: dict[str, float]) -> None:
    """The loss falls, perhaps below the dense one: with another torch the tiny model learns something else."""
    assert max(losses["dense"], losses["restored"]) < losses["pruned"], losses


def train_tiny(folder: Path, sets: Path) -> Path:
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
    return save_model(model.eval(), folder)
