"""Export a restored model as a plain Hugging Face directory, and verify it against the hooked model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import require_space, write_json, write_text
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.outputs.folders import atomic_directory, reserved
from lcc_lens.core.ranges import ranged
from lcc_lens.core.reading import read_json
from lcc_lens.core.rewriting import Splits, copy_checkpoint, parse_size, rewrite_weights
from lcc_lens.core.showing import Shown
from lcc_lens.core.side_files import side_files, with_older_entries, without_untrusted
from lcc_lens.exporters.engines import EngineName, require_served
from lcc_lens.exporters.eval_results import made_by, write_eval_results
from lcc_lens.exporters.folding import edited_tensors, require_same_weights, shares_values
from lcc_lens.exporters.measured import Measured
from lcc_lens.exporters.model_card import model_card
from lcc_lens.models.architecture.joint_bias_slots import JointSlots, find_joint_slots
from lcc_lens.models.hooked.offloading import device_of, each_parameter, entry_device
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.loading.hooked import LoadedModel, load_hooked, load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.result import Restoration

_PROBE_TEXT = "A tokenizer reads 12 words, and\n  a line; déjà vu."


@dataclass(frozen=True, repr=False)
class ExportReport(Shown):
    """What an export changed, and how the reloaded export compares with the hooked model.

    ``logit_difference`` is the largest difference between the logits of the two, in float32; ``logit_effect`` is the
    largest change that the restoration makes to the pruned model's logits on the same tokens.
    """

    path: Path
    added: tuple[str, ...]
    changed: tuple[str, ...]
    identical_tensors: int
    zeros: int
    logit_difference: float
    logit_effect: float

    def _facts(self) -> dict[str, Any]:
        return {
            "biases added": len(self.added),
            "tensors changed": len(self.changed),
            "tensors bit-identical": self.identical_tensors,
            "zeros in matrices": f"{self.zeros:,}",
            "largest logit difference to the hooked model": f"{self.logit_difference:.2g}",
            "largest effect on the logits": f"{self.logit_effect:.2g}",
        }


@ranged
def export(
    restoration: Restoration,
    pruned: str | Path,
    out: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    comparison: str | Path | None = None,
    for_engine: EngineName | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the restored model as a plain Hugging Face directory and verify it.

    The pruned checkpoint is copied from disk with the folded biases and the changed weights, which keep their zeros;
    every other tensor stays bit-identical. Before the directory appears under its name, the copy is loaded with plain
    transformers and its float32 logits are compared with the hooked model's. Only one of the two models is in memory at
    a time, and with ``LCC_LENS_DEVICE_MAP=disk`` only one of its layers.

    Args:
        restoration: the restoration to fold in.
        pruned: reference of the pruned model that was restored.
        out: the directory to write.
        metrics: measured numbers for the model card.
        run: the run directory: what ``restore`` measured there goes onto the card and into ``.eval_results``.
        comparison: a comparison of the same models (its folder or file): its controls go onto the card.
        for_engine: the engine that will serve it: refused where its loader would drop a bias that holds constants.
        dtype: the format of the weights; the pruned checkpoint's if not given. Another format rounds every tensor.
        max_shard_size: bytes per weight file at most, or a text such as ``5GB``; the same files as the pruned
            checkpoint's if not given.
        overwrite: replace an existing directory.

    Raises:
        RequestError: the restoration belongs to other weights (by hash) or changes no logit, no bias can hold its
            constants, or ``out`` exists.
        LensError: the reloaded model computes something else; nothing is kept.

    Example:
        >>> export(restoration, "out/wanda50", "out/restored")  # doctest: +SKIP
    """
    checkpoint, out = Checkpoint(resolve(pruned)), Path(out)
    if max_shard_size is not None:
        parse_size(max_shard_size)
    side_files(checkpoint.path)
    require_same_weights(restoration, checkpoint)
    paths = [None if path is None else Path(path) for path in (run, comparison)]
    measured = Measured.of(restoration.record, *paths)
    with reserved(out, overwrite=overwrite, inputs=[checkpoint.path]):
        require_space(out, 2 * checkpoint.n_bytes)
        return _write(
            restoration, pruned, checkpoint, out, metrics or {}, measured, for_engine, dtype, max_shard_size,
            overwrite=overwrite,
        )  # fmt: skip


