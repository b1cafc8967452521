"""Sizes of a refit and of the training after it that fit a time budget, from short measurements on this machine."""

from __future__ import annotations

import bisect
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.machine.processes import first_process_first, is_first_process
from lcc_lens.core.outputs.places import RESUMED, writing_run
from lcc_lens.core.ranges import Count, Natural
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.data.checks import MIX
from lcc_lens.data.registry import part_names, without_self_written
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.calibration.texts import REFIT_SAMPLES
from lcc_lens.restoration.in_memory import method_in_memory
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.refitted import REFITTED, pair_hashes
from lcc_lens.restoration.settings import RefitRequest, with_preset
from lcc_lens.restoration.speed import FEWEST_REFITTED, FEWEST_TRAINED, Costs, measure_speed
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.state import CHECKPOINT

logger = logging.getLogger(__name__)
BUDGET_FILE = "budget.json"
#: What a method that refits first may take where neither a time nor sizes are named.
DEFAULT_BUDGET = "15m"
#: Fraction of the time that a refit may take, and one of at most so many sequences; the rest is trained.
_REFIT_SHARE, _SMALL_REFIT_SHARE, _SMALL_REFIT = 0.35, 0.5, 96
#: The most blocks that a plan names.
_MOST_TRAINED = 4096
#: Fraction of the time above which the dense model's writing, which has a fixed cost, is left out of the mix.
_WRITING_SHARE = 0.15
#: Fraction of the time that a plan leaves for what it does not know.
_RESERVE = 0.05
_UNITS = {"s": 1, "m": 60, "h": 3600}
#: What a plan was made for, in words.
_WORDS = {
    "dense_sha256": "dense model", "pruned_sha256": "pruned model", "budget": "time budget", "length": "length",
    "writing": "choice of data", "training": "set of training options", "method": "method",
}  # fmt: skip


@dataclass(frozen=True)
class BudgetPlan:
    """What fits a time budget; :func:`plan_budget` makes it.

    Example:
        >>> plan = BudgetPlan(900, 96, 200, {"refit": 300.0, "train": 560.0})
        >>> str(plan)
        '15 minutes: refit on 96 sequences (5 min), train on 200 blocks (9 min)'
    """

    budget: float
    """Seconds."""
    refit_samples: Natural
    """Calibration sequences of the refit; 0 where it does not fit."""
    examples: Count
    """Blocks of text to train on."""
    seconds: dict[str, float]
    """Expected, by stage."""
    costs: Costs | None = None
    """What they follow from."""
    writes: bool = True
    """Whether the dense model writes its part of the mix."""
    started: float = field(default_factory=time.monotonic, compare=False)
    """Where the time begins to count, on this machine's clock."""

    @property
    def refitting(self) -> RefitRequest:
        """The refit to ask for."""
        calibration = None if self.writes else part_names(without_self_written(MIX))
        return RefitRequest(calibration, n_samples=self.refit_samples)

    def __str__(self) -> str:
        sizes = {"refit": f"refit on {self.refit_samples} sequences", "train": f"train on {self.examples} blocks"}
        stages = [f"{sizes.get(name, name)} ({_duration(time)})" for name, time in self.seconds.items() if time]
        without = "" if self.writes else "; no text that the dense model writes"
        return f"{self.budget / 60:g} minutes: {', '.join(stages)}{without}"


