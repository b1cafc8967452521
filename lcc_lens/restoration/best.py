"""The combination that brings back most at no cost at inference: refit, then a masked low rank that follows the dense
model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_json
from lcc_lens.core.processes import first_process_first
from lcc_lens.data.datasets import Data
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import REFIT_DATA, REFIT_SAMPLES, refit
from lcc_lens.pruning.refit.refit import REFIT_RECORD
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.loop import Step, TrainConfig
from lcc_lens.restoration.training.objectives import Objective

#: What ``best`` stands for; the study of restorations says why.
BEST_METHOD, BEST_LOW_RANK, BEST_OBJECTIVE, BEST_LR = "low-rank", 16, "text+distillation", 5e-3
REFITTED = "refit"
#: The same as a line of a comparison.
BEST_ENTRY = f"refit+{BEST_METHOD}:{BEST_OBJECTIVE}={BEST_LR:g}"


def restore_best(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    data: Data,
    *,
    config: TrainConfig | None = None,
    validation: Data | None = None,
    low_rank: int = BEST_LOW_RANK,
    calibration: Sequence[str | Data] = REFIT_DATA,
    n_samples: int = REFIT_SAMPLES,
    seq_len: int = 512,
    max_length: int = 512,
    limit: int | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Restoration:
    """Refit the surviving weights in closed form, then train a masked low rank on every linear map.

    The refitted model is kept in ``run/refit`` and used again if it is of this pair. The restoration belongs to it:
    ``export(restoration, run / "refit", out)`` writes the result, whose zeros are the pruned model's.

    Args:
        dense: reference of the dense model.
        pruned: reference of the same model with zeros.
        run: the run directory.
        data: training examples (role ``train``).
        config: settings of the training; if none are given, its objective is the loss of all tokens and the divergence
            from the dense model in equal parts, at a rate of 5e-3.
        validation: see :func:`~lcc_lens.restoration.restore.restore`.
        low_rank: the rank.
        calibration: data for the refit.
        n_samples: sequences of it.
        seq_len: tokens per sequence.
        max_length: tokens per training example at most.
        limit: training sequences at most.
        resume: go on from the run directory's checkpoint.
        on_step: called after every optimiser step.

    Raises:
        RequestError: a sliced model, data that overlap, or a refitted model of another pair in the run directory.

    Example:
        >>> restore_best("smollm2", "out/wanda50", "runs/best", load_data("alpaca", n=480))  # doctest: +SKIP
    """
    folder = Path(run) / REFITTED
    _check_refit(folder, dense, pruned)
    with first_process_first():
        if not folder.exists():
            refit(dense, pruned, folder, calibration=calibration, n_samples=n_samples, seq_len=seq_len)
    config = config or TrainConfig(objective=Objective.parse(BEST_OBJECTIVE), lr=BEST_LR)
    return restore(
        load_pair(dense, folder), None, (), data, method=BEST_METHOD, config=config, validation=validation,
        low_rank=low_rank, max_length=max_length, limit=limit, run=run, resume=resume, on_step=on_step,
        before_refit=pruned,
    )  # fmt: skip


def _check_refit(folder: Path, dense: str | Path, pruned: str | Path) -> None:
    """Refuse a refitted model of another pair."""
    if not folder.exists():
        return
    record = read_json(folder / REFIT_RECORD)
    for name, model in (("dense", dense), ("pruned", pruned)):
        if record.get(f"{name}_sha256") != Checkpoint(resolve(model)).sha256:
            raise RequestError(f"expected a refit of this pair in {folder}, got another's; name another run")