def _write(
    restoration: Restoration,
    pruned: str | Path,
    checkpoint: Checkpoint,
    out: Path,
    metrics: Mapping[str, Any],
    measured: Measured,
    for_engine: EngineName | None,
    dtype: torch.dtype | None,
    max_shard_size: int | str | None,
    *,
    overwrite: bool,
) -> ExportReport:
    """Write the folder and verify it before it appears; one model is in memory at a time."""
    loaded = load_hooked(pruned, dtype=torch.float32)
    slots = _joint_slots(restoration, loaded, checkpoint)
    if for_engine is not None:
        require_served(for_engine, {**checkpoint.config, **slots.config}["architectures"][0], slots)
    expected = _Expected.of(restoration, loaded, checkpoint)
    expected.require_effect()
    with atomic_directory(out, overwrite=overwrite) as part:
        replaced, added = edited_tensors(restoration, checkpoint, slots, loaded)
        copy_checkpoint(checkpoint, part, replaced=replaced, added=added, config=slots.config)
        if slots.retyped_as:
            _retype(part, slots, tokenizer_class=type(loaded.tokenizer).__name__)
        del loaded
        release_memory()  # before the copy is loaded: memory may not hold a large model twice
        difference, zeros = _reload(expected, part)
        if dtype is not None or max_shard_size is not None:
            _rewrite(part, dtype, max_shard_size)
        identical = _count_identical(checkpoint, Checkpoint(part), set(replaced), slots.splits, dtype)
        checkpoint.require_unchanged(restoration.record.pruned_sha256)
        write_text(part / "README.md", model_card(restoration, metrics, difference, measured))
        write_eval_results(part, measured.scores, "restored", made_by(restoration.record))
    edited = tuple(sorted(added)), tuple(sorted(replaced))
    return ExportReport(out, *edited, identical, zeros, difference, expected.effect)


def _joint_slots(restoration: Restoration, loaded: LoadedModel, checkpoint: Checkpoint) -> JointSlots:
    n_heads = int(loaded.model.cfg.n_heads)
    heads_per_group = n_heads // int(getattr(loaded.model.cfg, "n_key_value_heads", None) or n_heads)
    shared = heads_per_group > 1 and shares_values(restoration, n_heads, heads_per_group)
    projections = {site: projection_names(loaded.model, site) for site in restoration.footprint.biases}
    return find_joint_slots(checkpoint, projections, shared_values=shared)


def _retype(part: Path, slots: JointSlots, *, tokenizer_class: str) -> None:
    """Write the other architecture's configuration; name the tokenizer's class, which may follow from the old one."""
    before = read_json(part / "config.json", dict[str, Any])
    older = {name: before[name] for name in ("torch_dtype",) if name in before}  # transformers 4 reads no other name
    write_json(part / "config.json", {**with_older_entries(without_untrusted(slots.config)), **older})
    if slots.splits:
        rewrite_weights(part, splits=slots.splits)
    settings = part / "tokenizer_config.json"
    entries = read_json(settings, dict[str, Any]) if settings.exists() else {}
    write_json(settings, {"tokenizer_class": tokenizer_class, **entries})


def _rewrite(part: Path, dtype: torch.dtype | None, max_shard_size: int | str | None) -> None:
    """Write a verified export in another format or other shards, and check that it loads."""
    rewrite_weights(part, dtype=dtype, max_shard_size=max_shard_size)
    if dtype is not None:
        config = read_json(part / "config.json", dict[str, Any])
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        write_json(part / "config.json", {**config, **dict.fromkeys(names, str(dtype).removeprefix("torch."))})
    load_plain(part)


