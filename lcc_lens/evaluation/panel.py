"""Recovery on a panel of domains: each kind of text by itself, their mean, and the worst one."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.reading import read_json, read_record, write_record
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import load_data, text_sequences
from lcc_lens.data.drawing import EmptyRole
from lcc_lens.data.panel import available_panel, panel_labels
from lcc_lens.data.registry import domains
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair
from lcc_lens.pruning.reconstruct.reconstruct import RECONSTRUCTION
from lcc_lens.pruning.refit.refit import REFIT_RECORD
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.run_folder import RUN_METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def panel_blocks(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = (),
    *,
    blocks: int = 8,
    length: int = 512,
    without: Collection[str] = (),
) -> dict[str, list[TokenSequence]]:
    """Held-out blocks of every text by its name; one without enough for a block is left out with a line in the log.

    Args:
        tokenizer: the models' tokenizer.
        texts: names of data or files; the panel that can be had (see :data:`~lcc_lens.data.panel.PANEL`) if not given.
        blocks: of each text at most; ``length``: tokens of each.
        without: groups (see :attr:`~lcc_lens.data.datasets.Data.groups`) to leave out: those that chose the parameters.

    Raises:
        RequestError: an unknown name, two texts that tables would call the same, a text that was named and cannot be
            had, or nothing to measure on.
    """
    cut = {}
    for name in panel_labels(texts or available_panel()):
        try:
            data = load_data(name, role="held-out", as_text=True).without(frozenset(without))
        except EmptyRole:
            sequences = []
        else:
            sequences = text_sequences(data, tokenizer, length, blocks)
        if sequences:
            cut[name] = sequences
        else:
            logger.warning("%s holds less than %d held-out tokens: left out of the panel", name, length)
    if not cut:
        raise RequestError(f"expected at least one text with {length} held-out tokens, got none; name longer texts")
    return cut


def panel_losses(model: Any, blocks: Mapping[str, Sequence[TokenSequence]]) -> dict[str, float]:
    """The loss of a plain model on every text, in nats per token."""
    return {name: sequence_loss(model, sequences)["loss"] for name, sequences in blocks.items()}


def panel_recovery(
    dense: Mapping[str, float], pruned: Mapping[str, float], restored: Mapping[str, float], seen: Iterable[str] = ()
) -> dict[str, Any]:
    r"""The fraction of the lost log-perplexity that was recovered, by domain: $(p - r) / (p - d)$.

    Args:
        dense: losses of the dense model by the names of texts; ``pruned``, ``restored``: those of the others.
        seen: domains (see :func:`~lcc_lens.data.registry.domains`) of the calibration and training data.

    Returns:
        ``domains``: by text, as :func:`~lcc_lens.data.panel.panel_labels` calls it, the three models' ``perplexity``,
        what was ``recovered`` (None where nothing was lost), and whether its kind was ``in_pool``. ``mean``, ``worst``
        and ``worst_domain`` over those that lost something (None without any). ``worse``: the texts that the restored
        model predicts worse than the pruned one.
    """
    seen, labels = frozenset(seen), panel_labels(dense)
    fractions = {label: share_recovered(dense[name], pruned[name], restored[name]) for name, label in labels.items()}
    losses = {"dense": dense, "pruned": pruned, "restored": restored}
    rows = {
        label: {
            "perplexity": {model: math.exp(loss[name]) for model, loss in losses.items()},
            "recovered": fractions[label],
            "in_pool": bool(domains(name) & seen),
        }
        for name, label in labels.items()
    }
    worse = [label for name, label in labels.items() if restored[name] > pruned[name]]
    return {"domains": rows, **mean_and_worst(fractions), "worse": worse}


def mean_and_worst(fractions: Mapping[str, float | None]) -> dict[str, Any]:
    """The ``mean`` and the ``worst`` of recovered fractions, and the ``worst_domain``; domains without any are left
    out."""
    known = {name: fraction for name, fraction in fractions.items() if fraction is not None}
    worst = min(known, key=known.__getitem__, default=None)
    return {
        "mean": statistics.mean(known.values()) if known else None,
        "worst": None if worst is None else known[worst],
        "worst_domain": worst,
    }


def measure_panel(
    restoration: Restoration,
    pair: Pair,
    blocks: Mapping[str, Sequence[TokenSequence]],
    *,
    before_refit: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the dense, the pruned and the restored model on held-out text of every domain.

    Args:
        restoration: what was restored.
        pair: the models that it belongs to.
        blocks: of every text, by its name; see :func:`panel_blocks`.
        before_refit: the pruned model itself, where the pair's was refitted from it.

    Returns:
        See :func:`panel_recovery`; also ``blocks`` of each text at most, and their ``length`` in tokens.

    Example:
        >>> measure_panel(restoration, pair, panel_blocks(pair.tokenizer))["worst"]  # doctest: +SKIP
        0.57
    """
    dense = _hooked_losses(pair.dense, blocks)
    pruned = (
        _hooked_losses(pair.pruned, blocks)
        if before_refit is None
        else panel_losses(load_plain(resolve(before_refit)), blocks)
    )
    with restoration.applied_to(pair.pruned) as model:
        restored = _hooked_losses(model, blocks)
    found = panel_recovery(dense, pruned, restored, seen_domains(pair.pruned_id.path, restoration.record.data))
    lengths = [list(map(len, own)) for own in blocks.values()]
    return {**found, "blocks": max(map(len, lengths)), "length": lengths[0][0]}


def seen_domains(pruned: Path, *data: str) -> frozenset[str]:
    """The domains of training data and of what a refitted or reconstructed checkpoint was calibrated on."""
    records = [read_json(file) for name in (REFIT_RECORD, RECONSTRUCTION) if (file := pruned / name).exists()]
    names = [*data, *(record["calibration"]["data"] for record in records if record.get("calibration"))]
    return frozenset().union(*map(domains, names))


def note_panel(run: Path, measured: dict[str, Any]) -> None:
    """Add the panel to the run's ``metrics.json``."""
    write_record(run / RUN_METRICS, {**read_record(run / RUN_METRICS, dict[str, Any]), "panel": measured})


def _hooked_losses(model: HookedModel, blocks: Mapping[str, Sequence[TokenSequence]]) -> dict[str, float]:
    with fused_attention(model):
        return panel_losses(plain_model(model), blocks)
