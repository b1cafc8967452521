"""Reconstruction by windows of decoder layers: zeros stay, each comes nearer to the dense model, and runs go on."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairs import Families
from support.tiny import build_model, save_model
from transformers import AutoModelForCausalLM

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import placed
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import load_data
from lcc_lens.data.registry import domains
from lcc_lens.evaluation.panel import seen_domains
from lcc_lens.frontends.cli.pruning import Reconstruct, ReconstructCalibration, WindowTraining
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.loading.provenance import ancestors
from lcc_lens.pruning import jobs
from lcc_lens.pruning.calibration.texts import calibrated_groups
from lcc_lens.pruning.reconstruct import reconstruct as module
from lcc_lens.pruning.reconstruct.reconstruct import RECONSTRUCTION, ReconstructConfig, reconstruct_checkpoint
from lcc_lens.pruning.reconstruct.window import Window, stored_parameters

CPU = torch.device("cpu")
TOKENS = torch.randint(1, 257, (19, 24), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"tokens": TOKENS, "device": CPU, "dtype": torch.float32, "provenance": {"data": "random"}}
QUICK = ReconstructConfig(window=2, lr=3e-3)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path / "model.safetensors")[0]


def equal(first: Path, second: Path) -> set[str]:
    """The names of tensors that are the same, bit for bit."""
    ours, theirs = weights(first), weights(second)
    return {name for name in ours if torch.equal(ours[name], theirs[name])}


def final_error(path: Path, dense: Path) -> float:
    """The relative squared error of the hidden states before the final norm, on other tokens."""
    tokens = torch.randint(1, 257, (8, 24), generator=torch.Generator().manual_seed(1))
    kept: list[torch.Tensor] = []
    for place in (path, dense):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            model(tokens)
    return float(((kept[0] - kept[1]).square().sum(-1) / kept[1].square().sum(-1)).mean())


def test_zeros_stay_and_every_window_comes_nearer(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = reconstruct_checkpoint(dense_dir, pruned_dir, out, config=QUICK, **SETTINGS)
    assert compare_zeros(pruned_dir, out).is_equal
    assert [(w["first_layer"], w["last_layer"], w["is_kept"]) for w in report["windows"]] == [
        (0, 1, True),
        (2, 2, True),
    ]
    assert all(window["error_after"] < window["error_before"] for window in report["windows"])
    assert final_error(out, dense_dir) < 0.9 * final_error(pruned_dir, dense_dir)
    assert report == read_json(out / RECONSTRUCTION)
    assert report["held_out_sequences"] == 1
    assert report["sha256"] == Checkpoint(out).sha256
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert equal(pruned_dir, out) == outside & weights(out).keys()


def test_one_window_of_all_layers_equals_adam_on_transformers_own_pass(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path
) -> None:
    """Written anew: the error before the final norm, gradients of surviving weights, a rate that falls to zero."""
    config = ReconstructConfig(window=3, epochs=2, lr=1e-3, batch_size=4, seed=5)
    reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "out", config=config, **SETTINGS)
    dense, model = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense_dir, pruned_dir))
    seen: dict[Any, torch.Tensor] = {}
    for one in (dense, model):
        one.model.norm.register_forward_pre_hook(lambda _, args, one=one: seen.__setitem__(one, args[0]))
    trained = [(one, one.detach() != 0) for one in model.model.layers.parameters()]
    optimiser = torch.optim.Adam([one for one, _ in trained], lr=1e-3)
    training = torch.randperm(19, generator=torch.Generator().manual_seed(5))[:16]
    generator = torch.Generator().manual_seed(5)
    order = torch.cat([training[torch.randperm(16, generator=generator)] for _ in range(2)])
    for step, batch in enumerate(order.split(4)):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / 8)
        for one in (dense, model):
            one(TOKENS[batch])
        target = seen[dense].detach()
        error = (((seen[model] - target) ** 2).sum(-1) / (target**2).sum(-1)).mean()
        optimiser.zero_grad()
        error.backward()
        for one, mask in trained:
            one.grad *= mask
        optimiser.step()
    found = weights(tmp_path / "out")
    for name, one in model.model.layers.named_parameters():
        assert torch.allclose(found[f"model.layers.{name}"], one, atol=1e-5), name


def test_a_window_that_gets_worse_stays_as_it_was(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = Window.train
    monkeypatch.setattr(
        Window, "train", lambda self, dense, batches, lr: train(self, dense, batches, 10.0 if is_first(self) else lr)
    )
    report = reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "out", config=QUICK, **SETTINGS)
    assert [window["is_kept"] for window in report["windows"]] == [False, True]
    assert "layers 0 to 1 stay as they were: training took their error on held-out sequences from" in caplog.text
    same = equal(pruned_dir, tmp_path / "out")
    assert same == {name for name in weights(pruned_dir) if ".layers.2." not in name}


def test_a_window_with_an_error_that_is_no_number_stays_as_it_was(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, n_steps = Window.error, 0

    def broken(self: Window, *args: Any) -> torch.Tensor:
        nonlocal n_steps
        n_steps += torch.is_grad_enabled() and is_first(self)
        is_broken = torch.is_grad_enabled() and is_first(self) and n_steps == 5
        return error(self, *args) * (math.nan if is_broken else 1)

    monkeypatch.setattr(Window, "error", broken)
    report = reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "out", config=QUICK, **SETTINGS)
    assert n_steps == 5  # its training ended there
    assert [window["is_kept"] for window in report["windows"]] == [False, True]
    assert report["windows"][0]["error_after"] is None
    assert "layers 0 to 1 stay as they were" in caplog.text
    assert report == json.loads((tmp_path / "out" / RECONSTRUCTION).read_text())
    assert "model.layers.0.input_layernorm.weight" in equal(pruned_dir, tmp_path / "out")


def is_first(window: Window) -> bool:
    """Whether a window begins with the first layer."""
    return "model.layers.0.mlp.up_proj.weight" in window._stored[0].values()


def test_a_model_that_lost_nothing_stays_as_it_was(dense_dir: Path, tmp_path: Path) -> None:
    report = reconstruct_checkpoint(dense_dir, dense_dir, tmp_path / "out", config=QUICK, **SETTINGS)
    assert {window["error_before"] for window in report["windows"]} == {0.0}
    assert equal(dense_dir, tmp_path / "out") == weights(dense_dir).keys()


def test_a_reconstruction_that_was_stopped_goes_on_to_the_same_bits(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReconstructConfig(window=1, lr=3e-3)
    whole = reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "whole", config=config, **SETTINGS)
    train, windows = Window.train, []

    def stopping(self: Window, *args: Any) -> Any:
        windows.append(self)
        if len(windows) == 3:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(Window, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "broken", config=config, **SETTINGS)
    assert not (tmp_path / "broken").exists()
    report = reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "broken", config=config, **SETTINGS)
    assert len(windows) == 4
    assert report == whole
    assert equal(tmp_path / "whole", tmp_path / "broken") == weights(pruned_dir).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2", "qwen3"])
def test_other_families(family: str, dtype: torch.dtype, families: Families, tmp_path: Path) -> None:
    """Transposed weights, biases, norms of outputs and of queries, windows, joint projections; both formats."""
    pair = families(family)
    dense, pruned = pair.dense_id.path, pair.pruned_id.path
    settings = {**SETTINGS, "dtype": dtype}
    report = reconstruct_checkpoint(dense, pruned, tmp_path / "out", config=ReconstructConfig(2, lr=3e-3), **settings)
    assert all(window["is_kept"] for window in report["windows"])
    assert compare_zeros(pruned, tmp_path / "out").is_equal
    trained = {name for layer in stored_parameters(Checkpoint(pruned)) for name in layer.values()}
    constant = {name for name in trained if not weights(pruned)[name].any()}  # biases of zero
    assert equal(pruned, tmp_path / "out") == (weights(pruned).keys() - trained) | constant
    assert len(trained) == {"gpt2": 3 * 12, "gemma2": 3 * 11, "qwen2": 3 * 12, "qwen3": 3 * 11}[family]


def test_layers_on_disk_give_the_same_bits(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "whole", config=QUICK, **SETTINGS)
    with placed("disk"):
        reconstruct_checkpoint(dense_dir, pruned_dir, tmp_path / "streamed", config=QUICK, **SETTINGS)
    assert equal(tmp_path / "whole", tmp_path / "streamed") == weights(pruned_dir).keys()


def test_no_weight_is_rounded_to_zero(dense_dir: Path, tmp_path: Path) -> None:
    """Small numbers of float16 stay what they were instead of a zero that was not there."""
    model = build_model().half()
    model.model.layers[1].mlp.up_proj.weight.data[:, ::2] = 0
    model.model.layers[1].mlp.up_proj.weight.data[0, 1] = 6e-8
    pruned = save_model(model, tmp_path / "pruned")
    config = ReconstructConfig(window=3, lr=1e-2, epochs=2)
    reconstruct_checkpoint(dense_dir, pruned, tmp_path / "out", config=config, **SETTINGS)
    assert compare_zeros(pruned, tmp_path / "out").is_equal


def test_what_cannot_be_served_is_refused(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reconstruct(config: ReconstructConfig = QUICK, pruned: Path = pruned_dir, n: int = 19) -> None:
        settings = {**SETTINGS, "tokens": TOKENS[:n]}
        reconstruct_checkpoint(dense_dir, pruned, tmp_path / "out", config=config, **settings)

    with pytest.raises(RequestError, match="expected at least 5 sequences, 4 of a step and one held out, got 4; raise"):
        reconstruct(ReconstructConfig(batch_size=4), n=4)
    other_heads = save_model(build_model(num_key_value_heads=5), tmp_path / "heads")
    with pytest.raises(RequestError, match="expected a dense model and the same model with zeros"):
        reconstruct_checkpoint(other_heads, pruned_dir, tmp_path / "out", **SETTINGS)
    broken = build_model()
    broken.model.layers[2].mlp.up_proj.weight.data[3, 4] = math.nan
    with pytest.raises(LensError, match=r"expected finite weights, got NaN or infinity in model\.layers\.2\.mlp"):
        reconstruct(pruned=save_model(broken, tmp_path / "broken"))
    n_trained = sum(weights(pruned_dir)[name].numel() for name in stored_parameters(Checkpoint(pruned_dir))[0].values())
    monkeypatch.setattr(module, "total_memory", lambda _: 16 * n_trained * 2 - 1)
    with pytest.raises(RequestError, match=r"memory for the training of 2 layers, .* choose --window 1"):
        reconstruct()
    reconstruct(ReconstructConfig(window=1))  # this one fits
    for settings in ({"window": 0}, {"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}, {"seed": -1}):
        with pytest.raises(RequestError, match=f"expected {next(iter(settings))}"):
            ReconstructConfig(**settings)  # type: ignore[arg-type]


def test_too_few_sequences_are_refused_before_the_model_writes_text(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="expected at least 3 sequences"):
        jobs.reconstruct(dense_dir, pruned_dir, tmp_path / "out", calibration="self", n_samples=2)
    assert not list(tmp_path.iterdir())


def test_records_say_what_the_model_was_calibrated_on(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"n_samples": 3, "seq_len": 16}
    first, second = (load_data(str(text_file), role=role) for role in ("calibration", "train"))
    jobs.refit(dense_dir, pruned_dir, tmp_path / "refit", calibration=first, **few)
    out = tmp_path / "out"
    record = jobs.reconstruct(dense_dir, tmp_path / "refit", out, calibration=second, **few)
    assert second.groups <= calibrated_groups(out)
    assert calibrated_groups(out) == calibrated_groups(tmp_path / "refit") | second.groups
    assert calibrated_groups(pruned_dir) <= calibrated_groups(out)
    assert ancestors(out) == (record["dense_sha256"],) == (Checkpoint(dense_dir).sha256,)
    (out / RECONSTRUCTION).write_text(
        json.dumps({**record, "calibration": {**record["calibration"], "data": "python"}})
    )
    assert seen_domains(out) == {*domains(str(text_file)), *domains("python")}
    assert record.table().shape == (1, 5)
    assert "windows of layers trained, zeros kept" in str(record)


def test_the_command_s_defaults_are_the_function_s() -> None:
    named = {name: one.default for name, one in inspect.signature(jobs.reconstruct).parameters.items()}
    options = (Reconstruct, ReconstructCalibration, WindowTraining)
    for name in named.keys() - {"dense", "pruned", "out"}:
        assert getattr(next(some for some in options if hasattr(some, name)), name) == named[name]
