"""The same results on a GPU: every job on the CPU and on CUDA, in float32; and what a GPU computes in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import build_model, save_model

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.machine.memory import peak_memory
from lcc_lens.data.datasets import load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune, refit
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.validation import validation_loss

GPU = "cuda"
DEVICES = {"one": "cpu", "other": GPU}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 products in float32, whatever the process does otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DEVICE", device)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a.cpu().double() - b.cpu().double()).norm()) <= tolerance * float(b.double().norm()) + 1e-12


def test_without_a_wish_the_gpu_computes(dense_dir: Path, pruned_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCC_LENS_DEVICE", raising=False)
    monkeypatch.delenv("LCC_LENS_DTYPE", raising=False)
    pair = load_pair(dense_dir, pruned_dir)
    assert default_device().type == device_of(pair.pruned).type == GPU
    assert compute_dtype(default_device()) == pair.pruned.cfg.dtype == torch.bfloat16  # Ampere and newer
    with peak_memory(device_of(pair.pruned)) as peak:
        held = torch.zeros(2**20, device=GPU)
    assert peak.mib == pytest.approx(4.0)
    assert held.device.type == GPU


@pytest.mark.parametrize("settings", [
    {"method": "wanda"}, {"method": "magnitude"}, {"method": "wanda", "pattern": "2:4"}, {"method": "sparsegpt"},
    {"method": "slimgpt", "sparsity": 0.3}, {"method": "slimgpt", "sparsity": 0.3, "sliced": True},
])  # fmt: skip
def test_pruning_keeps_the_same_weights(
    settings: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_model(build_model(head_dim=8), tmp_path / "dense")
    for name, device in DEVICES.items():
        on(device, monkeypatch)
        prune(dense, tmp_path / name, calibration=str(text_file), n_samples=4, seq_len=48, **settings)
    cpu, gpu = weights(tmp_path / "one"), weights(tmp_path / "other")
    for name, one in cpu.items():
        assert one.shape == gpu[name].shape
        same = ((one != 0) == (gpu[name] != 0)).float().mean()
        assert same > 0.99, name  # scores that rounding makes equal may go either way
        assert is_near(gpu[name], one, 1e-3 if same == 1 else 0.2), name


def test_a_refit_solves_the_same(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, device in DEVICES.items():
        on(device, monkeypatch)
        refit(dense_dir, pruned_dir, tmp_path / name, calibration=str(text_file), n_samples=6, seq_len=48)
    before, cpu, gpu = (weights(folder) for folder in (pruned_dir, tmp_path / "one", tmp_path / "other"))
    assert all(is_near(gpu[name], one, 1e-3) for name, one in cpu.items())
    assert all(((before[name] == 0) == (one == 0)).all() for name, one in gpu.items() if one.ndim == 2)


def test_scans_find_the_same(
    dense_dir: Path, pruned_dir: Path, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []
    for device in DEVICES.values():
        on(device, monkeypatch)
        scans.append(scan(load_pair(dense_dir, pruned_dir), load_data(str(question_file))))
    cpu, gpu = scans
    assert is_near(gpu.components.singular_values, cpu.components.singular_values, 1e-3)
    assert is_near(gpu.components.coefficients.abs(), cpu.components.coefficients.abs(), 1e-2)  # signs are free
    for selector in ("mse", "probe"):
        a, b = (found.scores(selector).value for found in scans)
        assert is_near(b, a, 2e-2), selector


def restored(method: str, dense_dir: Path, pruned_dir: Path, question_file: Path) -> tuple[Pair, Scan, Restoration]:
    pair, data = load_pair(dense_dir, pruned_dir), load_data(str(question_file), role="train")
    found = scan(pair, load_data(str(question_file), role="probe"))
    config = TrainConfig(batch_size=8, epochs=2, validate_every=2)
    return pair, found, restore(pair, found, found.select("mse", share=0.5), data, method=method, config=config)


@pytest.mark.parametrize("method", ["lcc", "low-rank", "mean-shift", "gain+norms", "lcc+mlp-offset"])
def test_training_comes_to_the_same(
    method: str, dense_dir: Path, pruned_dir: Path, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = []
    for device in DEVICES.values():
        on(device, monkeypatch)
        both.append(restored(method, dense_dir, pruned_dir, question_file)[2])
    (cpu, gpu), before = both, weights(pruned_dir)
    assert is_near(gpu.constants, cpu.constants, 2e-2)
    for (name, change), (other_name, other) in zip(cpu.changes, gpu.changes, strict=True):
        assert name == other_name
        weight = before[f"{name}.weight"]
        assert is_near(other(weight) - weight, change(weight) - weight, 5e-2), name
    assert all(gpu.record.losses[name] == pytest.approx(loss, rel=1e-3) for name, loss in cpu.record.losses.items())


def test_a_stopped_run_goes_on_to_the_same_numbers(
    dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(GPU, monkeypatch)
    pair, data = load_pair(dense_dir, pruned_dir), load_data(str(question_file), role="train")
    settings = {"method": "low-rank", "config": TrainConfig(batch_size=4, epochs=3, checkpoint_every=1)}
    whole = restore(pair, None, (), data, run=tmp_path / "whole", **settings)

    def stop(step: Step) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(pair, None, (), data, run=tmp_path / "run", on_step=stop, **settings)
    resumed = restore(pair, None, (), data, run=tmp_path / "run", resume=True, **settings)
    for (name, one), (_, other) in zip(whole.changes, resumed.changes, strict=True):
        weight = weights(pruned_dir)[f"{name}.weight"]
        assert is_near(other(weight) - weight, one(weight) - weight, 1e-3), name


def test_what_a_gpu_restored_in_bfloat16_is_exported_and_verified(
    dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(GPU, monkeypatch)
    monkeypatch.setenv("LCC_LENS_DTYPE", "bfloat16")
    pair, _, restoration = restored("lcc+low-rank", dense_dir, pruned_dir, question_file)
    trained = [restoration.constants, *(n for _, change in restoration.changes for n in change.parameters())]
    assert {number.dtype for number in trained} == {torch.float32}
    assert pair.pruned.cfg.dtype == torch.bfloat16
    report = export(restoration, pruned_dir, tmp_path / "out")
    assert report.logit_difference < 1e-3 * report.logit_effect
    before, after = weights(pruned_dir), weights(tmp_path / "out")
    maps = [name for name, one in before.items() if one.ndim == 2 and ".layers." in name]
    assert maps
    assert all(((before[name] == 0) <= (after[name] == 0)).all() for name in maps)


def test_layers_spread_by_accelerate_give_the_same_losses(
    dense_dir: Path, pruned_dir: Path, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcc_lens.data.datasets import encode

    on(GPU, monkeypatch)
    found = []
    for device_map in (None, "auto"):
        pair = load_pair(dense_dir, pruned_dir, device_map=device_map)
        sequences = encode(load_data(str(question_file)), pair.tokenizer, max_length=64)[:8]
        found.append(validation_loss(pair.pruned, None, sequences))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert math.isfinite(found[0])
