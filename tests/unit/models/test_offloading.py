"""Models whose layers stay on disk give the same bits, one layer and one model in memory at a time."""

from __future__ import annotations

import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import save_family
from support.restorations import restoration_of
from support.tiers import NEEDS_TL4, mostly_slow
from torch import nn

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import default_device_map, placed
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.cli.main import run as run_command
from lcc_lens.models.hooked.direct_path import OutputProjections
from lcc_lens.models.hooked.offloading import (
    device_of,
    each_parameter,
    entry_device,
    placement,
    require_in_memory,
    weight_in_memory,
)
from lcc_lens.models.hooked.weights import named_weight
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.objectives import Objective

pytestmark = NEEDS_TL4
export_module = import_module("lcc_lens.exporters.huggingface")  # lcc_lens.exporters.huggingface is the function
TOKENS = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=20)


@pytest.fixture(scope="module")
def on_disk(dense_dir: Path, pruned_dir: Path) -> Pair:
    return load_pair(dense_dir, pruned_dir, one_at_a_time=True, device_map="disk")


def layers_of(model: Any) -> nn.ModuleList:
    return getattr(model, "original_model", model).model.layers


def test_layers_stay_on_disk_and_logits_are_the_same(dense_dir: Path) -> None:
    whole, kept = load_hooked(dense_dir), load_hooked(dense_dir, device_map="disk")
    names = {name for name, parameter in kept.model.original_model.named_parameters() if parameter.is_meta}
    assert len({name.split(".layers.")[1].split(".")[0] for name in names}) == 3
    assert not any(parameter.is_meta for parameter in kept.model.embed.parameters())
    with torch.inference_mode():
        assert torch.equal(kept.model(TOKENS), whole.model(TOKENS))
    assert {name for name, p in kept.model.original_model.named_parameters() if p.is_meta} == names  # gone again
    assert device_of(kept.model) == torch.device("cpu")
    assert kept.removed_heads == whole.removed_heads
    for name in whole.output_projections:
        assert torch.equal(named_weight(kept.model, name), named_weight(whole.model, name))
    head = Head(2, 4)
    assert torch.equal(OutputProjections.of(kept.model).W_O(head), OutputProjections.of(whole.model).W_O(head))


def test_every_parameter_is_read_once(dense_dir: Path) -> None:
    whole, kept = load_plain(dense_dir), load_plain(dense_dir, device_map="disk")
    expected, found = dict(whole.named_parameters()), dict(each_parameter(kept))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    assert [name for name, _ in each_parameter(whole)] == list(expected)
    projection = layers_of(kept)[1].self_attn.o_proj
    assert projection.weight.is_meta
    assert torch.equal(weight_in_memory(projection), layers_of(whole)[1].self_attn.o_proj.weight)
    assert entry_device(nn.Linear(2, 2, device="meta")) == torch.device("cpu")


def test_places_cover_the_model_once(dense_dir: Path) -> None:
    device = torch.device("cpu")
    places = placement(dense_dir, device, "disk")["device_map"]
    assert [name for name, place in places.items() if place == "disk"] == [f"model.layers.{i}" for i in range(3)]
    names = dict(load_plain(dense_dir).named_parameters())
    assert all(sum(name.startswith(f"{place}.") for place in places) == 1 for name in names)
    assert placement(dense_dir, device, "auto") == {"device_map": "auto"}
    assert placement(dense_dir, device, None) == {}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon"])
def test_other_families_compute_from_disk(family: str, tmp_path: Path) -> None:
    path = save_family(family, tmp_path / "model")
    with torch.inference_mode():
        whole, kept = (load_hooked(path, device_map=place).model(TOKENS) for place in (None, "disk"))
    assert torch.equal(whole, kept)


