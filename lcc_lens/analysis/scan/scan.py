"""The scan of a pair: what pruning took from every head, from one streaming pass of each model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

from lcc_lens.analysis.scan.passes import ScanPlan
from lcc_lens.analysis.scan.request import checked_length, pair_sequences, possible_selectors
from lcc_lens.analysis.scan.result import SCAN_RECORD, SCAN_TENSORS, Scan, ScanRecord
from lcc_lens.analysis.scan.shards import ScanState, ScanWork
from lcc_lens.analysis.scan.token_differences import token_losses
from lcc_lens.analysis.selectors.evidence import Evidence, ScoreSettings
from lcc_lens.analysis.selectors.linear_probe import Solver
from lcc_lens.analysis.selectors.registry import check_selectors, score
from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.errors import InterruptedRun, RequestError
from lcc_lens.core.heads import Head, HeadMap
from lcc_lens.core.processes import first_process_first, is_first_process, n_processes, wait_for_all
from lcc_lens.core.progress import track
from lcc_lens.data.datasets import Data
from lcc_lens.models.architecture.sparsity_patterns import common_pattern
from lcc_lens.models.architecture.zeros import matrix_zeros, share_of_zeros
from lcc_lens.models.hooked.activations import SITES, Positions, Site, check_sites
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

__all__ = ["SCAN_RECORD", "SCAN_TENSORS", "Scan", "ScanRecord", "scan"]

logger = logging.getLogger(__name__)
#: Where a run directory keeps a scan that is not through.
UNFINISHED = ".scan.unfinished"
_AGAIN = "run the same command again to go on"


def scan(
    pair: Pair,
    data: Data,
    *,
    positions: Positions = "all",
    sites: Sequence[Site] = SITES,
    spectra: Sequence[Site] = ("z",),
    selectors: Sequence[str] | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    probe_rank: int = 1,
    probe_solver: Solver = "newton",
    probe_folds: int | None = None,
    selector_examples: int = 32,
    display: int = 8,
    batch_tokens: int | None = None,
    seed: int = 0,
    run: str | Path | None = None,
) -> Scan:
    """Find what pruning took from every head.

    Both models run over the data in batches of similar length; only sums are kept, and no logits are computed. The
    pruned model reads no further than an activation counts. For questions with right and wrong answers the dense
    model's outputs at the question's end come from the pass over the right answer, and the wrong answer goes on from
    that pass's key-value cache.

    Several processes (``accelerate launch``) with a common run directory divide the examples, and give the same bits
    as one does; the first one adds the sums in the order of the examples, computes the scores and writes. Sums of wide
    sites' spectra, which are float32, are the same within rounding.

    Args:
        pair: the hooked models.
        data: examples; use the role ``probe`` to keep them apart from training.
        positions: where differences are taken: at ``all`` tokens, since an injection acts on all of them and a
            mean over more samples is steadier; at the ``last`` token of the question as in the paper; at the ``end``;
            at those that predict the ``response``; or at chosen positions (negative ones count from the end).
        sites: also compare the MLP's post-activation (``mlp``) and the residual stream (``resid``); heads always.
        spectra: sites whose singular values are wanted, and with them a wide site's first directions, which ``mlp-lcc``
            needs; each costs the square of the site's width in memory.
        selectors: which scores to compute. If not given: those that cost next to nothing on these data. ``kl``,
            ``attribution``, ``gradient`` and ``patching`` run a model again; ``mse`` and ``random`` always come.
        max_length: tokens per example at most, where answers are cut; 512, or the models' context if that is shorter.
        limit: sequences at most (text is cut into many).
        probe_rank: K of the probes' activation editing.
        probe_solver: ``newton``, to convergence, or ``published``, 200 steps of Adam.
        probe_folds: cross-validate the linear probe in so many parts.
        selector_examples: examples for selectors that run the models again.
        display: examples whose loss is kept token by token.
        batch_tokens: tokens per forward pass at most (1024 on a CPU, 4096 on a GPU if not given); decides speed and
            memory.
        seed: of the probes.
        run: a run directory: the scan is saved there, and goes on there after an interruption.

    Raises:
        RequestError: no usable example, fewer than two samples, an unknown name, or a selector that these data or
            models cannot serve.
        LensError: an activation is not finite (names layer and head), or another process has ended or does not see the
            run directory.
        InterruptedRun: Ctrl-C, after the state was saved.

    Example:
        >>> result = scan(pair, load_data("boolq", n=256, role="probe"))  # doctest: +SKIP
        >>> result.select("probe", share=0.25)[:2]  # doctest: +SKIP
        [Head(layer=0, head=4), Head(layer=1, head=0)]
    """
    check_sites([*sites, *spectra])
    named = None if selectors is None else check_selectors(selectors)
    length = checked_length(pair, max_length)
    right, wrong = pair_sequences(data, pair, length, limit)
    wanted = possible_selectors(named, pair, data, wrong)
    present: tuple[Site, ...] = tuple(site for site in SITES if site == "z" or (site in sites and site in pair.sites))
    batch_tokens = batch_tokens or tokens_per_pass(device_of(pair.dense))
    plan = ScanPlan(tuple(right), wrong, positions, present, batch_tokens)
    with _begun(run, pair, plan, spectra) as work, _interruptible(can_go_on=run is not None):
        for _ in track(work.batches(), work.n_batches(), "scan heads"):
            pass
        if work.is_divided:
            wait_for_all(_AGAIN)
            if not is_first_process():
                return _found_by_first(run)
        sums = work.whole_sums()
        heads, *others = (sums.pop(site).finish() for site in present)  # the sums are large and let go one by one
        if heads.n_samples < 2:
            raise RequestError(f"expected at least 2 positions to compare, got {heads.n_samples}; scan more examples")
        components = heads.components()
        _warn(heads.n_samples, components.d_head, heads.is_silent.nonzero().tolist())
        settings = ScoreSettings(probe_rank, probe_solver, probe_folds, selector_examples, seed, batch_tokens)
        layers = work.layers if wrong is not None else None
        scores = score(wanted, Evidence(pair, plan.sequences, heads, components, layers, settings))
        result = Scan(
            record=_record(pair, data, plan, heads.n_samples, length, probe_rank if wrong is not None else None, seed),
            heads=heads,
            components=components,
            others=dict(zip(present[1:], others, strict=True)),
            selected_by=dict(scores),
            tokens=token_losses(pair, plan.sequences, display),
        )
        if run is not None:
            result.save(run)
        work.state.discard()
        if work.is_divided:
            wait_for_all(_AGAIN)
    return result


@contextmanager
def _begun(run: str | Path | None, pair: Pair, plan: ScanPlan, spectra: Sequence[Site]) -> Iterator[ScanWork]:
    """The work to do; of several processes the first one looks first at what is there."""
    is_divided = run is not None and n_processes() > 1
    with first_process_first() if is_divided else nullcontext():
        state = _state(run, pair, plan, spectra, joined=is_divided and not is_first_process())
        if is_divided:
            state.begin()
        work = ScanWork(pair, plan, [site for site in spectra if site in plan.sites], state, is_divided)
    if is_divided:  # nobody adds anything before all know what is there
        wait_for_all(_AGAIN)
    with state:
        yield work


def _found_by_first(run: str | Path | None) -> Scan:
    """What the first process made of everybody's sums."""
    wait_for_all(_AGAIN)
    return Scan.load(cast("str | Path", run))


