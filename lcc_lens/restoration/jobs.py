"""Restoration from references of models: refit if the method asks for it, scan, choose heads, restore."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lcc_lens.analysis.selectors.registry import check_selectors
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.processes import first_process_first
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.ranges import ranged
from lcc_lens.data.datasets import Data
from lcc_lens.models.architecture.context import context_of
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, check_models, load_pair
from lcc_lens.pruning.calibration.texts import check_calibration
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.restoration.budget import BudgetPlan, blocks_in_time
from lcc_lens.restoration.checks import check_restores
from lcc_lens.restoration.in_memory import method_in_memory
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.refitted import REFITTED, refitted_model
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.scans import check_scores, scan_for
from lcc_lens.restoration.settings import SCAN_DATA, HeadRequest, RefitRequest, RestoreSettings, with_preset
from lcc_lens.restoration.training.config import Step, TrainConfig
from lcc_lens.restoration.training.state import CHECKPOINT
from lcc_lens.restoration.training.tracking import Log, check_log
from lcc_lens.restoration.training_data import load_role, pool_validation, run_writer

logger = logging.getLogger(__name__)


@ranged
def restore_models(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    data: Data,
    *,
    method: str | MethodSpec = "lcc",
    config: TrainConfig | None = None,
    validation: Data | None = None,
    settings: RestoreSettings | None = None,
    heads: HeadRequest | None = None,
    refitting: RefitRequest | None = None,
    budget: BudgetPlan | None = None,
    one_at_a_time: bool = False,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    log: Log | None = None,
) -> tuple[Restoration, Pair]:
    """Restore a pruned model by any method; gives the restoration and its pair, refitted if it was.

    What the method needs first is made: a refit, a scan. Errors: see :func:`~lcc_lens.restoration.restore.restore`.

    Args:
        dense: reference of the dense model; ``pruned``: of the pruned one.
        run: the run directory. A scan in it is used, otherwise one is made; a refitted model lies in ``refit``.
        data: training examples (role ``train``).
        method: one of :data:`~lcc_lens.restoration.injections.methods.METHODS`, or several joined by ``+``.
        config: training settings; the method's own if not given; ``validation``: see ``restore``.
        settings: ranks, lengths, controls; ``heads``: how they are chosen; ``refitting``: a refit's calibration.
        budget: a plan whose time decides how much is trained on after the refit.
        one_at_a_time: hold one model in memory; ``resume``: go on with what the run holds; others: see ``restore``.
    """
    run, heads, settings = Path(run), heads or HeadRequest(), settings or RestoreSettings()
    spec = method_in_memory(method, pruned, low_rank=settings.low_rank)
    refitting = (refitting or RefitRequest()).completed(spec)
    check_job(
        dense, pruned, run, spec, heads, max_length=settings.max_length, refitting=refitting,
        one_at_a_time=one_at_a_time, resume=resume, log=log,
    )  # fmt: skip
    settings, (fraction, selector) = settings.fitting(_context(pruned)), heads.needed_by(spec)
    config, source = with_preset(config, spec), pruned
    with writing_run(run, inputs=[resolve(dense), resolve(pruned)], again=RESUMED):
        if spec.preset.on_refit and refitting.n_samples:
            with first_process_first():
                source = refitted_model(dense, pruned, run / REFITTED, refitting, resume=resume)
        pair, scan = load_pair(dense, source, one_at_a_time=one_at_a_time), None
        if spec.needs_scan:
            scan = scan_for(
                spec, pair, run, lambda: _scan_data(heads, dense, run, config.seed), selector=selector,
                max_length=settings.max_length, limit=heads.examples, seed=config.seed, probe_solver=heads.probe_solver,
            )  # fmt: skip
        chosen = [] if scan is None else scan.select(selector, share=fraction, seed=config.seed)
        if spec.preset.on_pool and validation is None:
            validation = pool_validation(data, config.seed)
        limit = settings.limit if budget is None else blocks_in_time(budget, pair, spec, config, run, resume=resume)
        return restore(
            pair, scan, chosen, data, method=spec, config=config, validation=validation, run=run,
            resume=resume and _has_begun(run, spec), on_step=on_step, log=log,
            before_refit=pruned if spec.preset.on_refit else None, **asdict(settings) | {"limit": limit},
        ), pair  # fmt: skip


def check_job(
    dense: str | Path,
    pruned: str | Path,
    run: Path,
    spec: MethodSpec,
    heads: HeadRequest,
    *,
    max_length: int | None = None,
    refitting: RefitRequest | None = None,
    one_at_a_time: bool = False,
    resume: bool = False,
    log: Log | None = None,
) -> None:
    """Refuse what :func:`restore_models` could not serve, from files alone, before data are read or models loaded.

    Args:
        refitting: the refit of a method that starts from one.

    Raises:
        RequestError: see :func:`restore_models`.
    """
    check_log(log)
    check_restores(spec, one_at_a_time=one_at_a_time)
    check_selectors([heads.selector])
    if resume and spec.n_trained and (run / RESTORATION_TENSORS).exists() and not (run / CHECKPOINT).exists():
        raise RequestError(
            f"expected a checkpoint to resume in {run}, got a finished restoration alone; start without --resume"
        )
    check_models(dense, pruned, max_length)
    refitting = (refitting or RefitRequest()).completed(spec)
    if spec.preset.on_refit and refitting.n_samples:
        check_calibration(refitting.calibration, refitting.n_samples, option="--refit-samples")
        require_refittable(resolve(dense), resolve(pruned), instead="restore by the method lcc, which refits nothing")
    if spec.needs_scan:
        check_scores(run, heads.needed_by(spec)[1], one_at_a_time=one_at_a_time, data=heads.data)


def _has_begun(run: Path, spec: MethodSpec) -> bool:
    """Whether a resumed run has a checkpoint; a training without one begins at its first step."""
    has_checkpoint = (run / CHECKPOINT).exists()
    if spec.n_trained and not has_checkpoint:
        logger.info("no checkpoint in %s to resume: the training begins at its first step", run)
    return has_checkpoint


def _scan_data(heads: HeadRequest, dense: str | Path, run: Path, seed: int) -> Data:
    """The data of the scan that heads are chosen by."""
    writer = run_writer(dense, run, heads.examples)
    return load_role(heads.data or SCAN_DATA, heads.examples, "probe", seed, writer)


def _context(pruned: str | Path) -> int | None:
    return context_of(read_config(resolve(pruned)))
