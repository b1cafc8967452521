"""What a restoration is refused for before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.models.architecture.joint_bias_slots import find_joint_slots
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.methods import (
    bias_sites,
    parse_method,
    uses_components,
    uses_heads,
    uses_sequences,
)
from lcc_lens.restoration.training.config import TrainConfig


def check_request(pair: Pair, scan: Scan | None, heads: Sequence[Head], method: str) -> None:
    """Refuse a method that lacks what it acts on, and a scan or heads that do not fit.

    Raises:
        RequestError: says what is missing, or which of them is another model's.
    """
    parse_method(method)
    if scan is not None:
        check_scan(scan, pair)
    elif uses_components(method):
        raise RequestError(f"expected a scan of this pair for {method}, got none; scan it first")
    if uses_heads(method) and not heads:
        raise RequestError(f"expected heads to restore by {method}, got none; choose some by scan.select")
    refuse_removed(heads, pair)


def refuse_both_models(method: str, config: TrainConfig) -> None:
    """Refuse what runs both models side by side where a pair holds one at a time.

    Raises:
        RequestError: names the method or the objective.
    """
    if uses_sequences(method) or config.objective.needs_teacher:
        what = method if uses_sequences(method) else "an objective that follows the dense model"
        raise RequestError(
            f"expected both models in memory for {what}, got one at a time; load both, or choose mean-shift or the "
            "response's loss"
        )


def check_scan(scan: Scan, pair: Pair) -> None:
    """Refuse a scan of other weights.

    Raises:
        RequestError: names the model whose hash differs.
    """
    for name, recorded, identity in (
        ("dense", scan.record.dense_sha256, pair.dense_id),
        ("pruned", scan.record.pruned_sha256, pair.pruned_id),
    ):
        if recorded != identity.sha256:
            raise RequestError(
                f"expected the {name} model of the scan (SHA-256 {recorded[:12]}…), got {identity.reference} "
                f"({identity.sha256[:12]}…); scan this pair first"
            )


def require_slots(pair: Pair, method: str) -> None:
    """Refuse a method whose constants the pruned model's checkpoint cannot hold.

    Raises:
        RequestError: says which, and what serves instead.
    """
    maps = {site: projection_names(pair.pruned, site) for site in bias_sites(method)}
    find_joint_slots(pair.pruned_id.checkpoint, maps)


def refuse_removed(heads: Sequence[Head], pair: Pair) -> None:
    """Refuse heads that pruning removed whole: nothing put there reaches the output.

    Raises:
        RequestError: names the first such head.
    """
    removed = {Head(layer, head) for layer, gone in enumerate(pair.head_map.removed) for head in gone}
    gone = sorted(removed.intersection(heads))
    if gone:
        raise RequestError(f"expected heads that are still there, got {gone[0]}, removed whole; choose by scan.select")
