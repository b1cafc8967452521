"""What the first version wrote still loads: scan, restoration, token tables and comparison of a tiny pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import call
from support.places import TESTS

import lcc_lens as lcc
from lcc_lens.models.pair import Pair

WRITTEN = TESTS / "data" / "written_by_0_1_0"
GOLDEN = json.loads((WRITTEN / "golden.json").read_text())
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, entered: what was written names its models relative to it."""
    monkeypatch.chdir(shutil.copytree(WRITTEN, tmp_path / "written"))
    return Path()


@pytest.fixture
def pair(written: Path) -> Pair:
    return lcc.load_pair("dense", "pruned")


def test_a_scan_gives_the_same_heads(written: Path) -> None:
    scan = lcc.Scan.load("run")
    torch.testing.assert_close(scan.relative_loss.flatten(), torch.tensor(GOLDEN["relative_loss"]), rtol=1e-5, atol=0)
    for selector, heads in GOLDEN["heads"].items():
        assert [str(head) for head in scan.select(selector, share=0.5)] == heads


def test_a_restoration_acts_as_it_did(pair: Pair) -> None:
    restoration = lcc.Restoration.load("run")
    expected, bare = (torch.tensor(GOLDEN[f"{name}_logits"]) for name in ("restored", "pruned"))
    assert (expected - bare).abs().max() > 1e-3
    with torch.no_grad(), restoration.applied_to(pair.pruned):
        torch.testing.assert_close(pair.pruned(TOKENS)[0, -1, : len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert restoration.record.losses == GOLDEN["losses"]
    assert (restoration.record.preset, restoration.record.refit) == (None, None)


def test_a_run_is_exported_and_explored(written: Path) -> None:
    assert call("export", "run", "out") == 0
    assert (written / "out" / "model.safetensors").exists()
    assert call("explore", "run", "--out", "page.html") == 0
    assert "L1H0" in (written / "page.html").read_text()


def test_a_comparison_goes_on_without_training_again(written: Path) -> None:
    before = json.loads((written / "comparison" / "comparison.json").read_text())
    settings = ("--data", "more.jsonl", "--seeds", 1, "--examples", 16, "--texts", "text.txt", "--blocks", 2, "--tasks")
    methods = ("--methods", "lcc", "mean-shift", "--responses", 8, "--speed-rounds", 1)
    assert call("compare", "dense", "pruned", "comparison", *settings, *methods) == 0
    after = json.loads((written / "comparison" / "comparison.json").read_text())
    assert after["cells"] == before["cells"]
