"""Scan a pair of models: run both over the same tokens, compare their activations and score every head."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, cast

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.passes import ScanPlan
from lcc_lens.analysis.scan.record import ScanRecord, require_own_models
from lcc_lens.analysis.scan.request import (
    check_plan,
    has_changed_models,
    pair_sequences,
    possible_selectors,
    wants_causes,
)
from lcc_lens.analysis.scan.result import SCAN_RECORD, SCAN_TENSORS, Scan
from lcc_lens.analysis.scan.shards import ScanWork
from lcc_lens.analysis.scan.state import ScanState
from lcc_lens.analysis.scan.token_differences import token_losses
from lcc_lens.analysis.selectors.evidence import Evidence, ScoreSettings
from lcc_lens.analysis.selectors.linear_probe import Solver
from lcc_lens.analysis.selectors.registry import check_selectors, score
from lcc_lens.core.config import package_version, tokens_per_pass
from lcc_lens.core.errors import InterruptedRun, RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.heads import Head, HeadMap
from lcc_lens.core.machine.processes import first_process_first, is_first_process, n_processes, wait_for_all
from lcc_lens.core.outputs.places import tidy_run, writing_run
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Length, Natural, Range, Seed, ranged
from lcc_lens.data.datasets import Data
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.architecture.sparsity_patterns import common_pattern
from lcc_lens.models.architecture.zeros import fraction_of_zeros, matrix_zeros
from lcc_lens.models.hooked.activations import SITES, Positions, Site, check_positions, check_sites
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

__all__ = ["SCAN_RECORD", "SCAN_TENSORS", "Scan", "ScanRecord", "scan"]

logger = logging.getLogger(__name__)
#: Folder of a run directory with the state of an unfinished scan.
UNFINISHED = ".scan.unfinished"
_AGAIN = "run the same command again to go on"


@ranged
def scan(
    pair: Pair,
    data: Data | str | Path | Sequence[str],
    *,
    positions: Positions = "all",
    sites: Sequence[Site] = SITES,
    spectra: Sequence[Site] = ("z",),
    selectors: Sequence[str] | None = None,
    max_length: Length | None = None,
    limit: Count | None = None,
    probe_rank: Count = 1,
    probe_solver: Solver = "newton",
    probe_folds: Annotated[int, Range(2)] | None = None,
    selector_examples: Count = 32,
    display: Natural = 8,
    causes: bool = False,
    batch_tokens: Count | None = None,
    seed: Seed = 0,
    run: str | Path | None = None,
) -> Scan:
    """Compare the activations of both models over the same tokens and score every head.

    Activations are reduced to sums at once, and no logits are computed. Several processes (``accelerate launch``) with
    a common run directory share the examples; the result has the same bits as with one process, except for spectra of
    wide sites, whose float32 sums agree within rounding.

    Args:
        pair: the hooked models.
        data: examples (the role ``probe`` keeps them apart from training), a prompt, or a list of prompts.
        positions: tokens to compare: ``all``; the question's ``last`` (as in the paper); the ``end``; those that
            predict the ``response``; or chosen positions (negative ones count from the end).
        sites: compare ``mlp`` (post-activation) and ``resid`` (residual stream) too; heads always.
        spectra: sites to compare with singular values and directions, heads always; memory is width squared.
        selectors: scores to compute; if not given ``attribution`` (with both models in memory), and ``probe`` and
            ``interaction`` where the data have right and wrong answers; ``mse`` and ``random`` always.
        max_length: tokens per example at most; 512, or the models' context if shorter.
        limit: sequences at most (text is cut into many); ``probe_rank``: K of the probes' activation editing.
        probe_solver: ``newton``, to convergence, or ``published``, 200 steps of Adam.
        probe_folds: folds of the linear probe's cross-validation; one split if not given.
        selector_examples: examples for selectors that run the models again; ``display``: that are kept token by token.
        causes: also :func:`~lcc_lens.analysis.causes.division.find_causes`; a warning says why where it cannot.
        batch_tokens: tokens per forward pass at most (1024 on a CPU, 4096 on a GPU if not given).
        seed: of the probes; ``run``: directory to save the scan in, and to resume it from.

    Raises:
        RequestError: no usable example, fewer than two samples, an unknown name, or a selector unfit for these inputs.
        LensError: an activation is not finite (names layer and head), or another process ended or is not visible.
        InterruptedRun: Ctrl-C, after the state was saved.
    """
    check_sites([*sites, *spectra])
    data, positions = as_data(data), check_positions(positions)
    named = None if selectors is None else check_selectors(selectors)
    length, tokens = fitting_length(max_length, pair.context), batch_tokens or tokens_per_pass(device_of(pair.dense))
    right, wrong = pair_sequences(data, pair, length, limit)
    names = possible_selectors(named, pair, data, min(len(right), selector_examples), wrong)
    sites, divided = _compared_sites(pair, [*sites, *spectra]), wants_causes(causes, names, pair)
    plan = ScanPlan(tuple(right), wrong, positions, sites, tokens, divided)
    settings = ScoreSettings(probe_rank, probe_solver, probe_folds, selector_examples, seed, tokens)
    check_plan(plan.sequences, positions, settings, names, pair.d_head)
    return _run(pair, data, plan, spectra, names, settings, length, display, run)


def has_scan(run: Path) -> bool:
    """Whether a run directory has a finished scan; what a killed command left beside it is deleted."""
    if not (run / SCAN_RECORD).exists():
        return False
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
    tidy_run(run)
    return True


def _compared_sites(pair: Pair, requested: Sequence[Site]) -> tuple[Site, ...]:
    """Head outputs, and the requested sites that this pair has."""
    return tuple(site for site in SITES if site == "z" or (site in requested and site in pair.sites))


def _run(
    pair: Pair,
    data: Data,
    plan: ScanPlan,
    spectra: Sequence[Site],
    selectors: Sequence[str],
    settings: ScoreSettings,
    max_length: int,
    display: int,
    run: str | Path | None,
) -> Scan:
    """Run both models over all shards, then compute the result; of several processes the first one does the latter."""
    if run is not None:
        require_own_models(has_changed_models(pair))
    models = [pair.dense_id.path, pair.pruned_id.path]
    with (
        writing_run(None if run is None else Path(run), inputs=models),
        _scan_work(run, pair, plan, spectra) as work,
        _interruptible(can_resume=run is not None),
    ):
        for _ in track(work.batches(), work.n_batches(), "scan heads"):
            pass
        if work.is_divided:
            wait_for_all(_AGAIN)
            if not is_first_process():
                wait_for_all(_AGAIN)  # until the first process has computed the result from all sums
                return Scan.load(cast("str | Path", run))
        result = _result(work, data, selectors, settings, max_length, display)
        pair.require_unchanged()
        if run is not None:
            result.save(run)
        work.state.discard()
        if work.is_divided:
            wait_for_all(_AGAIN)
    return result


def _result(
    work: ScanWork, data: Data, selectors: Sequence[str], settings: ScoreSettings, max_length: int, display: int
) -> Scan:
    """Statistics, lost components and scores from the sums over all shards."""
    pair, plan, sums = work.pair, work.plan, work.whole_sums()
    heads, *others = (sums.sites.pop(site).finish() for site in plan.sites)  # pop frees the large sums one by one
    components = heads.components()
    _warn(heads.n_samples, components.d_head, heads.is_silent.nonzero().tolist())
    layers, probe_rank = (None, None) if plan.wrong is None else (work.layers, settings.rank)
    causes = None if sums.causes is None else sums.causes.finish()
    evidence = Evidence(pair, plan.sequences, heads, components, layers, settings, causes)
    scores = {name: _scores(name, evidence, work.state) for name in selectors}
    return Scan(
        record=_record(pair, data, plan, heads.n_samples, max_length, probe_rank, settings.seed),
        heads=heads,
        components=components,
        others=dict(zip(plan.sites[1:], others, strict=True)),
        selected_by=scores,
        tokens=token_losses(pair, plan.sequences, display),
        causes=causes,
    )


def _scores(selector: str, evidence: Evidence, state: ScanState) -> HeadScores:
    """A selector's scores: those that an interrupted scan finished, or new ones."""
    scores = state.scores(selector, evidence.settings)
    if scores is None:
        scores = score([selector], evidence)[selector]
        state.keep_scores(evidence.settings, scores)
    return scores


