"""Exports: a restoration folded into the tensors of a plain Hugging Face directory, verified."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.errors import LensError, RequestError
from lcc_lens.files import (
    atomic_directory,
    copy_checkpoint,
    read_json,
    read_tensor,
    require_space,
    tensor_names,
    weight_files,
    write_text,
)
from lcc_lens.injections.changes import merged
from lcc_lens.injections.constants import SiteConstants
from lcc_lens.models import LoadedModel, ModelIdentity, identify, load_hooked, load_plain, load_tokenizer, resolve
from lcc_lens.reading_maps import ConstantSite, reading_maps
from lcc_lens.restoration import Restoration

logger = logging.getLogger(__name__)

#: By site, the setting under which the maps that read it have a bias, and what those maps are called.
_BIAS_SWITCHES: dict[ConstantSite, str] = {"z": "attention_bias", "mlp": "mlp_bias"}
_MAP_WORDS: dict[ConstantSite, str] = {"z": "attention output projection", "mlp": "MLP's down projection"}


@dataclass(frozen=True)
class ExportReport:
    """What an export changed and how its reload compared.

    ``logit_difference`` is the largest difference between the reloaded export and the hooked model, in float32;
    ``logit_effect`` the largest change that the restoration makes to the pruned model's logits on the same tokens.
    """

    path: Path
    added: tuple[str, ...]
    changed: tuple[str, ...]
    identical_tensors: int
    zeros: int
    logit_difference: float
    logit_effect: float


@dataclass(frozen=True)
class BiasSlots:
    """Where a checkpoint can hold a constant per layer: bias names, the configuration that makes them load, and the
    other biases that this configuration brings (written as zeros)."""

    biases: tuple[str, ...]
    config: Mapping[str, Any]
    zero_biases: Mapping[str, tuple[int, ...]]


def find_slots(path: Path, projections: tuple[str, ...], site: ConstantSite = "z") -> BiasSlots:
    """Find the biases of the maps that read a site in a checkpoint, or the switch that adds them.

    The architecture itself is asked: its empty model is built with ``attention_bias`` (``mlp_bias``) on and compared
    with the stored tensors, so that no list of families can be out of date.

    Args:
        path: the checkpoint.
        projections: plain names of the output projections by layer; for the site ``mlp``, of the down projections.
        site: where the constants are.

    Raises:
        RequestError: the architecture has no such bias (mistral, qwen2, phi3 and others drop one silently).
    """
    stored, switch = tensor_names(path), _BIAS_SWITCHES[site]
    biases = tuple(f"{projection}.bias" for projection in projections)
    if all(bias in stored for bias in biases):
        return BiasSlots(biases, {}, {})
    config = read_json(path / "config.json")
    shapes = _parameter_shapes(path, {switch: True}) if switch in _config_attributes(path) else {}
    if not all(bias in shapes for bias in biases):
        raise RequestError(
            f"wanted an architecture with a bias on the {_MAP_WORDS[site]}, got {config.get('model_type')}, "
            "which has none; restore it for hooks alone (exportable=False, --hooks-only) and use Restoration.applied_to"
        )
    plain = _parameter_shapes(path, {})
    zero_biases = {n: s for n, s in shapes.items() if n not in plain and n not in stored and n not in biases}
    return BiasSlots(biases, {switch: True}, zero_biases)


def fold(
    constants: Float[Tensor, "chosen d_head"],
    heads: tuple[Any, ...],
    weights: Mapping[int, Float[Tensor, "d_model zwidth"]],
) -> dict[int, Float[Tensor, " d_model"]]:
    r"""The bias that replaces constants at ``hook_z``: $b_O \mathrel{+}= \sum_h W_O^{(h)} c_h$ per layer, in float64.

    Constants at an MLP, as head 0 of its layer, become the down projection's bias the same way.

    Args:
        constants: the learned components.
        heads: their heads.
        weights: by layer the output projection as ``nn.Linear`` stores it; head h owns columns h*d_head on.
    """
    d_head = constants.shape[-1]
    biases = {layer: torch.zeros(weight.shape[0], dtype=torch.float64) for layer, weight in weights.items()}
    for (layer, head), constant in zip(heads, constants.double(), strict=True):
        columns = weights[layer][:, head * d_head : (head + 1) * d_head]
        biases[layer] += columns.double() @ constant
    return biases


def export(
    restoration: Restoration,
    pruned: str | Path,
    out: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the restored model as a plain Hugging Face directory and verify it.

    The pruned checkpoint is copied from disk with the folded biases and the changed weights, whose zeros stay; every
    other tensor stays bit-identical. The copy is loaded with plain transformers and its float32 logits are compared
    with the hooked model's before the directory appears under its name.

    Args:
        restoration: what to fold in.
        pruned: reference of the pruned model that the restoration was trained on.
        out: the directory to write.
        metrics: measured numbers for the model card.
        overwrite: replace an existing directory.

    Raises:
        RequestError: other weights than the restoration's (by hash), no bias slot, or ``out`` exists.
        LensError: the reloaded model differs; nothing is kept.

    Example:
        >>> export(restoration, "out/wanda50", "out/restored")  # doctest: +SKIP
    """
    path, out = resolve(pruned), Path(out)
    identity = identify(pruned, path)
    if identity.sha256 != restoration.record.pruned_sha256:
        raise RequestError(
            f"wanted the pruned model with SHA-256 {restoration.record.pruned_sha256[:12]}…, got "
            f"{identity.sha256[:12]}… in {path}; name the model that was restored"
        )
    loaded = load_hooked(pruned, dtype=torch.float32)
    slots = {site: find_slots(path, _projections(loaded, site), site) for site in restoration.footprint.biases}
    require_space(out, 2 * sum(file.stat().st_size for file in weight_files(path)))
    with atomic_directory(out, overwrite=overwrite) as part:
        replaced, added = _edited_tensors(restoration, path, slots, loaded)
        config = {name: value for one in slots.values() for name, value in one.config.items()}
        copy_checkpoint(path, part, replaced=replaced, added=added, config=config)
        identical = _count_identical(path, part, set(replaced))
        difference, effect, zeros = _compare_logits(restoration, loaded, part, identity)
        write_text(part / "README.md", model_card(restoration, metrics or {}, difference))
    return ExportReport(out, tuple(sorted(added)), tuple(sorted(replaced)), identical, zeros, difference, effect)


