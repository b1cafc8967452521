"""A pruner that is registered from outside works wherever the built-in ones do."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import call, refused
from torch import Tensor

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.sparsity_patterns import Unstructured
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.methods.pruners import LayerTask, MaskPruner
from lcc_lens.pruning.methods.registry import PRUNERS
from lcc_lens.pruning.methods.settings import PruneConfig


class RandomPruner(MaskPruner):
    """Prunes random weights."""

    def __init__(self, task: LayerTask) -> None:
        super().__init__(task)
        self.generator = torch.Generator().manual_seed(task.seed)

    def score(self, name: str, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=self.generator)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the pruner ``random`` for one test."""
    monkeypatch.setattr(PRUNERS, "_entries", dict(PRUNERS._entries))
    lcc.register_pruner("random", RandomPruner)


@pytest.mark.usefixtures("registered")
def test_a_registered_pruner_prunes_resumes_and_its_output_scans(
    dense_dir: Path, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = lcc.prune(dense_dir, tmp_path / "pruned", method="random", sparsity=0.4)
    assert report["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert json.loads((tmp_path / "pruned" / "pruning.json").read_text())["method"] == "random"

    add, out = FinishedLayers.add, tmp_path / "resumed"

    def interrupted(self: FinishedLayers, *args: object) -> None:
        add(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(FinishedLayers, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lcc.prune(dense_dir, out, method="random", sparsity=0.4)
    monkeypatch.setattr(FinishedLayers, "add", add)
    assert call("prune", dense_dir, out, "--method", "random", "--sparsity", 0.4, "--quiet") == 0
    whole, resumed = (load_file(path / "model.safetensors") for path in (tmp_path / "pruned", out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    layers = [whole[f"model.layers.{layer}.mlp.up_proj.weight"] == 0 for layer in (0, 1)]
    assert not torch.equal(*layers)  # every layer draws anew

    data = lcc.load_data(str(question_file), n=4, role="probe")
    assert lcc.scan(lcc.load_pair(dense_dir, out), data).table()["relative_loss"].max() > 0


@pytest.mark.usefixtures("registered")
def test_unknown_and_unfit_pruners_are_refused(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "expected a pruner (magnitude, wanda, sparsegpt, slimgpt, random), got 'randon'; did you mean 'random'?"
    refused(capsys, 2, message, "prune", dense_dir, tmp_path / "out", "--method", "randon")
    with pytest.raises(RequestError, match="expected a new pruner name, got 'wanda', which is taken"):
        lcc.register_pruner("wanda", RandomPruner)
    PRUNERS.register("unfit", object)
    with pytest.raises(RequestError, match=r"for the pruner 'unfit', got .* without uses_inputs, observe, pruned, rem"):
        PruneConfig("unfit", Unstructured(0.5))


def test_an_installed_package_adds_a_pruner_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("plugin", f"{MaskPruner.__module__}:MagnitudePruner", "lcc_lens.pruners")
    monkeypatch.setattr("lcc_lens.core.registry.entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(PRUNERS, "_plugins", None)
    assert "plugin" in PRUNERS
    assert not PruneConfig("plugin", Unstructured(0.5)).uses_inputs
