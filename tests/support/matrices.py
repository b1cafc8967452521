"""Weight matrices and inputs with known structure: 2:4 zeros, correlated features."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.tiny import build_model
from torch import Tensor


def inputs_like_text(n_tokens: int, width: int, seed: int) -> Tensor:
    """Correlated features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-1, 1, width, dtype=torch.float64)
    return torch.randn(n_tokens, width, generator=generator, dtype=torch.float64) @ mixing * scale


def linears(model) -> dict[str, torch.nn.Linear]:
    layers = model.get_decoder().layers.named_modules()
    return {f"model.layers.{name}.weight": m for name, m in layers if isinstance(m, torch.nn.Linear)}


def two_of_four(model):
    """Zero two of every four neighbours of every linear weight, at changing places."""
    with torch.no_grad():
        for number, layer in enumerate(linears(model).values()):
            groups = layer.weight.view(-1, 4)
            lowest = groups.abs().argsort(dim=1)[:, (number % 2, 2)]
            groups.scatter_(1, lowest, 0.0)
    return model


def sparse_model(**changes):
    return two_of_four(build_model(head_dim=8, **changes))


def edited(source: Path, target: Path, name: str, edit) -> Path:
    """A copy of a checkpoint with one tensor changed in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
