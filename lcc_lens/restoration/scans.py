"""The scan that a restoration uses: the one in a folder where it fits, a new one otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcc_lens.analysis.scan.request import check_in_memory
from lcc_lens.analysis.scan.scan import Scan, has_scan, scan
from lcc_lens.analysis.selectors.linear_probe import Solver
from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import Data
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.spec import MethodSpec


def check_scan(scan: Scan, pair: Pair) -> None:
    """Refuse a scan of other weights, by hash or because hooks or changed weights acted on a model."""
    if scan.record.is_changed:
        raise RequestError(
            "expected a scan of the models as their checkpoints are, got one with hooks or changed weights; scan this "
            "pair without them"
        )
    for name, recorded, identity in (
        ("dense", scan.record.dense_sha256, pair.dense_id),
        ("pruned", scan.record.pruned_sha256, pair.pruned_id),
    ):
        if recorded != identity.sha256:
            raise RequestError(
                f"expected the {name} model of the scan (SHA-256 {recorded[:12]}…), got {identity.reference} "
                f"({identity.sha256[:12]}…); scan this pair first"
            )


def check_scores(run: Path, selector: str, *, one_at_a_time: bool, data: str | None = None) -> None:
    """Refuse a selector that the scan in a folder, or the scan to come, will not have; before any model is loaded.

    Args:
        run: the folder.
        selector: the score that heads are chosen by.
        one_at_a_time: whether one model is in memory at a time.
        data: what the scan has to be of; any if None.

    Raises:
        RequestError: names the scores that there are, or the selectors that serve; or the scan is of other data.
    """
    if has_scan(run):
        scan = Scan.load(run)
        if data is not None and scan.record.data != data:
            raise RequestError(
                f"expected a scan of {data} in {run}, got one of {scan.record.data}; name another run, or other data"
            )
        scan.scores(selector)
    elif one_at_a_time:
        check_in_memory([selector])


def scan_for(
    spec: MethodSpec,
    pair: Pair,
    run: Path,
    load: Callable[[], Data],
    *,
    selector: str,
    max_length: int | None,
    limit: int | None = None,
    seed: int = 0,
    only_needed: bool = False,
    probe_solver: Solver = "newton",
) -> Scan:
    """Load the scan in a folder, or scan the pair and save it there.

    Args:
        load: gives the data for a new scan.
        selector: the score that heads are chosen by.
        only_needed: compute nothing beyond what the method and the selector need (for comparisons), and replace a scan
            that lacks any of it.
        probe_solver: of the linear probe, see :func:`~lcc_lens.analysis.scan.scan.scan`.

    Raises:
        RequestError: the scan in the folder is of another pair.
    """
    if has_scan(run):
        saved = Scan.load(run)
        check_scan(saved, pair)
        has_mlp = saved.has_mlp(directions="mlp" in spec.spectra)
        if not only_needed or has_mlp or "mlp" not in spec.scan_sites or "mlp" not in pair.sites:
            return saved
    is_free = selector in ("mse", "random")  # every scan has these scores
    max_length = None if max_length is None else min(max_length, pair.context)
    if only_needed:
        return scan(
            pair, load(), sites=spec.scan_sites, spectra=spec.spectra, display=0, max_length=max_length,
            selectors=() if is_free else (selector,), limit=limit, seed=seed, run=run,
        )  # fmt: skip
    return scan(
        pair, load(), spectra=spec.spectra, max_length=max_length, selectors=None if is_free else (selector,),
        limit=limit, seed=seed, run=run, probe_solver=probe_solver,
    )  # fmt: skip