def model_card(restoration: Restoration, metrics: Mapping[str, Any], difference: float) -> str:
    """The model card of an export, with the numbers that were measured."""
    record = restoration.record
    lines = [
        "---", "library_name: transformers", "tags: [pruned, restorelcc, lcc-lens]", "---", "",
        f"# {Path(record.pruned).name}, restored", "",
        f"`{record.pruned}` (pruned from `{record.dense}`) with {_what_is_folded(restoration)}. Loads with plain "
        "transformers; every other tensor is bit-identical to the pruned model, and its zeros stay.", "",
        "| | |", "|---|---|",
        f"| method | {record.method} |",
        *([f"| heads | {len(restoration.heads)} |"] if restoration.heads else []),
        *([f"| MLPs | {len(restoration.mlp.parts)} |"] if restoration.mlp is not None else []),
        *([f"| weights changed | {len(dict(restoration.changes))} |"] if restoration.changes else []),
        *([f"| numbers trained | {record.n_trained} |"] if record.n_trained is not None else []),
        f"| learned from | {record.data}, {record.n_examples} examples, seed {record.seed} |",
        f"| largest logit difference to the hooked model | {difference:.2g} |",
        f"| pruned weights (SHA-256) | `{record.pruned_sha256}` |",
        f"| lcc_lens | {record.version} |",
    ]  # fmt: skip
    if record.losses:
        lines += ["", "Loss on held-out responses while training, nats per token:", "", "| model | loss |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in record.losses.items()]
    for name, values in metrics.items():
        lines += ["", f"## {name}", "", "| | " + " | ".join(values) + " |", "|---|" + "---|" * len(values)]
        lines.append("| | " + " | ".join(str(value) for value in values.values()) + " |")
    return "\n".join(lines) + "\n"


def _edited_tensors(
    restoration: Restoration, path: Path, slots: Mapping[ConstantSite, BiasSlots], loaded: LoadedModel
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The tensors to replace (weights, biases that are there) and to add (biases that the configuration brings)."""
    stored = tensor_names(path)
    changed = _ChangedWeights(restoration, stored, is_transposed=loaded.is_transposed)
    replaced: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for found in restoration.constant_sites:
        maps = _projections(loaded, found.site)
        weights = {  # constants pass through the changed projections
            layer: _linear_weight(stored, maps[layer], loaded.is_transposed, changed)
            for layer in sorted({part.layer for part in found.parts})
        }
        biases = _biases(found, slots[found.site], weights, stored)
        (added if slots[found.site].config else replaced).update(biases)
    return ChainMap(replaced, cast("dict[str, Tensor]", changed)), added


def _biases(
    found: SiteConstants, slots: BiasSlots, weights: Mapping[int, Tensor], stored: Mapping[str, Path]
) -> dict[str, Tensor]:
    """The biases that hold a site's constants: those that are there with more, or new ones for every layer."""
    folded = fold(found.values, found.parts, weights)
    if not slots.config:
        old = {layer: read_tensor(stored, slots.biases[layer]) for layer in folded}
        return {slots.biases[layer]: (old[layer].double() + folded[layer]).to(old[layer].dtype) for layer in folded}
    dtype = next(iter(weights.values())).dtype
    biases = {name: torch.zeros(shape, dtype=dtype) for name, shape in slots.zero_biases.items()}
    none = torch.zeros_like(next(iter(folded.values())))
    return biases | {bias: folded.get(layer, none).to(dtype) for layer, bias in enumerate(slots.biases)}


def _projections(loaded: LoadedModel, site: ConstantSite) -> tuple[str, ...]:
    return loaded.output_projections if site == "z" else reading_maps(loaded.model, site)


class _ChangedWeights(Mapping[str, Tensor]):
    """The changed weights in the checkpoint's layout and format, each computed when asked for: one at a time in memory.

    Raises, when asked:
        LensError: a zero of a matrix was lost, or a weight is not finite.
    """

    def __init__(self, restoration: Restoration, stored: Mapping[str, Path], *, is_transposed: bool) -> None:
        changes = merged({name: one} for name, one in restoration.changes)
        self._changes = {f"{module}.weight": change for module, change in changes.items()}
        self._stored, self._is_transposed = stored, is_transposed

    def __getitem__(self, name: str) -> Tensor:
        change, old = self._changes[name], read_tensor(self._stored, name)
        is_turned = self._is_transposed and old.ndim > 1
        with torch.no_grad():
            new = change(old.float().T).T if is_turned else change(old.float())
        new = new.to(old.dtype).contiguous()
        if not bool(torch.isfinite(new).all()):
            raise LensError(f"wanted finite weights, got NaN or infinity in {name}; lower the learning rate")
        if old.ndim == 1:
            return new
        if bool(new[old == 0].any()):
            raise LensError(f"wanted the zeros of {name} kept, got others; nothing was kept")
        return torch.where(old == 0, old, new)  # minus zero stays what it was, too

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def _what_is_folded(restoration: Restoration) -> str:
    what = {"z": "head folded into the biases of the attention output projections",
            "mlp": "MLP folded into the biases of the down projections"}  # fmt: skip
    parts = [f"a constant per {what[site]}" for site in restoration.footprint.biases]
    if restoration.changes:
        kinds = sorted({change.kind for _, change in restoration.changes})
        parts.append(f"weights changed under their zero pattern ({', '.join(kinds)})")
    return " and ".join(parts) or "nothing changed"


def _linear_weight(
    stored: Mapping[str, Path], projection: str, is_transposed: bool, changed: Mapping[str, Tensor]
) -> Tensor:
    """The output projection's weight as ``[d_model, n_heads * d_head]``."""
    name = f"{projection}.weight"
    weight = changed[name] if name in changed else read_tensor(stored, name)
    return weight.T if is_transposed else weight


def _config_attributes(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    return cast("dict[str, Any]", config.to_dict())


def _parameter_shapes(path: Path, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that the architecture has under a changed configuration; no memory is used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _count_identical(source: Path, target: Path, edited: set[str]) -> int:
    """Compare every untouched tensor bit for bit (which includes the zero pattern).

    Raises:
        LensError: one differs.
    """
    before, after = tensor_names(source), tensor_names(target)
    untouched = [name for name in before if name not in edited]
    for name in untouched:
        first, second = read_tensor(before, name), read_tensor(after, name)
        if first.dtype != second.dtype or not torch.equal(_bits(first), _bits(second)):
            raise LensError(f"wanted {name} bit-identical after export, got a change; nothing was kept")
    return len(untouched)


def _compare_logits(
    restoration: Restoration, loaded: LoadedModel, exported: Path, identity: ModelIdentity
) -> tuple[float, float, int]:
    """Reload with plain transformers; gives the largest difference to the hooked model, the effect, and the zeros.

    Raises:
        LensError: the reloaded model does not compute what the hooked one does.
    """
    plain = load_plain(exported, dtype=torch.float32, attention="eager")
    load_tokenizer(exported)
    vocabulary = int(plain.config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0)).to(plain.device)
    with torch.inference_mode():
        before = cast("Any", loaded.model)(tokens)
        with restoration.applied_to(loaded.model) as restored:
            hooked = cast("Any", restored)(tokens)
        reloaded = plain(tokens).logits
    difference, effect = float((reloaded - hooked).abs().max()), float((hooked - before).abs().max())
    tolerance = _tolerance(exported, loaded.output_projections[0]) * max(1.0, float(hooked.abs().max()))
    if not difference <= tolerance:
        raise LensError(
            f"wanted the reloaded export of {identity.reference} within {tolerance:.2g} of the hooked model's logits, "
            f"got {difference:.2g}; nothing was kept"
        )
    zeros = sum(int((parameter == 0).sum()) for parameter in plain.parameters() if parameter.ndim > 1)
    return difference, effect, zeros


def _tolerance(path: Path, projection: str) -> float:
    """Relative tolerance of the logits: rounding of what is stored is all that may differ."""
    dtype = read_tensor(tensor_names(path), f"{projection}.weight").dtype
    return 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
