"""Find biases that can hold constants: stored ones, or ones that a setting or another architecture adds."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.rewriting import Splits
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import head_size, linear_weight, read_config, skeleton
from lcc_lens.models.architecture.retyping import config_entries, retyped_configs, split_names
from lcc_lens.models.architecture.tiny_models import build_tiny, shrink, tiny_logits
from lcc_lens.models.hooked.sites import ConstantSite

#: Which bias takes the constants: that of the projection which reads the site; the value projection's, which passes
#: through attention unchanged, since the weights of a query sum to one; or that of the other block's output projection,
#: where attention and MLP add to the residual stream in parallel.
Place = Literal["output", "value", "parallel"]
#: By site, the output projections of the other block, and what a message calls the place of a constant.
_OTHER_OUTPUTS: Mapping[ConstantSite, tuple[str, ...]] = {"z": MLP_OUTPUTS, "mlp": ATTENTION_OUTPUTS}
_PARTS: Mapping[ConstantSite, str] = {"z": "head", "mlp": "MLP"}
#: By site, settings of another architecture that may add its bias.
_SWITCHES: Mapping[ConstantSite, tuple[tuple[str, ...], ...]] = {
    "z": (("attention_bias",),),
    "mlp": (("mlp_bias",), ("attention_bias", "mlp_bias")),  # the second if attention has biases already
}
#: Relative to the largest logit of a tiny model: the error that rounding may cause, and the smallest effect that the
#: constants must have for the comparison to mean anything.
_ROUNDING, _EFFECT = 1e-4, 1e-2
#: Errors by which an architecture refuses unusual sizes.
_NOT_BUILT = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class BiasSlots:
    """Biases, one per layer, that can hold a site's constants, and the changes that make the checkpoint load with them.

    ``config`` are the entries of ``config.json`` to set (all entries if ``retyped_as`` names another architecture);
    those in ``switches`` add the biases. They add ``zero_biases`` too, which are written as zeros. At the ``value``
    place ``heads_per_bias`` heads share a bias and so need the same constant.
    """

    biases: tuple[str, ...]
    config: Mapping[str, Any]
    zero_biases: Mapping[str, tuple[int, ...]]
    place: Place = "output"
    retyped_as: str | None = None
    heads_per_bias: int = 1
    splits: Splits = field(default_factory=dict)
    """Stored tensors that the other architecture stores as several, with their rows."""
    width: int | None = None
    """Parameters per bias; None if all biases are stored."""
    switches: tuple[str, ...] = ()
    site: ConstantSite = "z"

    @property
    def way(self) -> str:
        """Where the constants go, in words, for tables."""
        parallel = {"z": "bias of the parallel MLP", "mlp": "bias of the parallel attention"}[self.site]
        where = {"output": "output bias", "value": "value bias", "parallel": parallel}[self.place]
        if self.retyped_as:
            return f"{where}, re-typed as {self.retyped_as}"
        return f"{where}, by {' and '.join(self.config)}" if self.config else where


@dataclass(frozen=True)
class _Candidate:
    """A configuration under which a place may have a bias in every layer, still to be tested."""

    config: Any
    site: ConstantSite
    place: Place
    switches: tuple[str, ...] = ()
    retyped_as: str | None = None


def find_slots(
    checkpoint: Checkpoint, projections: tuple[str, ...], site: ConstantSite = "z", *, shared_values: bool = False
) -> BiasSlots:
    """Find biases that hold a site's constants exactly, stored in a checkpoint or added by a setting.

    Tried in this order: the bias of the projection that reads the site, stored or added by a setting; for head outputs,
    the value projection's bias, if every head has its own; the output bias of the other block, if attention and MLP add
    to the residual stream in parallel; the projection's bias in another architecture that computes the same. All but a
    stored bias are tested on a tiny random model of the architecture, so no list of families can be out of date.

    Args:
        projections: the linear layers that read the site, by layer: output projections or down projections.
        shared_values: whether the heads that share a value head have the same constant.
    """
    biases = tuple(checkpoint.stored_name(f"{name}.bias") for name in projections)
    if all(bias in checkpoint.tensors for bias in biases):
        return BiasSlots(biases, {}, {}, site=site)
    config = read_config(checkpoint.path)
    for candidate in _candidates(config, site):
        if _serves(checkpoint.path, config, candidate, projections):
            slots = _slots(checkpoint, candidate, projections)
            if slots.heads_per_bias == 1 or shared_values:
                return slots
    raise RequestError(
        f"expected an architecture that can hold a constant per {_PARTS[site]} in a bias, got {config.model_type}, "
        "which has none that is exact; restore it for hooks alone (exportable=False, --hooks-only) and serve it with "
        "lcc_lens.load_restored"
    )


def _candidates(config: Any, site: ConstantSite) -> Iterator[_Candidate]:
    if config.get_text_config() is not config:  # the settings of nested text models are not switched
        return
    names = [name for name, value in vars(config).items() if "bias" in name and isinstance(value, bool)]
    switched = {name: _switched(config, name) for name in names}
    places: tuple[Place, ...] = ("output", "value", "parallel") if site == "z" else ("output", "parallel")
    for place in places:
        if place != "output":  # the caller looked for stored output biases already
            yield _Candidate(config, site, place)
        for name, changed in switched.items():
            yield _Candidate(changed, site, place, (name,))
    for switches in _SWITCHES[site]:
        for retyped in retyped_configs(config, switches):
            yield _Candidate(retyped, site, "output", switches, retyped_as=retyped.model_type)


def _switched(config: Any, switch: str) -> Any:
    changed = copy.deepcopy(config)
    setattr(changed, switch, not getattr(config, switch))
    return changed


def _serves(path: Path, config: Any, candidate: _Candidate, projections: tuple[str, ...]) -> bool:
    """Whether a candidate is exact.

    If no tiny model of the architecture can be built, a setting that adds the projection's own bias is trusted; the
    export compares logits in any case.
    """
    try:
        return _is_exact(_Trial.of(config, candidate, projections))
    except _NOT_BUILT:
        if not candidate.switches or candidate.retyped_as or candidate.place != "output":
            return False
        return _bias_names(skeleton(path, candidate.config), projections, candidate) is not None


@dataclass(frozen=True)
class _Trial:
    """A candidate beside the configuration that it changes; equal descriptions have equal results."""

    config: Any = field(compare=False)
    candidate: _Candidate = field(compare=False)
    projections: tuple[str, ...]
    described: tuple[object, ...]

    @classmethod
    def of(cls, config: Any, candidate: _Candidate, projections: tuple[str, ...]) -> _Trial:
        configs = [(type(c), c.to_json_string(use_diff=False)) for c in (config, candidate.config)]
        described = (*configs, *(getattr(candidate, part.name) for part in fields(candidate) if part.name != "config"))
        return cls(config, candidate, projections, described)


@lru_cache(maxsize=128)  # a session asks at every click
def _is_exact(trial: _Trial) -> bool:
    """Whether constants at the site and biases at the candidate's place give a tiny model the same logits."""
    config, candidate = trial.config, trial.candidate
    plain = build_tiny(shrink(config))
    assert plain is not None
    projections = trial.projections[: int(shrink(config).num_hidden_layers)]
    target = build_tiny(shrink(candidate.config), dict(plain.named_parameters()))
    biases = None if target is None else _bias_names(target, projections, candidate)
    if target is None or biases is None:
        return False
    generator = torch.Generator().manual_seed(1)
    shifts = {}
    for name, bias in zip(projections, biases, strict=True):
        weight = linear_weight(plain.get_submodule(name))
        width, parameter = weight.shape[1], target.get_parameter(bias)
        if candidate.place == "value":
            values = torch.randn(parameter.shape, generator=generator)
            heads = values.unflatten(0, (-1, head_size(config)))
            shifts[name] = heads.repeat_interleave(width // len(values), 0).flatten()
            parameter.add_(values)
        else:
            shifts[name] = torch.randn(width, generator=generator)
            parameter.add_(weight @ shifts[name])
    before, expected, got = tiny_logits(plain), tiny_logits(plain, shifts), tiny_logits(target)
    scale = float(expected.abs().max())
    difference, effect = float((got - expected).abs().max()), float((expected - before).abs().max())
    return difference <= _ROUNDING * scale and effect >= _EFFECT * scale


def _bias_names(model: nn.Module, projections: tuple[str, ...], candidate: _Candidate) -> tuple[str, ...] | None:
    """The biases of a candidate's place by layer, or None if the model lacks any of them."""
    parameters = dict(model.named_parameters())
    names = [_bias_name(model, name, candidate) for name in projections]
    biases = tuple(name for name in names if name is not None and name in parameters)
    return biases if len(biases) == len(names) else None


def _bias_name(model: nn.Module, projection: str, candidate: _Candidate) -> str | None:
    if candidate.place == "output":
        return f"{projection}.bias"
    if candidate.place == "value":
        return f"{projection.rpartition('.')[0]}.v_proj.bias"
    match = re.match(r".*?\.\d+\.", projection)
    if match is None:
        return None
    modules = dict(model.get_submodule(match[0].rstrip(".")).named_modules())
    others = (name for name in _OTHER_OUTPUTS[candidate.site] if name in modules)
    return next((f"{match[0]}{name}.bias" for name in others), None)


def _slots(checkpoint: Checkpoint, candidate: _Candidate, projections: tuple[str, ...]) -> BiasSlots:
    """The biases of the whole model for a candidate that is exact in a tiny one."""
    stored = checkpoint.tensors
    model = skeleton(checkpoint.path, candidate.config)
    biases = _bias_names(model, projections, candidate)
    assert biases is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    entries: dict[str, Any] = {name: getattr(candidate.config, name) for name in candidate.switches}
    if candidate.retyped_as:
        entries = config_entries(candidate.config)
    parts = {name: split_names(name, shapes) for name in stored}
    width = shapes[biases[0]][0]
    site_width = linear_weight(model.get_submodule(projections[0])).shape[1]
    return BiasSlots(
        biases,
        entries,
        {n: s for n, s in shapes.items() if n.endswith(".bias") and n not in stored and n not in biases},
        candidate.place,
        candidate.retyped_as,
        heads_per_bias=site_width // width if candidate.place == "value" else 1,
        splits={name: tuple((n, shapes[n][0]) for n in names) for name, names in parts.items() if len(names) > 1},
        width=width,
        switches=candidate.switches,
        site=candidate.site,
    )