def parse_budget(text: str) -> float:
    """Seconds of a budget such as ``90s``, ``15m`` or ``1h``.

    Raises:
        RequestError: another form, or no time.

    Example:
        >>> parse_budget("15m"), parse_budget("1.5h")
        (900.0, 5400.0)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", str(text).strip())
    if found is None or float(found[1]) == 0:
        raise RequestError(f"expected a time budget such as 5m, 15m or 1h, got {text}; write a number and s, m or h")
    return float(found[1]) * _UNITS[found[2]]


def plan_budget(
    dense: str | Path,
    pruned: str | Path,
    budget: str,
    *,
    method: str | MethodSpec = "best",
    length: int | None = None,
    n_measured: int = 0,
    self_written: float = 0.2,
    may_skip_writing: bool = False,
    config: TrainConfig | None = None,
    run: Path | None = None,
    resume: bool = False,
) -> BudgetPlan:
    """Choose the sizes of a refit and of the training after it so that both end within a time budget.

    Forward passes, optimiser steps, a product of the refit's solver and sampled tokens are timed first. A third of the
    time goes to the refit, half of a short one; it is left out where so little is not worth its fixed cost.
    ``restore_models`` measures again after the refit, and trains on as many blocks as then fit, at most those of the
    plan.

    Args:
        dense: reference of the dense model; ``pruned``: of the pruned one.
        budget: a time such as ``15m``.
        method: a method that refits first (``best``, ``polish``).
        length: tokens of a block; 512, or the models' context if shorter.
        n_measured: tokens that three models read at the end, to measure recovery.
        self_written: fraction of the texts that the dense model writes first.
        may_skip_writing: whether it need not, where that would take much of the time; see ``BudgetPlan.writes``.
        config: settings of the training; the method's own if not given.
        run: the run directory, which keeps the plan: it is used again for the same request.
        resume: refuse another request, which is planned anew otherwise; what is measured at the end may differ.

    Raises:
        RequestError: another form of budget, a method without a refit, a budget below the smallest stage (names the
            least that would do), or a run to resume that had another plan.

    Example:
        >>> plan_budget("smollm2", "out/wanda50", "15m")  # doctest: +SKIP
    """
    started, spec, seconds = time.monotonic(), method_in_memory(method, pruned), parse_budget(budget)
    if not spec.preset.on_refit:
        raise RequestError(f"expected a method that refits first for a budget, got {spec.name}; name best or polish")
    config = with_preset(config, spec)
    request = pair_hashes(dense, pruned) | {
        "budget": seconds, "method": spec.name, "length": length, "writing": [self_written, may_skip_writing],
        "training": fingerprint(config),
    }  # fmt: skip
    with writing_run(run, inputs=[resolve(dense), resolve(pruned)], again=RESUMED), first_process_first():
        kept = None if run is None else _kept_for(run, request, n_measured, resume=resume)
        if kept is not None:
            return replace(kept.plan, started=started)
        costs = _costs_here(dense, pruned, spec, config, length)
        costs = replace(costs, n_measured=n_measured, self_written=self_written)
        spent = time.monotonic() - started
        plan = replace(fit_budget(costs, seconds, spent, may_skip_writing=may_skip_writing), started=started)
        if run is not None:
            _keep(run, _Kept(request, plan))
    return plan


def _costs_here(
    dense: str | Path, pruned: str | Path, spec: MethodSpec, config: TrainConfig, length: int | None
) -> Costs:
    """What the stages of a restoration take on this machine; the models are in memory only meanwhile."""
    started = time.monotonic()
    pair = load_pair(dense, pruned)
    loaded, length = time.monotonic() - started, fitting_length(length, pair.context)
    costs = Costs(measure_speed(pair, spec, config, length, loaded), length, batch_size=config.batch_size)
    del pair
    release_memory()
    return costs


def fit_budget(costs: Costs, budget: float, spent: float = 0.0, *, may_skip_writing: bool = False) -> BudgetPlan:
    """The largest refit and training that end within a budget.

    Args:
        costs: of both; ``budget``: seconds; ``spent``: seconds of it that are gone; ``may_skip_writing``: see above.

    Raises:
        RequestError: a budget below the smallest training.
    """
    writes = not (may_skip_writing and costs.least_written > _WRITING_SHARE * budget)
    costs = costs if writes else costs.without_writing()
    outside = spent + costs.measure() + costs.speed.loaded
    left = (1 - _RESERVE) * budget - outside

    def trained(blocks: int) -> float:
        return costs.write(blocks) + costs.train(blocks)

    if left < trained(FEWEST_TRAINED):
        needed = (outside + trained(FEWEST_TRAINED)) / (1 - _RESERVE)
        raise RequestError(
            f"expected a budget of at least {_as_option(needed)} here, got {_as_option(budget)}; name that, or measure "
            "less at the end (--panel-blocks)"
        )
    most = left - trained(FEWEST_TRAINED)
    n_refit = max(
        _most(costs.refit, min(_REFIT_SHARE * left, most), range(FEWEST_REFITTED, REFIT_SAMPLES + 1)),
        _most(costs.refit, min(_SMALL_REFIT_SHARE * left, most), range(FEWEST_REFITTED, _SMALL_REFIT + 1)),
    )
    counts = range(FEWEST_TRAINED, _MOST_TRAINED + 1)
    examples = _most(trained, left - costs.refit(n_refit), counts) or FEWEST_TRAINED
    seconds = {
        "refit": costs.refit(n_refit), "write text": costs.write(examples), "train": costs.train(examples),
        "measure": outside,
    }  # fmt: skip
    return BudgetPlan(budget, n_refit, examples, seconds, costs, writes)


def blocks_in_time(
    plan: BudgetPlan, pair: Pair, spec: MethodSpec, config: TrainConfig, run: Path, *, resume: bool = False
) -> int:
    """The blocks to train on in the time that a plan has left after the refit.

    Args:
        plan: see :func:`plan_budget`; ``pair``: with the refitted model; ``config``: of the training.
        resume: keep the number that the run has trained on so far.
    """
    if plan.costs is None:
        return plan.examples
    with first_process_first():
        kept = _kept(run, plan)
        if kept is not None and kept.trained is not None and (resume or not is_first_process()):
            return kept.trained
        costs = replace(plan.costs, speed=measure_speed(pair, spec, config, plan.costs.length, plan.costs.speed.loaded))
        left = (1 - _RESERVE / 2) * plan.budget - (time.monotonic() - plan.started) - costs.measure()
        blocks = _most(costs.train, left, range(FEWEST_TRAINED, plan.examples + 1)) or FEWEST_TRAINED
        if blocks < plan.examples:
            logger.info("training on %d blocks instead of %d, which fit the time that is left", blocks, plan.examples)
        if kept is not None:
            _keep(run, replace(kept, trained=blocks))
    return blocks


def _most(seconds: Callable[[int], float], most: float, counts: range) -> int:
    """The largest of the counts that takes no more than so many seconds; 0 where none does."""
    n = bisect.bisect_right(counts, most, key=seconds)
    return counts[n - 1] if n else 0


@dataclass(frozen=True)
class _Kept:
    """What a run directory keeps of its plan, and how many blocks the run trained on in the end."""

    request: dict[str, Any]
    plan: BudgetPlan
    trained: int | None = None


def _kept(run: Path, plan: BudgetPlan | None = None) -> _Kept | None:
    file = run / BUDGET_FILE
    kept = read_record(file, _Kept, "name another run") if file.exists() else None
    return None if kept is None or plan not in (None, kept.plan) else kept


def _kept_for(run: Path, request: dict[str, Any], n_measured: int, *, resume: bool) -> _Kept | None:
    """The plan that a run directory keeps, if it is of the same request; any other one is refused when resuming."""
    kept = _kept(run)
    if kept is None:
        if resume and ((run / REFITTED).exists() or (run / CHECKPOINT).exists()):
            raise RequestError(
                f"expected a time budget's run to resume in {run}, got one of named sizes; repeat --examples and "
                "--refit-samples, or start without --resume"
            )
        return None
    changed = next((name for name in request if kept.request.get(name) != request[name]), None)
    if changed is not None and resume:
        raise RequestError(
            f"expected the options that {run} was begun with, got another {_WORDS[changed]}; repeat them, "
            "or start without --resume"
        )
    measures_other = not resume and kept.plan.costs is not None and kept.plan.costs.n_measured != n_measured
    return None if changed is not None or measures_other else kept


def _keep(run: Path, kept: _Kept) -> None:
    record = asdict(kept)
    del record["plan"]["started"]
    write_record(run / BUDGET_FILE, record)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _as_option(seconds: float) -> str:
    """A time as ``--budget`` reads it, rounded up: to seconds where they matter."""
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 300 and whole % 60 else f"{math.ceil(whole / 60)}m"