def _count_identical(
    source: Checkpoint, target: Checkpoint, edited: set[str], splits: Splits, dtype: torch.dtype | None
) -> int:
    """Compare every untouched tensor bit for bit, zeros included; with another ``dtype``, after rounding."""
    untouched = [name for name in source.tensors if name not in edited]
    for name in untouched:
        before = source.read(name)
        before = before.to(dtype) if dtype is not None and before.is_floating_point() else before
        parts = [target.read(part) for part, _ in splits.get(name, ((name, 0),))]
        after = torch.cat(parts) if len(parts) > 1 else parts[0]  # a scalar cannot be concatenated
        if before.dtype != after.dtype or not torch.equal(_bits(before), _bits(after)):
            raise LensError(f"expected {name} bit-identical after export, got a change; nothing was kept")
    return len(untouched)


@dataclass(frozen=True)
class _Expected:
    """What the export must compute: the restored hooked model's logits of a few tokens, in float32."""

    reference: str
    tokens: Tensor
    unrestored: Tensor
    restored: Tensor
    text_ids: list[int]
    """How the tokenizer reads the probe text."""
    tolerance: float
    """Relative to the norm of all logits, as a model may enlarge the rounding of single tokens many times."""

    @classmethod
    def of(cls, restoration: Restoration, loaded: LoadedModel, checkpoint: Checkpoint) -> _Expected:
        model: Any = loaded.model
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(int(model.cfg.d_vocab), (2, min(32, loaded.context)), generator=generator).to(
            device_of(model)
        )
        with torch.inference_mode():
            unrestored = model(tokens)
            with restoration.applied_to(model) as restored_model:
                restored = cast("Any", restored_model)(tokens)
        projection = checkpoint.stored_name(f"{loaded.output_projections[0]}.weight")
        tolerance = 1e-5 if checkpoint.tensors[projection].dtype in ("F32", "F64") else 2e-2
        text_ids = cast("list[int]", loaded.tokenizer(_PROBE_TEXT)["input_ids"])
        return cls(loaded.identity.reference, tokens, unrestored, restored, text_ids, tolerance)

    @property
    def effect(self) -> float:
        """The largest change of a logit that the restoration makes."""
        return float((self.restored - self.unrestored).abs().max())

    def require_effect(self) -> None:
        """Refuse a restoration that changes nothing: its export would be the pruned model once more.

        Raises:
            RequestError: says what to do.
        """
        if self.effect == 0:
            raise RequestError(
                "expected a restoration that changes the pruned model's logits, got one without effect; train it "
                "first (in a session: session.train()), or set a scale other than 0"
            )


def _reload(expected: _Expected, exported: Path) -> tuple[float, int]:
    """Load the export with plain transformers; gives its largest difference to the hooked model, and its zeros."""
    plain = load_plain(exported, dtype=torch.float32, attention="eager")
    if load_tokenizer(exported)(_PROBE_TEXT)["input_ids"] != expected.text_ids:
        raise LensError(f"expected the tokenizer of {expected.reference} kept, got another; nothing was kept")
    with torch.inference_mode():
        reloaded = plain(expected.tokens.to(entry_device(plain))).logits
    difference = reloaded - expected.restored.to(reloaded)
    distance = float(difference.norm() / expected.restored.norm().clamp_min(1e-30))
    if not distance <= expected.tolerance:
        raise LensError(
            f"expected the reloaded export of {expected.reference} to compute the hooked model's logits within "
            f"{expected.tolerance:.2g} of their norm, got {distance:.2g}; nothing was kept"
        )
    zeros = sum(int((parameter == 0).sum()) for _, parameter in each_parameter(plain) if parameter.ndim > 1)
    return float(difference.abs().max()), zeros


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
