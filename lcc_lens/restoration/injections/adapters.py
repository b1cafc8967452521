"""LoRA and DoRA adapters from peft, attached to the linear layers of a hooked model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.models.architecture.layers import is_transposed, linear_weight
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.hooked.weights import changed_weights, plain_model, split_layers
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.footprint import Footprint
from lcc_lens.restoration.injections.weights import layer_maps

AdapterKind = Literal["lora", "dora"]
#: The linear layers that adapters stand beside: those of attention, all of the decoder, or by last parts of names.
Targets = Literal["attention", "all"] | Sequence[str]
#: Adapters by name: peft's kind, and the linear layers.
ADAPTERS: dict[str, tuple[AdapterKind, Targets]] = {
    "lora": ("lora", "attention"),
    "dora": ("dora", "attention"),
    "lora-all": ("lora", "all"),
    "lora-vo": ("lora", ("v_proj", "o_proj")),
    "dora-vo": ("dora", ("v_proj", "o_proj")),
}


class AdapterInjection(Injection):
    """Peft's adapter layers, which replace linear layers while they are attached.

    They cannot be folded into pruned weights: merging fills the zeros, and kept separate they cost inference time.

    Args:
        layers: adapter layers by the path of the module in the plain model that they replace. A joint layer that the
            hooked model splits into copies stays, and its weight gains the adapter's product instead.
        names: those modules' plain names.
        default_lr: the learning rate if none is given.
        dropout: of the adapters' inputs, in training alone. The parameters seed it, so a resumed run draws the same.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], names: Sequence[str], *, default_lr: float = 3e-3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.default_lr, self.dropout = default_lr, dropout
        self._paths, self._names = tuple(layers), tuple(names)
        self.members = nn.ModuleList(layers.values())

    @property
    def n_beside(self) -> int:
        """Number of parameters kept beside the model's weights: the adapters'."""
        return self.n_trained

    @property
    def footprint(self) -> Footprint:
        return Footprint(n_trained=self.n_trained, n_beside=self.n_beside)

    @contextmanager
    def attached(self, model: HookedModel) -> Iterator[HookedModel]:
        """Attach the adapters within the ``with`` block."""
        original, joint = plain_model(model), split_layers(model)
        added = {n: _Added(m) for n, m in zip(self._names, self.members, strict=True) if n in joint}
        placed = {
            path: layer
            for name, path, layer in zip(self._names, self._paths, self.members, strict=True)
            if name not in joint
        }
        plain = {path: original.get_submodule(path) for path in placed}
        try:
            with changed_weights(model, added) if added else nullcontext():
                for path, layer in placed.items():
                    _put(original, path, layer)
                with self._drawing() if self.dropout else nullcontext():
                    yield model
        finally:
            for path, module in plain.items():
                _put(original, path, module)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draw dropout inside the block if it is trained there, from a seed that the parameters decide."""
        trained = [p for p in self.parameters() if p.requires_grad]
        trains = torch.is_grad_enabled() and bool(trained)
        for layer in self.members:
            cast("Any", layer).lora_dropout.train(trains)
        if not trains:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(int(fingerprint(trained)[:15], 16))
            yield

    def merged_weights(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By name of a linear layer, a function that merges the adapter into its weight ``[out, in]``."""
        return {
            name: functools.partial(_merged_weight, layer)
            for name, layer in zip(self._names, self.members, strict=True)
        }


class _Added:
    """Adds an adapter's product to the weight that it stands beside."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = cast("Any", layer)

    def __call__(self, weight: Tensor) -> Tensor:
        delta: Tensor = self.layer.get_delta_weight("default")
        return weight + (delta.T if is_transposed(self.layer.get_base_layer()) else delta).to(weight)


def adapters(
    model: HookedModel,
    *,
    kind: AdapterKind = "lora",
    rank: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Targets = "attention",
    seed: int = 0,
) -> AdapterInjection:
    """Build peft's LoRA or DoRA for linear layers of the decoder; the model itself does not change.

    Args:
        kind: ``lora`` (arXiv 2106.09685) or ``dora`` (arXiv 2402.09353).
        rank: of the adapters; ``alpha``: divided by the rank it scales them (twice the rank if not given).
        dropout: of their inputs, in training.
        targets: ``attention`` or ``all``, or last parts of the linear layers' names.

    Raises:
        RequestError: no such layers; or DoRA, or dropout, beside a joint layer that the hooked model splits.
    """
    original, maps = plain_model(model), layer_maps(model)
    found = targeted(maps, targets, projection_names(model, "z") if targets == "attention" else ())
    chosen = {id(maps[name]): name for name in found}
    names = {path: chosen[id(module)] for path, module in original.named_modules() if id(module) in chosen}
    paths = list(names)
    if not paths:
        raise RequestError(
            f"expected linear layers named {', '.join(targets)}, got none in this architecture; take a model that "
            "has them"
        )
    joint = [name for name in found if name in split_layers(model)]
    if joint and (kind == "dora" or dropout):
        raise RequestError(f"expected no joint layers for DoRA or dropout, got {joint[0]}; use LoRA without dropout")
    plain = {path: original.get_submodule(path) for path in paths}
    if kind == "dora":
        _refuse_zero_rows({names[path]: module for path, module in plain.items()})
    trained = [parameter for parameter in original.parameters() if parameter.requires_grad]
    adapted(original, paths, kind=kind, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    layers = {path: original.get_submodule(path) for path in paths}
    for path, module in plain.items():
        _put(original, path, module)
    for parameter in trained:  # peft freezes all parameters but its own
        parameter.requires_grad_(True)
    original.__dict__.pop("peft_config", None)
    for layer in layers.values():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return AdapterInjection(layers, list(names.values()), dropout=dropout)


def targeted(names: Iterable[str], targets: Targets, outputs: Sequence[str]) -> list[str]:
    """The names of the linear layers that adapters stand beside.

    Args:
        names: of the decoder's linear layers; ``outputs``: of the attention's output projections.
    """
    if targets == "all":
        return list(names)
    if targets == "attention":
        inside = tuple(f"{name.rpartition('.')[0]}." for name in outputs)
        return [name for name in names if name.startswith(inside)]
    return [name for name in names if name.rsplit(".", 1)[-1] in targets]


def _refuse_zero_rows(layers: Mapping[str, nn.Module]) -> None:
    """Refuse rows of zeros, since DoRA divides every row of a weight by its norm."""
    for name, module in layers.items():
        n_zero = int((linear_weight(module) == 0).all(1).sum())
        if n_zero:
            raise RequestError(f"expected no row of zeros for DoRA, got {n_zero} in {name}; restore by LoRA instead")


def adapted(
    model: nn.Module,
    paths: Sequence[str],
    *,
    kind: AdapterKind,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    seed: int,
) -> None:
    """Let peft add adapters to a plain model's linear layers, in place (see :func:`adapters`)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RequestError("expected peft for LoRA and DoRA, got none; install lcc-lens[baselines]") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout, target_modules=list(paths), use_dora=kind == "dora",
        bias="none", fan_in_fan_out=all(is_transposed(model.get_submodule(path)) for path in paths),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """The weight with the adapter merged by peft; the layer itself is restored bit for bit."""
    base = layer.get_base_layer()
    before = base.weight.detach().clone()
    layer.merge()
    after: Tensor = base.weight.detach().clone()
    layer.unmerge()
    with torch.no_grad():
        base.weight.copy_(before)
    return after.T if is_transposed(base) else after


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
