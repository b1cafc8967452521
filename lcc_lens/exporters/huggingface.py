"""Exports: a restoration folded into the tensors of a plain Hugging Face directory, verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lcc_lens.core.checkpoint import Splits, parse_size, rewrite_weights
from lcc_lens.core.errors import LensError
from lcc_lens.core.files import (
    atomic_directory,
    copy_checkpoint,
    read_json,
    read_tensor,
    require_space,
    stored_name,
    tensor_names,
    weight_files,
    write_json,
    write_text,
)
from lcc_lens.core.memory import release_memory
from lcc_lens.exporters.folding import edited_tensors, fold, require_same_weights, shares_values
from lcc_lens.exporters.model_card import model_card
from lcc_lens.models.architecture.bias_slots import BiasSlots, find_slots
from lcc_lens.models.architecture.joint_bias_slots import JointSlots, find_joint_slots
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of, each_parameter, entry_device
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.loading.hooked import LoadedModel, ModelIdentity, identify, load_hooked, load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.result import Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BiasSlots", "ExportReport", "export", "find_slots", "fold", "model_card"]


_PROBE_TEXT = "A tokenizer reads 12 words, and\n  a line; déjà vu."


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


def export(
    restoration: Restoration,
    pruned: str | Path,
    out: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the restored model as a plain Hugging Face directory and verify it.

    The pruned checkpoint is copied from disk with the folded biases and the changed weights, whose zeros stay; every
    other tensor stays bit-identical. The copy is loaded with plain transformers and its float32 logits are compared
    with the hooked model's before the directory appears under its name. One of the two is in memory at a time, and with
    ``LCC_LENS_DEVICE_MAP=disk`` one layer of it.

    Args:
        restoration: what to fold in.
        pruned: reference of the pruned model that the restoration was trained on.
        out: the directory to write.
        metrics: measured numbers for the model card.
        dtype: the format of the weights; the pruned checkpoint's if not given. Another one rounds every tensor.
        max_shard_size: bytes per weight file at most, or a text such as ``5GB``; the pruned checkpoint's files if not
            given.
        overwrite: replace an existing directory.

    Raises:
        RequestError: other weights than the restoration's (by hash), no bias slot, or ``out`` exists.
        LensError: the reloaded model differs; nothing is kept.

    Example:
        >>> export(restoration, "out/wanda50", "out/restored")  # doctest: +SKIP
    """
    path, out = resolve(pruned), Path(out)
    if max_shard_size is not None:
        parse_size(max_shard_size)
    identity = identify(pruned, path)
    require_same_weights(restoration, identity)
    loaded = load_hooked(pruned, dtype=torch.float32)
    slots = _slots(restoration, loaded, path)
    require_space(out, 2 * sum(file.stat().st_size for file in weight_files(path)))
    with atomic_directory(out, overwrite=overwrite) as part:
        replaced, added = edited_tensors(restoration, path, slots, loaded)
        copy_checkpoint(path, part, replaced=replaced, added=added, config=slots.config)
        if slots.retyped_as:
            _retype(part, slots, loaded)
        hooked = _HookedLogits.of(restoration, loaded.model)
        source = _Source(loaded.identity, loaded.tokenizer, loaded.output_projections[0])
        del loaded
        release_memory()  # before the copy is loaded: a large model may be there once only
        difference, zeros = _reload(hooked, source, part)
        if dtype is not None or max_shard_size is not None:
            _rewrite(part, dtype, max_shard_size)
        identical = _count_identical(path, part, set(replaced), slots.splits, dtype)
        write_text(part / "README.md", model_card(restoration, metrics or {}, difference))
    return ExportReport(out, tuple(sorted(added)), tuple(sorted(replaced)), identical, zeros, difference, hooked.effect)


@dataclass(frozen=True)
class _Source:
    """What of the pruned model is asked for once it is no longer in memory."""

    identity: ModelIdentity
    tokenizer: PreTrainedTokenizerBase
    projection: str


def _slots(restoration: Restoration, loaded: LoadedModel, path: Path) -> JointSlots:
    cfg = loaded.model.cfg
    share = int(cfg.n_heads) // int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
    shared = share > 1 and shares_values(restoration, int(cfg.n_heads), share)
    maps = {site: projection_names(loaded.model, site) for site in restoration.footprint.biases}
    return find_joint_slots(path, maps, shared_values=shared)


