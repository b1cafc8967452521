"""Every example of docs/extending.md as it stands: what it registers prunes, scores, restores and loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.places import ROOT

import lcc_lens as lcc
from lcc_lens.analysis.selectors.registry import REGISTRY
from lcc_lens.data.registry import DATASETS
from lcc_lens.models.pair import Pair
from lcc_lens.pruning.methods.registry import PRUNERS
from lcc_lens.restoration.injections.methods import METHODS

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "register_" in block]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names that the page's examples define, with every registry as it was afterwards."""
    for registry in (REGISTRY, DATASETS, PRUNERS, METHODS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    space: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, space)
    return space


def test_each_example_is_short() -> None:
    kinds = {re.search(r"register_(\w+)", block)[1] for block in BLOCKS}
    assert kinds == {"selector", "pruner", "method", "dataset"}
    assert max(len(block.strip().splitlines()) for block in BLOCKS) <= 15


def test_the_data_set_loads_by_role(registered: dict[str, object]) -> None:
    training, probe = registered["data"], lcc.load_data("sums", n=20, role="probe")
    assert len(training) == 20
    assert not training.groups & probe.groups


def test_the_selector_chooses_the_heads_that_the_method_restores(pair: Pair, question_file: Path) -> None:
    scan = lcc.scan(pair, lcc.load_data(str(question_file), n=16), selectors=["constant"])
    assert torch.equal(scan.scores("constant").value, scan.constant_share)
    assert len(scan.select("constant", share=0.4)) == 6
    restoration = lcc.restore(pair, scan, (), lcc.load_data("sums", n=24, role="train"), method="down")
    assert restoration.record.method == "down"
    assert restoration.record.losses["restored"] != restoration.record.losses["pruned"]


def test_the_pruner_prunes(dense_dir: Path, tmp_path: Path) -> None:
    report = lcc.prune(dense_dir, tmp_path / "out", method="random", sparsity=0.4)
    assert report["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["method"] == "random"
