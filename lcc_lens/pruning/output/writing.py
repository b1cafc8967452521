"""Write a pruned checkpoint, zeroed or sliced, with its report and its head map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.files import write_json
from lcc_lens.core.heads import HEAD_MAP, HeadMap
from lcc_lens.core.outputs.folders import atomic_directory
from lcc_lens.core.rewriting import copy_checkpoint
from lcc_lens.models.architecture.anatomy import LayerAnatomy
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.models.loading.provenance import ancestors
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.methods.slimgpt import Quota
from lcc_lens.pruning.output.report import pruning_report
from lcc_lens.pruning.output.slicing import SlicedTensors, layer_cuts, sliced_config


def write_pruned(
    checkpoint: Checkpoint,
    out: Path,
    config: PruneConfig,
    plan: Sequence[Sequence[Matrix]],
    anatomies: Sequence[LayerAnatomy] | None,
    finished: FinishedLayers,
    *,
    tokens: Int[Tensor, "sequence pos"] | None,
    provenance: Mapping[str, Any],
    dense_sha256: str,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a plain Hugging Face directory, complete or not at all; gives the contents of ``pruning.json``."""
    report = pruning_report(
        config,
        plan,
        finished,
        tokens=tokens,
        provenance=provenance,
        dense_sha256=dense_sha256,
        ancestors=ancestors(checkpoint.path),
    )
    replaced, changes = _tensors_and_config(checkpoint, config, anatomies, finished)
    with atomic_directory(out, overwrite=overwrite) as part:
        copy_checkpoint(checkpoint, part, replaced=replaced, config=changes, resize=config.sliced)
        checkpoint.require_unchanged(dense_sha256)
        if anatomies is not None:
            head_map = _head_map(anatomies, finished, sliced=config.sliced)
            write_json(part / HEAD_MAP, head_map.to_json())
            report = {**report, **_structure(config, anatomies, finished)}
        write_json(part / "pruning.json", report)
    return report


def _tensors_and_config(
    checkpoint: Checkpoint, config: PruneConfig, anatomies: Sequence[LayerAnatomy] | None, finished: FinishedLayers
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    if anatomies is None or not config.sliced:
        return finished, {}
    gone = [finished.removed(layer) for layer in range(len(anatomies))]
    cuts = [cut for anatomy, removed in zip(anatomies, gone, strict=True) for cut in layer_cuts(anatomy, removed)]
    quota = Quota(len(gone[0].groups), len(gone[0].neurons))
    return SlicedTensors(cuts, finished, checkpoint), sliced_config(checkpoint.path, anatomies[0], quota)


def _head_map(anatomies: Sequence[LayerAnatomy], finished: FinishedLayers, *, sliced: bool) -> HeadMap:
    removed = [finished.removed(layer).heads.tolist() for layer in range(len(anatomies))]
    every = [range(anatomy.attention.n_groups * anatomy.heads_per_group) for anatomy in anatomies]
    kept = [[h for h in heads if h not in gone] for heads, gone in zip(every, removed, strict=True)]
    if sliced:
        return HeadMap(tuple(tuple(heads) for heads in kept), tuple(() for _ in kept))
    return HeadMap(tuple(tuple(heads) for heads in every), tuple(tuple(gone) for gone in removed))


def _structure(config: PruneConfig, anatomies: Sequence[LayerAnatomy], finished: FinishedLayers) -> dict[str, Any]:
    """The removed fraction of the layers' weights, and removed heads and neurons by layer of the dense model."""
    gone = [finished.removed(layer) for layer in range(len(anatomies))]
    n_removed = [
        len(removed.groups) * anatomy.attention.group_size(anatomy.d_model)
        + len(removed.neurons) * anatomy.mlp.group_size(anatomy.d_model)
        for anatomy, removed in zip(anatomies, gone, strict=True)
    ]
    return {
        "sliced": config.sliced,
        "schedule": config.chosen_schedule,
        "choice": config.choice,
        "split": config.chosen_split,
        "share_removed": sum(n_removed) / sum(anatomy.n_weights for anatomy in anatomies),
        "removed_heads": [removed.heads.tolist() for removed in gone],
        "removed_neurons": [len(removed.neurons) for removed in gone],
    }
