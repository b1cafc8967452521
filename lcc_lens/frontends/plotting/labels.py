"""Names of selectors and comparison entries in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lcc_lens.evaluation.baselines.methods import BASELINES
from lcc_lens.evaluation.comparison.entry import TUNED, Entry

SELECTOR_LABELS = {
    "patching": "activation patching",
    "attribution": "attribution patching",
    "gradient": "gradient",
    "mse": "squared difference",
    "kl": "KL of votes",
    "probe": "linear probe",
    "interaction": "interaction probe",
    "random": "random",
}
#: The selector that the others are compared with.
GOLD = "patching"
Kind = Literal["restored", "baseline", "control"]
#: Methods that test one part of another method.
_CONTROLS = ("random-basis", "offset", "mean-shift", "mean-shift-sequential", "mean-shift-sequential-mlp")
_PARTS = {
    "lcc": "LCC",
    "random-basis": "LCC, random basis",
    "offset": "offset alone",
    "mean-shift": "mean shift, untrained",
    "mean-shift-sequential": "mean shift, layer by layer",
    "mean-shift-sequential-mlp": "mean shift, layer by layer, MLPs too",
    "mlp-lcc": "LCC at MLPs",
    "mlp-offset": "offset at MLPs",
    "mlp-mean-shift": "mean shift at MLPs",
    "mlp-gain": "MLP gains",
    "gain": "head gains",
    "norms": "norm gains",
    "low-rank": "masked low rank",
    "masked": "surviving weights",
    "all-weights": "surviving weights and norms",
    "lofit": "LoFiT",
    "eora": "EoRA, untrained",
    "flap": "FLAP's biases, untrained",
    "perp": "PERP (biases, norms)",
    "perp-lora": "PERP (masked LoRA)",
    "lora": "LoRA",
    "dora": "DoRA",
    "lora-all": "LoRA (all linear layers)",
    "lora-vo": "LoRA (v, o)",
    "dora-vo": "DoRA (v, o)",
}
#: Presets, and what they train.
_PRESETS = {"best": "surviving weights and norms", "best-low-rank": "masked low rank"}
_WHERE = {"dense": "on the dense model", "shuffled": "shuffled responses", "random-heads": "random heads"}


def pair_label(dense: str, pruned: str, sparsity: float | None = None, pattern: str = "") -> str:
    """A pair in a caption: both models, and the pruned one's zeros where they are known.

    Example:
        >>> pair_label("smollm2", "out/wanda50", 0.5, "unstructured")
        'smollm2, pruned: wanda50 (50 % zeros, unstructured)'
    """
    zeros = "" if sparsity is None else f" ({100 * sparsity:.0f} % zeros, {pattern})"
    return f"{Path(dense).name}, pruned: {Path(pruned).name}{zeros}"


def entry_kind(text: str) -> Kind:
    """Whether an entry of a comparison is a restoration, a baseline, or a control.

    Example:
        >>> entry_kind("lora"), entry_kind("lora@dense"), entry_kind("refit+low-rank")
        ('baseline', 'control', 'restored')
    """
    entry = Entry.parse(text)
    if entry.control is not None or entry.method in _CONTROLS:
        return "control"
    return "baseline" if entry.method in BASELINES else "restored"


def entry_label(text: str) -> str:
    """The name of a comparison entry in figures.

    Example:
        >>> entry_label("refit+low-rank+lcc:distillation")
        'refit, masked low rank + LCC; distillation'
    """
    entry = Entry.parse(text)
    if entry.method is None:
        return "refit, untrained"
    for preset, does in _PRESETS.items():
        if entry.trains_like(Entry.parse(preset)):
            return f"{preset} (refit, {does})"
    whole, _, rate = text.partition("=")
    objective = whole.partition(":")[2]
    label = "refit, " if entry.on_refit else ""
    label += " + ".join(_PARTS.get(part, part) for part in entry.method.split("+"))
    if entry.control is not None:
        label += f", {_WHERE[entry.control]}"
    label += f"; {objective}" if objective else ""
    return label + ("; tuned rate" if rate == TUNED else f"; rate {rate}" if rate else "")