@contextmanager
def _interruptible(*, can_go_on: bool) -> Iterator[None]:
    """Say how to go on after Ctrl-C.

    Raises:
        InterruptedRun: Ctrl-C where the work done so far is kept.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not can_go_on:
            raise
        raise InterruptedRun("scan stopped; finished examples are kept, run the same command again to go on") from stop


def _state(run: str | Path | None, pair: Pair, plan: ScanPlan, spectra: Sequence[Site], *, joined: bool) -> ScanState:
    digest = hashlib.sha256()
    for sequence in [*plan.sequences, *(plan.wrong or ())]:
        digest.update(f"{sequence.loss_from} {sequence.tokens.tolist()}".encode())
    identity = {
        "models": [pair.dense_id.sha256, pair.pruned_id.sha256, str(pair.dtype)],
        "tokens": digest.hexdigest(),
        "settings": [plan.positions, plan.sites, sorted(spectra), plan.batch_tokens, pair.one_at_a_time],
    }
    return ScanState(None if run is None else Path(run) / UNFINISHED, identity, joined=joined)


def _record(
    pair: Pair, data: Data, plan: ScanPlan, n_samples: int, max_length: int, probe_rank: int | None, seed: int
) -> ScanRecord:
    pattern, sparsity = _zeros(pair)
    mapping = HeadMap((), ()) if pair.head_map.is_identity else pair.head_map
    return ScanRecord(
        dense=pair.dense_id.reference,
        pruned=pair.pruned_id.reference,
        dense_sha256=pair.dense_id.sha256,
        pruned_sha256=pair.pruned_id.sha256,
        data=data.name,
        source=data.source,
        positions=plan.positions,
        n_examples=len(plan.sequences),
        n_samples=n_samples,
        max_length=max_length,
        probe_rank=probe_rank,
        seed=seed,
        groups=tuple(sorted(data.groups)),
        negatives=data.negatives,
        pattern=pattern,
        sparsity=sparsity,
        dense_heads=mapping.dense_heads,
        removed_heads=mapping.removed,
    )


def _zeros(pair: Pair) -> tuple[str, float | None]:
    """Pattern and share of the pruned model's zeros, whoever pruned it."""
    try:
        matrices = matrix_zeros(pair.pruned_id.path)
    except RequestError as error:  # matrices that cannot be told apart (fused experts) keep no one from scanning heads
        logger.info("zeros not counted: %s", error)
        return "", None
    return common_pattern({matrix.pattern for matrix in matrices}), share_of_zeros(matrices)


def _warn(n_samples: int, d_head: int, silent: Iterable[Sequence[int]]) -> None:
    """Say what the data leave open."""
    if n_samples < d_head:
        logger.warning(
            "expected at least %d samples to determine every direction, got %d: the last %d directions of each "
            "head are "
            "arbitrary; all other statistics hold", d_head, n_samples, d_head - n_samples,
        )  # fmt: skip
    heads = [str(Head(layer, head)) for layer, head in silent]
    if heads:
        shown = ", ".join(heads[:8]) + (", ..." if len(heads) > 8 else "")
        logger.warning("%d heads put out nothing but zeros in the pruned model: %s", len(heads), shown)