@contextmanager
def _scan_work(run: str | Path | None, pair: Pair, plan: ScanPlan, spectra: Sequence[Site]) -> Iterator[ScanWork]:
    """The passes left to run; of several processes the first one reads or creates the state before the others."""
    is_divided = run is not None and n_processes() > 1
    with first_process_first() if is_divided else nullcontext():
        state = _state(run, pair, plan, spectra, joined=is_divided and not is_first_process())
        if is_divided:
            state.begin()
        work = ScanWork(pair, plan, [site for site in plan.sites if site == "z" or site in spectra], state, is_divided)
    if is_divided:  # no process writes before all have read the state
        wait_for_all(_AGAIN)
    with state:
        yield work


@contextmanager
def _interruptible(*, can_resume: bool) -> Iterator[None]:
    """Name the way to resume after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not can_resume:
            raise
        raise InterruptedRun(
            "scan stopped; finished examples and selectors are kept, run the same command again to go on"
        ) from stop


def _state(run: str | Path | None, pair: Pair, plan: ScanPlan, spectra: Sequence[Site], *, joined: bool) -> ScanState:
    request = fingerprint(
        package_version(), pair.dense_id.sha256, pair.pruned_id.sha256, pair.dtype, pair.device.type,
        pair.one_at_a_time, sorted(spectra), plan, plan.shards(),
    )  # fmt: skip
    if run is None:
        return ScanState(None, request)
    return ScanState(Path(run) / UNFINISHED, request, joined=joined, replaces=Path(run) / SCAN_RECORD)


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
        is_changed=has_changed_models(pair),
    )


def _zeros(pair: Pair) -> tuple[str, float | None]:
    """Pattern and fraction of the pruned model's zeros, counted in its weights."""
    try:
        matrices = matrix_zeros(pair.pruned_id.path)
    except RequestError as error:  # such as fused experts; the scan does not need the count
        logger.info("zeros not counted: %s", error)
        return "", None
    return common_pattern({matrix.pattern for matrix in matrices}), fraction_of_zeros(matrices)


def _warn(n_samples: int, d_head: int, silent: Iterable[Sequence[int]]) -> None:
    """Warn about directions that too few samples determine, and about heads without output."""
    if n_samples < d_head:
        logger.warning(
            "expected at least %d samples to determine every direction, got %d: the last %d directions of each "
            "head are arbitrary; all other statistics hold",
            d_head,
            n_samples,
            d_head - n_samples,
        )
    heads = [str(Head(layer, head)) for layer, head in silent]
    if heads:
        shown = ", ".join(heads[:8]) + (", ..." if len(heads) > 8 else "")
        logger.warning("%d heads output only zeros in the pruned model: %s", len(heads), shown)
