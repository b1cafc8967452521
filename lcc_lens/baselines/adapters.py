"""LoRA and DoRA by peft, under TransformerLens' hooks: adapters that stand in for plain linear maps for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn

from lcc_lens.errors import RequestError
from lcc_lens.hooks import HookedModel
from lcc_lens.injections.base import Injection
from lcc_lens.injections.weights import layer_maps

AdapterKind = Literal["lora", "dora"]
#: The attention's projections, as llama-like architectures name them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdapterInjection(Injection):
    """Peft's adapter layers, which replace plain modules while they are attached.

    They do not fold under a zero pattern: merged, they fill the zeros; beside the weights, they cost time.

    Args:
        layers: adapter layers by the path of the module that they stand in for, within the plain model.
        default_lr: the learning rate if none is asked for.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, default_lr: float = 3e-3) -> None:
        super().__init__()
        self.default_lr = default_lr
        self._paths = tuple(layers)
        self.members = nn.ModuleList(layers.values())

    @contextmanager
    def attached(self, model: HookedModel) -> Iterator[HookedModel]:
        """Put the adapters in their places inside the block."""
        original = cast("Any", model).original_model
        plain = {path: original.get_submodule(path) for path in self._paths}
        try:
            for path, layer in zip(self._paths, self.members, strict=True):
                _put(original, path, layer)
            yield model
        finally:
            for path, module in plain.items():
                _put(original, path, module)


def adapters(
    model: HookedModel,
    *,
    kind: AdapterKind = "lora",
    rank: int = 8,
    targets: Sequence[str] = ATTENTION,
    seed: int = 0,
) -> AdapterInjection:
    """Peft's LoRA or DoRA on linear maps of the decoder layers; the model itself stays as it is.

    Args:
        model: the hooked model.
        kind: ``lora`` (arXiv 2106.09685) or ``dora`` (arXiv 2402.09353).
        rank: of the adapters; alpha is twice the rank.
        targets: last parts of the names of the maps.
        seed: of the adapters' initial values.

    Raises:
        RequestError: no map of such a name, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RequestError("wanted peft for LoRA and DoRA, got none; install lcc-lens[baselines]") from error

    original = cast("Any", model).original_model
    chosen = {id(m) for name, m in layer_maps(model).items() if name.rsplit(".", 1)[-1] in targets}
    paths = [path for path, module in original.named_modules() if id(module) in chosen]
    if not paths:
        raise RequestError(f"wanted linear maps named {', '.join(targets)}, got none in this architecture")
    plain = {path: original.get_submodule(path) for path in paths}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths, use_dora=kind == "dora", bias="none")
    trained = [number for number in original.parameters() if number.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, original)
    layers = {path: original.get_submodule(path) for path in paths}
    for path, module in plain.items():
        _put(original, path, module)
    for number in trained:  # peft freezes everything that is not its own
        number.requires_grad_(True)
    original.__dict__.pop("peft_config", None)
    for layer in layers.values():
        for number in layer.parameters():
            if number.requires_grad:
                number.data = number.data.float()
    return AdapterInjection(layers)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