def test_weights_that_loading_converts_are_refused(tmp_path: Path) -> None:
    path = save_family("mixtral", tmp_path / "model")
    with pytest.raises(RequestError, match=r"got none that loads .* had weights offloaded to the disk"):
        load_hooked(path, device_map="disk")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_from_disk_gives_the_same_bits(
    dense_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    in_memory: list[int] = []
    advance = LayerStream.advance

    def counting(stream: LayerStream) -> None:
        advance(stream)
        in_memory.append(sum(not any(p.is_meta for p in layer.parameters()) for layer in stream._layers))

    monkeypatch.setattr(LayerStream, "advance", counting)
    settings: dict[str, Any] = {"method": method, "calibration": str(text_file), "n_samples": 6, "seq_len": 40}
    prune(dense_dir, tmp_path / "whole", **settings)
    with placed("disk"):
        prune(dense_dir, tmp_path / "streamed", **settings)
    assert in_memory == [3, 3, 3, 0, 0, 0]  # a layer goes once the next one has its inputs
    whole, streamed = (tmp_path / name / "model.safetensors" for name in ("whole", "streamed"))
    assert whole.read_bytes() == streamed.read_bytes()
    assert whole.read_bytes() != (dense_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def streamed(on_disk: Pair, data: Data) -> Scan:
    return scan(on_disk, data)


def test_scan_from_disk_gives_the_same_bits(pair: Pair, data: Data, streamed: Scan) -> None:
    expected, found = scan(pair, data, selectors=("probe", "interaction"))._tensors(), streamed._tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert float(streamed.relative_loss.max()) > 0.1


@pytest.mark.parametrize(
    ("method", "checkpoint_layers"),
    mostly_slow([("mean-shift", False), ("lcc", False), ("lcc", True)], ("mean-shift", False)),
)
def test_restoration_one_model_at_a_time_is_the_same(
    pair: Pair, on_disk: Pair, data: Data, streamed: Scan, tmp_path: Path, method: str, checkpoint_layers: bool
) -> None:
    heads = streamed.select("mse", share=0.5)
    config = TrainConfig(lr=0.1, batch_size=5, gradient_checkpointing=checkpoint_layers)
    expected = restore(pair, streamed, heads, data, method=method, config=config)
    found = restore(on_disk, streamed, heads, data, method=method, config=config, run=tmp_path)
    assert torch.equal(found.constants, expected.constants)
    assert found.record.losses == expected.record.losses
    assert found.record.losses["dense"] < found.record.losses["restored"] != found.record.losses["pruned"]


def test_export_from_disk_holds_one_model(pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def noting(load: Any) -> Any:
        def loaded(*arguments: Any, **options: Any) -> Any:
            assert not any(model() is not None for model in alive)
            result = load(*arguments, **options)
            alive.append(weakref.ref(getattr(result, "model", result)))
            return result

        return loaded

    restoration = restoration_of(pruned_dir, [Head(0, 1), Head(2, 3)])
    expected = export(restoration, pruned_dir, tmp_path / "whole")
    for name in ("load_hooked", "load_plain"):
        monkeypatch.setattr(export_module, name, noting(getattr(export_module, name)))
    with placed("disk"):
        found = export(restoration, pruned_dir, tmp_path / "streamed")
    assert len(alive) == 2
    assert (found.zeros, found.identical_tensors) == (expected.zeros, expected.identical_tensors)
    assert found.logit_effect == expected.logit_effect > 0.1 > found.logit_difference
    whole, streamed = (tmp_path / name / "model.safetensors" for name in ("whole", "streamed"))
    assert whole.read_bytes() == streamed.read_bytes()


@pytest.mark.slow
def test_whole_method_from_the_command_line(
    dense_dir: Path, text_file: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        return run_command([*map(str, arguments), "--device-map", "disk", "--quiet"])

    models = (dense_dir, tmp_path / "pruned")
    assert call("prune", *models, "--calibration", text_file, "--n-samples", 4, "--seq-len", 40) == 0
    questions = ("--data", question_file)
    assert call("scan", *models, tmp_path / "run", *questions, "--examples", 8, "--one-at-a-time") == 0
    method = ("--method", "mean-shift", "--selector", "mse", "--one-at-a-time")
    assert call("restore", *models, tmp_path / "run", *questions, *method) == 0
    assert call("export", tmp_path / "run", tmp_path / "out") == 0
    assert load_plain(tmp_path / "out").config.attention_bias
    assert default_device_map() is None  # the setting ended with the command
    assert not capsys.readouterr().err


def test_what_needs_more_is_refused(
    on_disk: Pair, pair: Pair, data: Data, streamed: Scan, dense_dir: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(
        RequestError, match="expected all weights in memory for methods that change weights, got layers"
    ):
        restore(on_disk, streamed, (), data, method="low-rank")
    with pytest.raises(RequestError, match="expected all weights in memory for a purpose"):
        require_in_memory(on_disk.pruned.original_model, "a purpose")
    require_in_memory(pair.pruned.original_model, "a purpose")
    heads = streamed.select("mse")
    with pytest.raises(
        RequestError, match="expected both models in memory for mean-shift-sequential, got one at a time"
    ):
        restore(on_disk, streamed, heads, data, method="mean-shift-sequential")
    follows = TrainConfig(objective=Objective.parse("distillation"))
    with pytest.raises(RequestError, match="for an objective that runs the dense model, got one at a time"):
        restore(on_disk, streamed, heads, data, config=follows)
    with pytest.raises(RequestError, match="expected the CPU for a model with its layers on disk, got cuda"):
        load_hooked(dense_dir, device=torch.device("cuda"), device_map="disk")
    assert run_command(["restore", "a", "b", "run", "--method", "best", "--one-at-a-time"]) == 2
    assert "expected both models in memory for best, got one at a time" in capsys.readouterr().err
    monkeypatch.setenv("LCC_LENS_DEVICE_MAP", "balanced")
    with pytest.raises(RequestError, match="expected LCC_LENS_DEVICE_MAP to be auto or disk, got 'balanced'"):
        load_plain(dense_dir)


def test_device_map_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_device_map() is None
    monkeypatch.setenv("LCC_LENS_DEVICE_MAP", "auto")
    with placed("disk"):
        assert default_device_map() == "disk"
    with placed(None):
        assert default_device_map() == "auto"
    assert default_device_map() == "auto"
