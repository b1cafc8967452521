"""Check a restoration's request before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.models.architecture.joint_bias_slots import find_joint_slots
from lcc_lens.models.hooked.offloading import is_sharded
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.scans import check_scan
from lcc_lens.restoration.settings import RestoreSettings
from lcc_lens.restoration.training.config import TrainConfig


def check_request(
    pair: Pair,
    scan: Scan | None,
    heads: Sequence[Head],
    spec: MethodSpec,
    config: TrainConfig,
    settings: RestoreSettings,
) -> None:
    """Refuse a method without the scan, heads or models that it needs, and a scan or heads of another model."""
    check_restores(spec)
    if scan is not None:
        check_scan(scan, pair)
    elif spec.needs_components:
        raise RequestError(f"expected a scan of this pair for {spec.name}, got none; scan it first")
    if spec.on_heads and not heads:
        raise RequestError(f"expected heads to restore by {spec.name}, got none; choose them by scan.select")
    refuse_removed(heads, pair)
    if pair.one_at_a_time and (spec.needs_sequences or config.objective.needs_teacher):
        what = spec.name if spec.needs_sequences else "an objective that runs the dense model"
        raise RequestError(
            f"expected both models in memory for {what}, got one at a time; load both, or choose mean-shift or the "
            "response's loss"
        )
    if not all(part.biases for part in spec.parts) and is_sharded(pair.pruned):
        raise RequestError(
            f"expected a method of constants (such as lcc) for a model whose layers several processes share, got "
            f"{spec.name}, which changes weights; load the whole model in each process"
        )
    if settings.exportable:
        require_slots(pair, spec)
    if settings.shuffle_responses and spec.n_trained is None:
        raise RequestError(f"expected a method that trains for shuffled responses, got {spec.name}; leave one out")


def check_restores(spec: MethodSpec, *, one_at_a_time: bool = False) -> None:
    """Refuse a baseline whose result cannot be kept as a restoration, and a refit with one model in memory."""
    if spec.preset.on_refit and one_at_a_time:
        raise RequestError(f"expected both models in memory for {spec.name}, got one at a time; load both")
    if spec.compare_only:
        raise RequestError(f"expected a method that restores, got {spec.name}, a baseline; run it by lcc-lens compare")


def require_slots(pair: Pair, spec: MethodSpec) -> None:
    """Refuse a method whose constants the pruned model's checkpoint cannot hold.

    Raises:
        RequestError: says which, and what serves instead.
    """
    maps = {site: projection_names(pair.pruned, site) for site in spec.bias_sites}
    find_joint_slots(pair.pruned_id.checkpoint, maps)


def refuse_removed(heads: Sequence[Head], pair: Pair) -> None:
    """Refuse heads that pruning removed whole, since their output is not used."""
    removed = {Head(layer, head) for layer, gone in enumerate(pair.head_map.removed) for head in gone}
    gone = sorted(removed.intersection(heads))
    if gone:
        raise RequestError(f"expected heads that pruning left, got {gone[0]}, removed whole; choose by scan.select")
