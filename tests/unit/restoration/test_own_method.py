"""A method of one's own: registered once, it restores, compares, folds and runs from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.frontends.cli.main import run as main
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.hooked.weights import weight_shape
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.restoration.injections.changes import Shift
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import METHODS
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.injections.weights import layer_maps
from lcc_lens.restoration.result import Restoration

TOKENS = torch.arange(12)[None]


def down_projections(inputs: Ingredients) -> lcc.Injection:
    layers = {name: m for name, m in layer_maps(inputs.model).items() if name.endswith("down_proj")}
    changes = {name: Shift(torch.zeros(weight_shape(module))) for name, module in layers.items()}
    return lcc.WeightInjection(changes, default_lr=1e-2)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    lcc.register_method("down", lcc.Method(down_projections, "all down projections", "n_in n_out per layer"))
    yield
    del METHODS._entries["down"]


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    lines = [{"prompt": f"Say number {i} twice:", "response": f" number {i}, number {i}"} for i in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "train.jsonl"


def test_it_restores_and_folds(pair, pruned_dir: Path, train_file: Path, tmp_path: Path) -> None:
    restoration = lcc.restore(pair, None, (), load_data(str(train_file), 24), method="down", run=tmp_path / "run")
    assert restoration.record.losses["restored"] < restoration.record.losses["pruned"]
    assert restoration.record.method == "down"
    with Restoration.load(tmp_path / "run").applied_to(pair.pruned) as model:
        expected = model(TOKENS)
    lcc.export(restoration, pruned_dir, tmp_path / "out")
    plain = load_plain(tmp_path / "out", dtype=torch.float32, attention="eager")
    assert torch.allclose(plain(TOKENS).logits, expected, atol=1e-4)
    assert compare_zeros(pruned_dir, tmp_path / "out").is_equal


def test_it_compares_and_joins_others(
    dense_dir: Path, pruned_dir: Path, train_file: Path, text_file: Path, tmp_path: Path
) -> None:
    config = CompareConfig(
        data=str(train_file), texts=(str(text_file),), examples=16, validation=4, responses=4, blocks=2,
        block_length=16, max_length=64, speed_rounds=0,
    )  # fmt: skip
    found = compare(dense_dir, pruned_dir, tmp_path / "run", ["down", "down+norms"], seeds=1, config=config)
    alone, joined = found["cells"]["down | 0"], found["cells"]["down+norms | 0"]
    assert (alone["zeros_kept"], alone["n_added"]) == (1.0, 0)
    assert 0 < alone["n_trained"] < joined["n_trained"]


def test_the_command_line_takes_it(dense_dir: Path, pruned_dir: Path, train_file: Path, tmp_path: Path) -> None:
    command = ["restore", str(dense_dir), str(pruned_dir), str(tmp_path / "run"), "--data", str(train_file)]
    assert main([*command, "--examples", "16", "--method", "down", "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["restore"]["method"] == "down"


@pytest.mark.parametrize(("method", "message"), [
    ("loraa", r"expected a method \(lcc, .*\), got 'loraa'; did you mean 'lora'"),
    ("lora", "expected a method that restores, got lora, a baseline; run it by lcc-lens compare"),
])  # fmt: skip
def test_other_names_are_refused_before_any_work(
    method: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", "no-model", "none", str(tmp_path / "run"), "--method", method, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RequestError, match="expected a new method name, got 'lora', which is taken"):
        lcc.register_method("lora", METHODS["down"])


def test_a_preset_has_settings_of_its_own_and_is_recorded_as_its_method() -> None:
    best, perp = MethodSpec.parse("best"), MethodSpec.parse("perp")
    assert (best.name, best.text, best.preset.lr, best.preset.on_refit) == ("best", "all-weights", 3e-4, True)
    assert (perp.text, perp.selects_heads, perp.bias_sites) == ("norms+offset+mlp-offset", False, ("z", "mlp"))
    for text in ("best+norms", "flap+lcc"):
        with pytest.raises(RequestError, match="expected a method that can be joined by"):
            MethodSpec.parse(text)
