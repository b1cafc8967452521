"""What `best` trains follows from the memory that a machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.machine import memory
from lcc_lens.core.machine.memory import total_memory
from lcc_lens.restoration.in_memory import method_in_memory, training_bytes
from lcc_lens.restoration.injections.methods import METHODS

WHERE = "lcc_lens.restoration.in_memory.total_memory"


@pytest.mark.parametrize(
    ("factor", "low_rank", "chosen"),
    [(2.0, None, "best"), (1.2, None, "best-low-rank"), (None, None, "best"), (2.0, 4, "best-low-rank")],
)
def test_best_trains_all_weights_where_memory_holds_them(
    pruned_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    factor: float | None, low_rank: int | None, chosen: str,
) -> None:  # fmt: skip
    needed = training_bytes(Checkpoint(pruned_dir))
    monkeypatch.setattr(WHERE, lambda device: None if factor is None else int(factor * needed))
    spec = method_in_memory("best", pruned_dir, low_rank=low_rank)
    assert (spec.name, spec.preset) == (chosen, METHODS[chosen])
    is_told = "training a low-rank change instead" in caplog.text
    assert is_told == (factor == 1.2)
    assert method_in_memory(spec, pruned_dir).name == chosen


@pytest.mark.parametrize("method", ["polish", "lcc", "low-rank"])
def test_other_methods_stay_what_they_are(pruned_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(WHERE, lambda device: 1)
    assert method_in_memory(method, pruned_dir, low_rank=4).name == method
    assert method_in_memory("best", pruned_dir / "absent").name == "best"  # refused where the models are checked


def test_training_takes_24_bytes_per_weight_of_the_layers_beside_both_models(
    pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(pruned_dir / "model.safetensors")
    inside = sum(t.numel() for name, t in tensors.items() if ".layers." in name)
    both = 2 * sum(4 * t.numel() for t in tensors.values())
    assert training_bytes(Checkpoint(pruned_dir)) == 24 * inside + both
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors", {"format": "pt"})
    assert training_bytes(Checkpoint(tmp_path)) == training_bytes(Checkpoint(pruned_dir))  # computed in float32, too
    monkeypatch.setenv("LCC_LENS_DTYPE", "bfloat16")
    assert training_bytes(Checkpoint(pruned_dir)) == 24 * inside + both / 2


def test_memory_is_what_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, physical = torch.device("cpu"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMITS", (limit, tmp_path / "none"))
    assert total_memory(cpu) == physical
    for text, expected in (("max\n", physical), ("1048576\n", 2**20), (str(2**62), physical)):
        limit.write_text(text)
        assert total_memory(cpu) == expected
