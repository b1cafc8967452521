"""Injections that change weights and keep their zeros: masked low rank, gains, norms, all nonzero weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.models.architecture.layers import is_linear
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.offloading import require_in_memory
from lcc_lens.models.hooked.self_checks import check_tokens
from lcc_lens.models.hooked.sites import mlp_width, projection_names
from lcc_lens.models.hooked.weights import plain_modules, weight_shape
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.changes import Change, Gain, LowRank, Shift

#: What the plain names of modules within decoder layers have in common.
IN_LAYER = re.compile(r"\.\d+\.")


class WeightInjection(Injection):
    """Changes of weights by the plain name of their module.

    Args:
        changes: by plain name of their module.
        default_lr: see :class:`~lcc_lens.restoration.injections.base.Injection`.
    """

    def __init__(self, changes: Mapping[str, Change], *, default_lr: float) -> None:
        super().__init__()
        self.default_lr = default_lr
        self._names = tuple(changes)
        self.members = nn.ModuleList(changes.values())

    def changes(self) -> Mapping[str, Change]:
        members = [member for member in self.members if isinstance(member, Change)]
        return dict(zip(self._names, members, strict=True))


class FixedWeights(WeightInjection):
    """Changes of weights that are not trained, such as a refit's; copies share its tensors.

    Args:
        changes: by plain name of their module.
    """

    def __init__(self, changes: Mapping[str, Change]) -> None:
        super().__init__(changes, default_lr=1.0)
        self.requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedWeights:
        return self


def masked_low_rank(model: HookedModel, *, rank: int = 8, seed: int = 0) -> WeightInjection:
    r"""$W + M \odot BA$ on every linear layer of the decoder layers, initially the identity."""
    if rank < 1:
        raise RequestError(f"expected a rank of at least 1 for a masked low rank, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    changes = {name: LowRank.random(weight_shape(m), rank, generator) for name, m in layer_maps(model).items()}
    return WeightInjection(changes, default_lr=3e-3)


def masked_weights(model: HookedModel) -> WeightInjection:
    """Every nonzero weight of the decoder layers' linear layers: full fine-tuning under the mask, an upper bound."""
    changes = {name: Shift(torch.zeros(weight_shape(module))) for name, module in layer_maps(model).items()}
    return WeightInjection(changes, default_lr=1e-4)


def norm_gains(model: HookedModel) -> WeightInjection:
    """The weight of every norm, as in PERP (arXiv 2312.15230)."""
    changes = _norm_shifts(model)
    if not changes:
        raise RequestError("expected norms with weights to train, got none in this architecture; leave norms out")
    return WeightInjection(changes, default_lr=1e-3)


def all_weights(model: HookedModel) -> WeightInjection:
    """Every nonzero weight of the decoder layers' linear layers, and the weights of their norms."""
    norms = {name: shift for name, shift in _norm_shifts(model).items() if IN_LAYER.search(name)}
    return WeightInjection({**masked_weights(model).changes(), **norms}, default_lr=1e-4)


def _norm_shifts(model: HookedModel) -> dict[str, Shift]:
    return {
        name: Shift(torch.zeros_like(module.get_parameter("weight"), dtype=torch.float32, device="cpu"))
        for name, module in plain_modules(model).items()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.get_parameter("weight").ndim == 1
    }


def output_gains(model: HookedModel, projections: Sequence[str], heads: Sequence[Head]) -> WeightInjection:
    """LoFiT's scaling of ``hook_z``, one parameter per head and dimension, as gains of the output projections' columns.

    Raises:
        RequestError: a head twice, or outside the model.
    """
    d_head = int(model.cfg.d_head)
    heads = check_heads(heads, int(model.cfg.n_layers), int(model.cfg.n_heads))
    own = torch.arange(d_head)
    changes: dict[str, Change] = {}
    for layer in sorted({head.layer for head in heads}):
        columns = torch.cat([chosen.head * d_head + own for chosen in heads if chosen.layer == layer])
        changes[projections[layer]] = Gain(torch.zeros(len(columns)), columns)
    return WeightInjection(changes, default_lr=3e-2)


def mlp_gains(model: HookedModel) -> WeightInjection:
    """The same at every MLP's post-activation: one parameter per neuron, as gains of the down projections' columns.

    Raises:
        RequestError: no down projections.
    """
    neurons = torch.arange(mlp_width(model))
    changes = {name: Gain(torch.zeros(len(neurons)), neurons.clone()) for name in projection_names(model, "mlp")}
    return WeightInjection(changes, default_lr=1e-2)


def layer_maps(model: HookedModel) -> dict[str, nn.Module]:
    """The linear layers of the decoder layers by plain name.

    Raises:
        RequestError: they are on disk, or the model computes with copies.
    """
    modules = plain_modules(model)
    require_in_memory(cast("Any", model).original_model, "methods that change weights")
    return {n: m for n, m in modules.items() if is_linear(m) and IN_LAYER.search(n)}


def check_reached(model: HookedModel, injection: Injection) -> None:
    """Refuse an injection whose changed weights a hooked forward pass does not read, fused or stepwise.

    TransformerLens may compute with copies of weights. Those of joint layers follow; a change of another original has
    no effect.
    """
    changes = {name: change for part in injection.parts for name, change in part.changes().items()}
    if not changes:
        return
    numbers = {name: list(change.parameters()) for name, change in changes.items()}
    flat = [number for own in numbers.values() for number in own]
    is_reached = dict.fromkeys(map(id, flat), True)
    for run in (forward, _stepwise):
        with torch.enable_grad(), injection.attached(model):
            logits = run(model, check_tokens(model), injection.hooks())
            grads = torch.autograd.grad(logits.float().square().mean(), flat, allow_unused=True)
        for number, grad in zip(flat, grads, strict=True):
            is_reached[id(number)] &= grad is not None
    for name, own in numbers.items():
        if not any(is_reached[id(number)] for number in own):
            raise RequestError(
                f"expected a model whose hooked forward pass reads {name}, got one that computes with a copy of it; "
                "train it by a method of constants (lcc, offset)"
            )


def _stepwise(model: HookedModel, tokens: Tensor, hooks: list[NamedHook]) -> Tensor:
    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits
