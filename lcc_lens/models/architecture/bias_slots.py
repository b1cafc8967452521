"""Where a checkpoint can hold a site's constants: biases stored, brought by a setting, or as good."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.rewriting import Splits
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import is_transposed, read_config, skeleton
from lcc_lens.models.architecture.retyping import config_entries, retyped_configs, split_names
from lcc_lens.models.architecture.tiny_models import build_twin, shrink, twin_logits
from lcc_lens.models.hooked.sites import ConstantSite

#: Which bias takes the constants: that of the map which reads the site, the value projection's (whose bias passes
#: through attention unchanged, since the weights of a query sum to one), or that of the other block's output where both
#: add to the same residual.
Place = Literal["output", "value", "parallel"]
#: By site, the outputs of the other block; and what a refusal calls a constant there.
_OTHER_OUTPUTS: Mapping[ConstantSite, tuple[str, ...]] = {"z": MLP_OUTPUTS, "mlp": ATTENTION_OUTPUTS}
_PARTS: Mapping[ConstantSite, str] = {"z": "head", "mlp": "MLP"}
#: By site, settings of another architecture that may bring its bias.
_SWITCHES: Mapping[ConstantSite, tuple[tuple[str, ...], ...]] = {
    "z": (("attention_bias",),),
    "mlp": (("mlp_bias",), ("attention_bias", "mlp_bias")),  # the second where attention has biases already
}
#: Relative to the largest logit of a twin: what may differ by rounding, and what must differ at least to mean anything.
_ROUNDING, _EFFECT = 1e-4, 1e-2
#: How an architecture may refuse sizes that nobody publishes.
_NOT_BUILT = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class BiasSlots:
    """Where a checkpoint can hold a site's constants: a bias per layer, and what makes it load.

    ``config`` are entries of ``config.json`` to set (all of them where ``retyped_as`` names another architecture), of
    which ``switches`` bring the biases; ``zero_biases`` come along with them and are written as zeros.
    ``heads_per_bias`` heads share a bias at the ``value`` place and so need the same constant.
    """

    biases: tuple[str, ...]
    config: Mapping[str, Any]
    zero_biases: Mapping[str, tuple[int, ...]]
    place: Place = "output"
    retyped_as: str | None = None
    heads_per_bias: int = 1
    splits: Splits = field(default_factory=dict)
    """Stored tensors that are several under the other architecture, with their rows."""
    width: int | None = None
    """Numbers per bias (None where nobody asked: all are stored)."""
    switches: tuple[str, ...] = ()
    site: ConstantSite = "z"

    @property
    def way(self) -> str:
        """The way in words, for tables."""
        parallel = {"z": "bias of the parallel MLP", "mlp": "bias of the parallel attention"}[self.site]
        where = {"output": "output bias", "value": "value bias", "parallel": parallel}[self.place]
        if self.retyped_as:
            return f"{where}, re-typed as {self.retyped_as}"
        return f"{where}, by {' and '.join(self.config)}" if self.config else where


@dataclass(frozen=True)
class _Candidate:
    """A configuration under which a place may have a bias in every layer."""

    config: Any
    site: ConstantSite
    place: Place
    switches: tuple[str, ...] = ()
    retyped_as: str | None = None


def find_slots(
    checkpoint: Checkpoint, maps: tuple[str, ...], site: ConstantSite = "z", *, shared_values: bool = False
) -> BiasSlots:
    """Find biases that hold a site's constants exactly, in a checkpoint or by a setting of its architecture.

    In this order: the bias of the map that reads the site where one is stored or a setting adds one; of head outputs,
    the value projection's where every head has its own; the other block's output bias where both blocks add to the
    residual stream in parallel; the map's own under the name of an architecture that computes the same. Every way but
    a stored bias of the map is tried on a small random model of the architecture, so that no list of families can be
    out of date.

    Args:
        checkpoint: the model on disk.
        maps: what reads the site, by layer, as the checkpoint names it: output projections, or down projections.
        site: where the constants are.
        shared_values: whether the heads that share a value head have the same constant.

    Raises:
        RequestError: there is no exact way.
    """
    biases = tuple(checkpoint.stored_name(f"{name}.bias") for name in maps)
    if all(bias in checkpoint.tensors for bias in biases):
        return BiasSlots(biases, {}, {}, site=site)
    config = read_config(checkpoint.path)
    for candidate in _candidates(config, site):
        if _serves(checkpoint.path, config, candidate, maps):
            slots = _slots(checkpoint, candidate, maps)
            if slots.heads_per_bias == 1 or shared_values:
                return slots
    raise RequestError(
        f"expected an architecture that can hold a constant per {_PARTS[site]} in a bias, got "
        f"{config.model_type}, which "
        "has none that is exact; restore it for hooks alone (exportable=False, --hooks-only) and serve it by "
        "lcc_lens.load_restored"
    )


def _candidates(config: Any, site: ConstantSite) -> Iterator[_Candidate]:
    if config.get_text_config() is not config:  # its settings lie deeper, where nothing is switched here
        return
    names = [name for name, value in vars(config).items() if "bias" in name and isinstance(value, bool)]
    own: list[tuple[Any, tuple[str, ...]]] = [(config, ()), *((_switched(config, name), (name,)) for name in names)]
    places: tuple[Place, ...] = ("output", "value", "parallel") if site == "z" else ("output", "parallel")
    for place in places:
        for changed, switches in own[1:] if place == "output" else own:  # the output as it is was looked for already
            yield _Candidate(changed, site, place, switches)
    for switches in _SWITCHES[site]:
        for retyped in retyped_configs(config, switches):
            yield _Candidate(retyped, site, "output", switches, retyped_as=retyped.model_type)


def _switched(config: Any, switch: str) -> Any:
    changed = copy.deepcopy(config)
    setattr(changed, switch, not getattr(config, switch))
    return changed


def _serves(path: Path, config: Any, candidate: _Candidate, maps: tuple[str, ...]) -> bool:
    """Whether a candidate is exact.

    Where the architecture cannot be built in small, a setting that adds the output's own bias is believed; the export
    compares logits whatever was believed.
    """
    try:
        return _is_exact(config, candidate, maps)
    except _NOT_BUILT:
        if not candidate.switches or candidate.retyped_as or candidate.place != "output":
            return False
        return _bias_names(skeleton(path, candidate.config), maps, candidate) is not None


def _is_exact(config: Any, candidate: _Candidate, maps: tuple[str, ...]) -> bool:
    """Whether constants at the site and biases at the candidate's place give the same logits in a twin."""
    plain = build_twin(shrink(config))
    assert plain is not None
    maps = maps[: int(shrink(config).num_hidden_layers)]
    target = build_twin(shrink(candidate.config), dict(plain.named_parameters()))
    places = None if target is None else _bias_names(target, maps, candidate)
    if target is None or places is None:
        return False
    generator = torch.Generator().manual_seed(1)
    shifts = {}
    for name, bias in zip(maps, places, strict=True):
        weight = _linear_weight(plain.get_submodule(name))
        own, parameter = len(weight.T), target.get_parameter(bias)
        if candidate.place == "value":
            values = torch.randn(parameter.shape, generator=generator)
            share = own // len(values)
            shifts[name] = values.unflatten(0, (-1, _head_size(config))).repeat_interleave(share, 0).flatten()
            parameter.add_(values)
        else:
            shifts[name] = torch.randn(own, generator=generator)
            parameter.add_(weight @ shifts[name])
    before, wanted, got = twin_logits(plain), twin_logits(plain, shifts), twin_logits(target)
    scale = float(wanted.abs().max())
    difference, effect = float((got - wanted).abs().max()), float((wanted - before).abs().max())
    return difference <= _ROUNDING * scale and effect >= _EFFECT * scale


