"""The preset ``best``, which recovers most at no cost at inference: a refit, then training of all remaining weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcc_lens.core.ranges import ranged
from lcc_lens.data.datasets import Data
from lcc_lens.pruning.calibration.texts import Calibration
from lcc_lens.restoration.budget import BudgetPlan
from lcc_lens.restoration.jobs import restore_models
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.settings import TRAIN_EXAMPLES, RefitRequest, RestoreSettings
from lcc_lens.restoration.training.config import Step, TrainConfig


@ranged
def restore_best(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    data: Data,
    *,
    budget: BudgetPlan | None = None,
    config: TrainConfig | None = None,
    validation: Data | None = None,
    low_rank: int | None = None,
    calibration: Calibration | None = None,
    n_samples: int | None = None,
    seq_len: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Restoration:
    """Refit the remaining weights by least squares, then train them and the norm gains of every decoder layer.

    Where memory does not hold this (some 24 bytes per weight), a low-rank change of every linear layer is trained.
    The refitted model is kept in ``run/refit`` and used again if it is of this pair. The restoration belongs to it:
    ``export(restoration, run / "refit", out)`` writes the result, whose zeros are the pruned model's.

    Args:
        dense: reference of the dense model.
        pruned: reference of the same model with zeros.
        run: the run directory.
        data: training examples (role ``train``); ``mix`` holds several kinds of text.
        budget: what fits a time, by :func:`~lcc_lens.restoration.budget.plan_budget`, in place of ``n_samples`` and
            ``limit``.
        config: settings of the training. If not given, the objective is the KL divergence from the dense model plus a
            third of the language-model loss. Learning rate and batch size are the preset's if it names none.
        validation: what the best parameters are chosen by; if not given, text of the domains that ``data`` lacks.
        low_rank: train a low-rank change of this rank instead.
        calibration: data for the refit (``mix`` if not given); see :func:`~lcc_lens.pruning.jobs.refit`.
        n_samples: sequences of it; 288 if not given.
        seq_len: tokens per sequence; 512, or the model's context if shorter.
        max_length: tokens per training example at most; 512, or the model's context if shorter.
        limit: training sequences at most; of running text 480 if not given.
        resume: go on from the run directory's checkpoint.
        on_step: called after every optimiser step.

    Raises:
        RequestError: a sliced model, data that overlap, or a refitted model of another pair in the run directory.

    Example:
        >>> data = load_data("wikipedia+howto+python", role="train")  # doctest: +SKIP
        >>> restore_best("smollm2", "out/wanda50", "runs/best", data, limit=400)  # doctest: +SKIP
    """
    limit = TRAIN_EXAMPLES if limit is None and data.kind == "text" else limit
    settings = RestoreSettings(low_rank=low_rank, max_length=max_length, limit=limit)
    planned = RefitRequest() if budget is None else budget.refitting
    named: dict[str, Any] = {"calibration": calibration, "n_samples": n_samples, "seq_len": seq_len}
    refitting = replace(planned, **{name: value for name, value in named.items() if value is not None})
    return restore_models(
        dense, pruned, run, data, method="best", config=config, validation=validation, settings=settings,
        refitting=refitting, budget=budget, resume=resume, on_step=on_step,
    )[0]  # fmt: skip