def _retype(part: Path, slots: JointSlots, loaded: LoadedModel) -> None:
    """Write the other architecture's configuration, and name the tokenizer's class, which may follow from it."""
    write_json(part / "config.json", slots.config)
    if slots.splits:
        rewrite_weights(part, splits=slots.splits)
    settings = part / "tokenizer_config.json"
    kept = read_json(settings) if settings.exists() else {}
    write_json(settings, {"tokenizer_class": type(loaded.tokenizer).__name__, **kept})


def _rewrite(part: Path, dtype: torch.dtype | None, max_shard_size: int | str | None) -> None:
    """Write a verified export in another format or other files, and see that it loads."""
    rewrite_weights(part, dtype=dtype, max_shard_size=max_shard_size)
    if dtype is not None:
        config = read_json(part / "config.json")
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        write_json(part / "config.json", {**config, **dict.fromkeys(names, str(dtype).removeprefix("torch."))})
    load_plain(part)


def _count_identical(
    source: Path, target: Path, edited: set[str], splits: Splits, dtype: torch.dtype | None = None
) -> int:
    """Compare every untouched tensor bit for bit (which includes the zero pattern), rounded if a format was asked for.

    Raises:
        LensError: one differs.
    """
    before, after = tensor_names(source), tensor_names(target)
    untouched = [name for name in before if name not in edited]
    for name in untouched:
        first = read_tensor(before, name)
        first = first.to(dtype) if dtype is not None and first.is_floating_point() else first
        parts = [read_tensor(after, part) for part, _ in splits.get(name, ((name, 0),))]
        second = torch.cat(parts) if len(parts) > 1 else parts[0]  # a number by itself cannot be joined
        if first.dtype != second.dtype or not torch.equal(_bits(first), _bits(second)):
            raise LensError(f"expected {name} bit-identical after export, got a change; nothing was kept")
    return len(untouched)


@dataclass(frozen=True)
class _HookedLogits:
    """What the hooked model computes on a few tokens, bare and restored, in float32."""

    tokens: Tensor
    bare: Tensor
    restored: Tensor

    @classmethod
    def of(cls, restoration: Restoration, model: HookedModel) -> _HookedLogits:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(int(model.cfg.d_vocab), (2, 32), generator=generator).to(device_of(model))
        with torch.inference_mode():
            bare = cast("Any", model)(tokens)
            with restoration.applied_to(model) as restored:
                return cls(tokens, bare, cast("Any", restored)(tokens))

    @property
    def effect(self) -> float:
        """The largest change that the restoration makes."""
        return float((self.restored - self.bare).abs().max())


def _reload(hooked: _HookedLogits, before: _Source, exported: Path) -> tuple[float, int]:
    """Reload with plain transformers; gives the largest difference to the hooked model, and the zeros.

    Raises:
        LensError: the reloaded model does not compute what the hooked one does.
    """
    plain = load_plain(exported, dtype=torch.float32, attention="eager")
    if load_tokenizer(exported)(_PROBE_TEXT)["input_ids"] != before.tokenizer(_PROBE_TEXT)["input_ids"]:
        raise LensError(f"expected the tokenizer of {before.identity.reference} kept, got another; nothing was kept")
    with torch.inference_mode():
        reloaded = plain(hooked.tokens.to(entry_device(plain))).logits
    difference = float((reloaded - hooked.restored.to(reloaded)).abs().max())
    tolerance = _tolerance(exported, before.projection) * max(1.0, float(hooked.restored.abs().max()))
    if not difference <= tolerance:
        raise LensError(
            f"expected the reloaded export of {before.identity.reference} within {tolerance:.2g} of the hooked model's "
            f"logits, got {difference:.2g}; nothing was kept"
        )
    zeros = sum(int((parameter == 0).sum()) for _, parameter in each_parameter(plain) if parameter.ndim > 1)
    return difference, zeros


def _tolerance(path: Path, projection: str) -> float:
    """Relative tolerance of the logits: rounding of what is stored is all that may differ."""
    stored = tensor_names(path)
    dtype = read_tensor(stored, stored_name(stored, f"{projection}.weight")).dtype
    return 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