def _bias_names(model: nn.Module, maps: tuple[str, ...], candidate: _Candidate) -> tuple[str, ...] | None:
    """The biases of a candidate's place by layer, or None where the model has not all of them."""
    names = [_bias_name(model, name, candidate) for name in maps]
    parameters = dict(model.named_parameters())
    found = tuple(name for name in names if name is not None and name in parameters)
    return found if len(found) == len(names) else None


def _bias_name(model: nn.Module, reader: str, candidate: _Candidate) -> str | None:
    if candidate.place == "output":
        return f"{reader}.bias"
    if candidate.place == "value":
        return f"{reader.rpartition('.')[0]}.v_proj.bias"
    match = re.match(r".*?\.\d+\.", reader)
    if match is None:
        return None
    modules = dict(model.get_submodule(match[0].rstrip(".")).named_modules())
    others = (name for name in _OTHER_OUTPUTS[candidate.site] if name in modules)
    return next((f"{match[0]}{name}.bias" for name in others), None)


def _slots(checkpoint: Checkpoint, candidate: _Candidate, maps: tuple[str, ...]) -> BiasSlots:
    """The slots of the whole model for a candidate that was found exact in small."""
    stored = checkpoint.tensors
    model = skeleton(checkpoint.path, candidate.config)
    biases = _bias_names(model, maps, candidate)
    assert biases is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    entries: dict[str, Any] = {name: getattr(candidate.config, name) for name in candidate.switches}
    if candidate.retyped_as:
        entries = config_entries(candidate.config)
    parts = {name: split_names(name, shapes) for name in stored}
    width = shapes[biases[0]][0]
    site_width = len(_linear_weight(model.get_submodule(maps[0])).T)
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


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _linear_weight(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight
