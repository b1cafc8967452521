"""The whole method on one screen: prune -> scan -> select -> restore -> export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lcc_lens.config import compute_dtype, default_device
from lcc_lens.data import Data, TokenSequence, load_data
from lcc_lens.errors import RequestError
from lcc_lens.evaluation import sequence_loss
from lcc_lens.heads import Head
from lcc_lens.injections import (
    Ingredients,
    Start,
    build_injection,
    trains_numbers,
    uses_sequences,
)
from lcc_lens.job_data import calibration_tokens, recorded_groups, training_sequences
from lcc_lens.lr_range import range_test
from lcc_lens.models import load_plain, resolve
from lcc_lens.pair import Pair
from lcc_lens.processes import wait_for_all
from lcc_lens.progress import track
from lcc_lens.pruning import parse_pattern
from lcc_lens.pruning import prune as prune_checkpoint
from lcc_lens.pruning.masks import Pattern, Unstructured
from lcc_lens.pruning.pruners import Choice, Split
from lcc_lens.pruning.refit import REFIT_RECORD, RefitConfig, Target
from lcc_lens.pruning.refit import refit as refit_checkpoint
from lcc_lens.pruning.settings import Method
from lcc_lens.pruning.structured import Schedule
from lcc_lens.restoration import Restoration, RestorationRecord
from lcc_lens.restore_checks import check_request, refuse_both_models, require_slots
from lcc_lens.run_folder import Beginning, RunFolder
from lcc_lens.scan import Scan
from lcc_lens.training import Step, TrainConfig, learning_rates, train, validation_loss

#: What a refit is calibrated on: instructions, web text and an encyclopedia.
REFIT_DATA = ("alpaca", "c4", "wikitext")
REFIT_SAMPLES = 96


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: Method = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: str | Data = "c4",
    n_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    sliced: bool = False,
    schedule: Schedule | None = None,
    choice: Choice = "error",
    split: Split | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Prune a model into a plain Hugging Face directory with ``pruning.json`` beside the weights.

    Args:
        model: reference of the dense model.
        out: the directory to write.
        method: ``magnitude``, ``wanda``, ``sparsegpt`` (single weights) or ``slimgpt`` (whole heads and neurons).
        sparsity: share of the weights to remove; if no pattern is given either, 0.5 (0.2 for slimgpt).
        pattern: N:M such as ``2:4`` instead of a share: N weights stay of every M.
        calibration: data whose activations the method reads (their role is ``calibration``).
        n_samples: calibration sequences.
        seq_len: tokens per calibration sequence.
        seed: of the draw of calibration data.
        sliced: write a smaller model of standard configuration instead of zeros (slimgpt only).
        schedule: how slimgpt spreads the sparsity over the layers; ``log`` if not given, ``uniform`` if sliced.
        choice: how slimgpt chooses heads and neurons: by ``error``, or the controls ``magnitude`` and ``random``.
        split: how slimgpt divides a layer's share between heads and neurons: heads ``spared`` (rounded down; the
            default), ``proportional``, or by ``error``; neurons make up the difference.
        overwrite: replace an existing directory.

    Raises:
        RequestError: both sparsity and pattern, or a request that does not fit the model; nothing is written.

    Returns:
        What ``pruning.json`` holds.
    """
    if sparsity is not None and pattern is not None:
        raise RequestError(f"wanted a sparsity or a pattern, got both ({sparsity} and {pattern}); leave one out")
    share = sparsity if sparsity is not None else 0.2 if method == "slimgpt" else 0.5
    chosen: Pattern = parse_pattern(pattern) if pattern else Unstructured(share)
    path, device = resolve(model), default_device()
    tokens, provenance = None, {}
    if method != "magnitude" and choice == "error":
        data = load_data(calibration, role="calibration") if isinstance(calibration, str) else calibration
        tokens = calibration_tokens(data, path, n_samples, seq_len, seed)
        provenance = {"data": data.name, "source": data.source, "groups": sorted(data.groups)}
    return prune_checkpoint(
        path,
        Path(out),
        method=method,
        pattern=chosen,
        calibration=tokens,
        seed=seed,
        device=device,
        dtype=compute_dtype(device),
        overwrite=overwrite,
        sliced=sliced,
        schedule=schedule,
        choice=choice,
        split=split,
        provenance={"dense": str(model), **provenance},
    )


def refit(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    calibration: str | Data | Sequence[str | Data] = REFIT_DATA,
    n_samples: int = REFIT_SAMPLES,
    seq_len: int = 512,
    target: Target = "weights",
    ridge: float = 0.01,
    mend: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fit the surviving weights of a pruned model by least squares; nothing is trained, and all zeros stay.

    Args:
        dense: reference of the dense model.
        pruned: reference of the same model with zeros.
        out: the directory to write.
        calibration: data whose activations are fitted (their role is ``calibration``); several in equal parts.
        n_samples: calibration sequences in all.
        seq_len: tokens per sequence.
        target: fit to what the dense ``weights`` give on the inputs that a map sees now, or to the dense model's own
            ``outputs``.
        ridge: pull towards the dense weights, as a share of the inputs' mean square.
        mend: the share of what the residual stream lacks that the maps which write to it make up for; see
            :class:`~lcc_lens.pruning.refit.RefitConfig`.
        seed: of the draw of calibration data.
        overwrite: replace an existing directory.

    Returns:
        What ``refit.json`` holds; see :func:`lcc_lens.pruning.refit.refit`.

    Raises:
        RequestError: the two are not a dense model and its zeroed version, or there is too little text; nothing is
            written.

    Example:
        >>> refit("smollm2", "out/wanda50", "out/wanda50-refit")  # doctest: +SKIP
    """
    calibration = [calibration] if isinstance(calibration, str | Data) else calibration
    if not calibration:
        raise RequestError("wanted data to calibrate on, got none; name some")
    if n_samples < len(calibration):
        raise RequestError(
            f"wanted at least one calibration sequence of each data set, got {n_samples} for {len(calibration)}; "
            "raise n_samples"
        )
    config = RefitConfig(target, ridge, mend)
    paths, device = (resolve(dense), resolve(pruned)), default_device()
    parts = [load_data(one, role="calibration", seed=seed) if isinstance(one, str) else one for one in calibration]
    share, rest = divmod(n_samples, len(parts))
    tokens = [
        calibration_tokens(part, paths[1], share + (place < rest), seq_len, seed) for place, part in enumerate(parts)
    ]
    provenance = {
        "data": "+".join(part.name for part in parts),
        "source": [part.source for part in parts],
        # the pruned model may be a refitted one itself; what fitted it still counts
        "groups": sorted(recorded_groups(paths[1] / REFIT_RECORD).union(*(part.groups for part in parts))),
    }
    return refit_checkpoint(
        *paths, Path(out), tokens=torch.cat(tokens), config=config, device=device, dtype=compute_dtype(device),
        overwrite=overwrite, provenance={**provenance, "dense": str(dense), "pruned": str(pruned), "seed": seed},
    )  # fmt: skip


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
        method: ``lcc``, a control, or another part of :data:`~lcc_lens.injections.METHODS`; parts joined by ``+`` train
            together (``lcc+low-rank``).
        config: training settings.
        validation: held-out examples of the same kind; a tenth of the training examples' groups if not given.
        rank: directions per head; all if not given.
        mlp_rank: directions per MLP; those that the scan holds if not given.
        low_rank: the rank of a masked low rank.
        start: see :class:`~lcc_lens.injections.LccInjection`.
        max_length: tokens per example at most.
        limit: training sequences at most (text is cut into many), and a tenth of it for validation.
        shuffle_responses: a control: train on every prompt with another one's response; validation stays as it is.
        tune_lr: choose the learning rate by a short range test first (see :mod:`lcc_lens.lr_range`); its losses are
            noted in the settings.
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
        raise RequestError(f"wanted a method that trains to shuffle responses for, got {method}; leave one out")
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
