"""The whole method on one screen: what was scanned and chosen is trained, measured and frozen for export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.processes import wait_for_all
from lcc_lens.core.progress import track
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import check_request, refuse_both_models, require_slots
from lcc_lens.restoration.injections.constants import Start
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import build_injection, trains_numbers, uses_sequences
from lcc_lens.restoration.result import Restoration, RestorationRecord
from lcc_lens.restoration.run_folder import Beginning, RunFolder
from lcc_lens.restoration.training.loop import Step, TrainConfig, learning_rates, train, validation_loss
from lcc_lens.restoration.training.lr_range import range_test
from lcc_lens.restoration.training_data import training_sequences


def restore(
    pair: Pair,
    scan: Scan | None,
    heads: Sequence[Head],
    data: Data,
    *,
    method: str = "lcc",
    config: TrainConfig | None = None,
    validation: Data | None = None,
    rank: int | None = None,
    mlp_rank: int | None = None,
    low_rank: int = 8,
    start: Start = "zero",
    max_length: int = 512,
    limit: int | None = None,
    shuffle_responses: bool = False,
    tune_lr: bool = False,
    exportable: bool = True,
    run: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    before_refit: str | Path | None = None,
) -> Restoration:
    """Train a constant per chosen head and freeze the best (Eq. 8), or restore by another method or a control.

    Args:
        pair: the hooked models.
        scan: the scan of this pair, for directions; None for methods that need none.
        heads: which heads to restore; none for methods that act on no heads.
        data: training examples (role ``train``); mean-shift learns from none, and uses their held-out part alone; a
            sequential one is measured on them.
        method: ``lcc``, a control, or another part of :data:`~lcc_lens.restoration.injections.METHODS`; parts joined
            by ``+`` train together (``lcc+low-rank``).
        config: training settings.
        validation: held-out examples of the same kind; a tenth of the training examples' groups if not given.
        rank: directions per head; all if not given.
        mlp_rank: directions per MLP; those that the scan holds if not given.
        low_rank: the rank of a masked low rank.
        start: see :class:`~lcc_lens.restoration.injections.LccInjection`.
        max_length: tokens per example at most.
        limit: training sequences at most (text is cut into many), and a tenth of it for validation.
        shuffle_responses: a control: train on every prompt with another one's response; validation stays as it is.
        tune_lr: choose the learning rate by a short range test first (see
            :mod:`lcc_lens.restoration.training.lr_range`); its losses are noted in the settings.
        exportable: refuse, before anything is trained, a model whose checkpoint cannot hold the result. Without it the
            restoration serves under hooks alone.
        run: a run directory for ``config.json``, ``restoration.safetensors``, ``metrics.json``, ``log.jsonl``,
            checkpoints and what was measured before the first step; nothing is written if not given.
        resume: go on from the run directory's checkpoint.
        on_step: called after every optimiser step.
        before_refit: the pruned model that the pair's was refitted from: recovery is counted from its loss.

    Raises:
        RequestError: a scan of other weights, a model that the export cannot serve, data that overlap, or nothing to
            resume.
        InterruptedRun: Ctrl-C, after the state was saved.

    Example:
        >>> restore(pair, scan, scan.select("mse", share=0.25), load_data("alpaca", n=480))  # doctest: +SKIP
    """
    config = config or TrainConfig()
    check_request(pair, scan, heads, method)
    if pair.one_at_a_time:
        refuse_both_models(method, config)
    if exportable:
        require_slots(pair, method)
    if shuffle_responses and not trains_numbers(method):
        raise RequestError(f"expected a method that trains to shuffle responses for, got {method}; leave one out")
    run = Path(run) if run is not None else None
    training, held_out = training_sequences(
        pair, scan, data, validation, max_length, limit, config.seed if shuffle_responses else None
    )
    asked = {
        "method": method, "rank": rank, "mlp_rank": mlp_rank, "low_rank": low_rank, "start": start,
        "max_length": max_length, "limit": limit, "shuffle_responses": shuffle_responses,
        "heads": [str(h) for h in heads],
    }  # fmt: skip
    wanted = {**asdict(config), **asked, "tune_lr": tune_lr, "before_refit": str(before_refit)}
    request = _identity(pair, scan, data, wanted, held_out)
    beginning = Beginning.read(run, request) if resume and run is not None else None
    # one model at a time: the dense one's turn is over before anything holds the pruned one
    dense = None
    if pair.one_at_a_time and beginning is None:
        dense = validation_loss(pair.dense, None, held_out, config.micro_tokens)
    given = Ingredients(
        pair.pruned, None if scan is None else scan.components, heads, pair.output_projections, rank, start, low_rank,
        config.seed, None if scan is None else scan.others.get("mlp"), mlp_rank, pair, training,
    )  # fmt: skip
    injection = build_injection(method, given)
    teacher = pair.dense if config.objective.needs_teacher else None
    if beginning is None:
        tested = None
        if tune_lr and injection.n_trained:
            tested = range_test(pair.pruned, injection, training, held_out, config, teacher=teacher)
        beginning = Beginning(request, _bare_losses(pair, held_out, config, before_refit, dense), tested)
    tested, losses = beginning.lr_range, dict(beginning.losses)
    if tested is not None:
        config = replace(config, lr=tested.best)
    settings = {
        **asdict(config), **asked, "learning_rates": learning_rates(injection, config.lr),
        "lr_range": None if tested is None else tested.by_rate,
    }  # fmt: skip
    folder = RunFolder(run, pair, settings, data.source, beginning, config.seed, resume=resume)
    if injection.n_trained:
        steps = train(
            pair.pruned, injection, training, held_out, config, teacher=teacher, run=run, resume=resume,
            identity=_identity(pair, scan, data, settings, held_out),
            first_loss=None if tested is None else tested.start_loss,
        )  # fmt: skip
        for step in track(steps, config.epochs * -(-len(training) // config.batch_size), "restore"):
            folder.add(step)
            if on_step is not None:
                on_step(step)
    losses["restored"] = validation_loss(pair.pruned, injection, held_out, config.micro_tokens)
    # what was trained learned from the data; what was not, from the scan
    name, n_examples = data.name, len(training)
    if scan is not None and not injection.n_trained and not uses_sequences(method):
        name, n_examples = scan.record.data, scan.record.n_examples
    record = RestorationRecord(
        dense=pair.dense_id.reference, pruned=pair.pruned_id.reference, dense_sha256=pair.dense_id.sha256,
        pruned_sha256=pair.pruned_id.sha256, method=method, data=name, n_examples=n_examples, seed=config.seed,
        settings=settings, losses=losses, n_trained=injection.n_trained,
    )  # fmt: skip
    restoration = Restoration.of(injection, record)
    folder.finish(restoration, len(held_out))
    wait_for_all()
    return restoration


def _bare_losses(
    pair: Pair,
    held_out: Sequence[TokenSequence],
    config: TrainConfig,
    before_refit: str | Path | None,
    dense: float | None,
) -> dict[str, float]:
    """The losses that a restoration starts from; the dense model's may be known."""
    if dense is None:
        dense = validation_loss(pair.dense, None, held_out, config.micro_tokens)
    losses = {"dense": dense, "pruned": validation_loss(pair.pruned, None, held_out, config.micro_tokens)}
    if before_refit is not None:
        pruned = sequence_loss(load_plain(resolve(before_refit)), held_out)["loss"]
        losses |= {"pruned": pruned, "refitted": losses["pruned"]}
    return losses


def _identity(
    pair: Pair, scan: Scan | None, data: Data, settings: dict[str, Any], held_out: Sequence[TokenSequence]
) -> str:
    """What a checkpoint must share to be resumed."""
    scanned = None if scan is None else asdict(scan.record)
    described = [pair.pruned_id.sha256, scanned, data.source, sorted(data.groups), settings]
    return json.dumps([*described, [len(s) for s in held_out]], sort_keys=True)
