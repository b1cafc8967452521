"""Sizes of a refit and of the training after it that fit a time budget, from short measurements on this machine."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.ranges import Count, Natural
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import REFIT_SAMPLES
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.settings import LOW_RANK, RefitRequest, with_preset
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.validation import validation_loss

BUDGET_FILE = "budget.json"
#: Fraction of the time that a refit may take; the rest is trained.
_REFIT_SHARE = 0.35
#: Fewest sequences that a refit is worth, and fewest blocks that training is worth.
_FEWEST_REFITTED, _FEWEST_TRAINED = 24, 16
#: A refit's time per token, in forward passes of one model, and iterations of its solver per linear layer: estimates.
_REFIT_PASSES, _REFIT_ITERATIONS = 5.0, 50
#: Time to sample a token of self-written text, in time to read one: an estimate.
_SAMPLED = 4.0
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Speed:
    """What one machine takes for one pair, in seconds."""

    read: float
    """Per token of a forward pass of one model."""
    trained: float
    """Per token of an optimiser step, the dense model's pass included."""
    solved: float
    """Per iteration of the refit's solver over all linear layers."""
    loaded: float
    """To load both models."""


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

    @property
    def refitting(self) -> RefitRequest:
        """The refit to ask for."""
        return RefitRequest(n_samples=self.refit_samples)

    def __str__(self) -> str:
        sizes = {"refit": f"refit on {self.refit_samples} sequences", "train": f"train on {self.examples} blocks"}
        stages = [f"{sizes.get(name, name)} ({_duration(time)})" for name, time in self.seconds.items() if time]
        return f"{self.budget / 60:g} minutes: {', '.join(stages)}"


def parse_budget(text: str) -> float:
    """Seconds of a budget such as ``90s``, ``15m`` or ``1h``.

    Raises:
        RequestError: another form, or no time.

    Example:
        >>> parse_budget("15m"), parse_budget("1.5h")
        (900.0, 5400.0)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise RequestError(f"expected a time budget such as 5m, 15m or 1h, got {text}; write a number and s, m or h")
    return float(found[1]) * _UNITS[found[2]]


def plan_budget(
    dense: str | Path,
    pruned: str | Path,
    budget: str,
    *,
    method: str = "polish",
    length: int = 512,
    n_measured: int = 0,
    self_written: float = 0.2,
    config: TrainConfig | None = None,
    run: Path | None = None,
) -> BudgetPlan:
    """Choose the sizes of a refit and of the training after it so that both end within a time budget.

    A forward pass, two optimiser steps and one product of the solver are timed on random tokens first. A third of the
    time goes to the refit, which is left out where so little of it is not worth its fixed cost.

    Args:
        dense: reference of the dense model; ``pruned``: of the pruned one.
        budget: a time such as ``15m``.
        method: a method that refits first (``polish``, ``best``).
        length: tokens of a block.
        n_measured: tokens that three models read at the end, to measure recovery.
        self_written: fraction of the training text that the dense model writes first.
        config: settings of the training; the method's own if not given.
        run: the run directory, whose plan of the same request is used again.

    Raises:
        RequestError: another form of budget, a method without a refit, or a budget below the smallest stage (names the
            least that would do).

    Example:
        >>> plan_budget("smollm2", "out/wanda50", "15m")  # doctest: +SKIP
    """
    spec, seconds = MethodSpec.parse(method), parse_budget(budget)
    if not spec.preset.on_refit:
        raise RequestError(f"expected a method that refits first for a budget, got {method}; name polish or best")
    request = {"budget": seconds, "method": method, "length": length, "measured": n_measured}
    kept = None if run is None else _kept_plan(run, request)
    if kept is not None:
        return kept
    start = time.perf_counter()
    pair = load_pair(dense, pruned)
    loaded = time.perf_counter() - start
    speed = measure_speed(pair, spec, with_preset(config, spec), length, loaded)
    del pair
    release_memory()
    spent = time.perf_counter() - start
    plan = fit_budget(speed, seconds, spent, length=length, n_measured=n_measured, self_written=self_written)
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        write_record(run / BUDGET_FILE, {"request": request, "plan": asdict(plan), "speed": asdict(speed)})
    return plan


def fit_budget(
    speed: Speed,
    budget: float,
    spent: float = 0.0,
    *,
    length: int = 512,
    n_measured: int = 0,
    self_written: float = 0.2,
) -> BudgetPlan:
    """The largest refit and training that end within a budget, by what this machine takes for each.

    Args:
        speed: see :func:`measure_speed`; ``budget``: seconds; ``spent``: seconds of it that are gone.
        length, n_measured, self_written: see :func:`plan_budget`.

    Raises:
        RequestError: a budget below the smallest training.
    """
    measured = 3 * n_measured * speed.read + 2 * speed.loaded
    left = budget - spent - measured
    sequence = _REFIT_PASSES * length * speed.read
    solved = _REFIT_ITERATIONS * speed.solved
    # every block is trained once; held-out text, a tenth of it, is read about twice; some is written first
    block = length * (speed.trained + 0.4 * speed.read + self_written * _SAMPLED * speed.read)
    least = _FEWEST_TRAINED * block
    if left < least:
        needed = 1.05 * (spent + measured + least)
        raise RequestError(
            f"expected a budget of at least {_minutes_up(needed)} here, got {_duration(budget)}; name that, or measure "
            "less at the end (--panel-blocks)"
        )
    n_refit = int((_REFIT_SHARE * left - solved) / sequence)
    n_refit = min(n_refit, REFIT_SAMPLES) if n_refit >= _FEWEST_REFITTED else 0
    refit = solved + n_refit * sequence if n_refit else 0.0
    examples = max(int((left - refit) / block), _FEWEST_TRAINED)
    return BudgetPlan(
        budget, n_refit, examples, {"refit": refit, "train": examples * block, "measure": spent + measured}
    )  # fmt: skip


def measure_speed(pair: Pair, spec: MethodSpec, config: TrainConfig, length: int, loaded: float = 0.0) -> Speed:
    """Time a forward pass, optimiser steps and a product of the refit's solver, on random tokens."""
    sequences = _random_sequences(pair, length)
    short = replace(
        config, epochs=3, batch_size=len(sequences), validate_every=10**6, checkpoint_every=10**6, patience=None,
        reuse=False,
    )  # fmt: skip
    read = _read_seconds(pair, sequences, config.micro_tokens)
    injection = spec.build(
        Ingredients.of(pair, None, (), sequences=sequences, low_rank=spec.preset.low_rank or LOW_RANK)
    )
    teacher = pair.dense if config.objective.needs_teacher else None
    # the validation after the last step counts to neither
    step = next(itertools.islice(train(pair.pruned, injection, sequences, sequences, short, teacher=teacher), 1, None))
    return Speed(read, step.seconds / (len(sequences) * length), _solver_seconds(pair), loaded)


def time_refit(pair: Pair, request: RefitRequest) -> float:
    """Seconds that a refit would take here, from a forward pass on random tokens and a product of its solver."""
    length = fitting_length(request.seq_len, pair.context)
    read = _read_seconds(pair, _random_sequences(pair, length))
    return _REFIT_ITERATIONS * _solver_seconds(pair) + _REFIT_PASSES * request.n_samples * length * read


def _random_sequences(pair: Pair, length: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    return [TokenSequence(row, 1) for row in torch.randint(pair.pruned.cfg.d_vocab, (2, length), generator=generator)]


def _read_seconds(pair: Pair, sequences: Sequence[TokenSequence], micro_tokens: int | None = None) -> float:
    """Seconds per token of a forward pass of the dense model, after one to warm up."""
    validation_loss(pair.dense, None, sequences, micro_tokens)
    with timed() as reading:
        validation_loss(pair.dense, None, sequences, micro_tokens)
    return reading() / sum(map(len, sequences))


def _solver_seconds(pair: Pair) -> float:
    """Seconds of one iteration of the refit's solver in every linear layer: a product of weights and second moments."""
    shapes = [(m.d_out, m.d_in) for layer in find_matrices(Checkpoint(pair.pruned_id.path)) for m in layer]
    seconds = {}
    for d_out, d_in in set(shapes):
        weight, moments = (torch.ones(n, d_in, device=device_of(pair.pruned)) for n in (d_out, d_in))
        weight @ moments
        with timed() as taken:
            float((weight @ moments)[0, 0])  # waits for a GPU
        seconds[d_out, d_in] = taken()
    return sum(seconds[shape] for shape in shapes)


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that says, after the block, how many seconds it took."""
    start = end = time.perf_counter()
    yield lambda: end - start
    end = time.perf_counter()


def _kept_plan(run: Path, request: dict[str, Any]) -> BudgetPlan | None:
    """The plan in a run directory, if it is of the same request."""
    file = run / BUDGET_FILE
    kept = read_record(file, _Kept) if file.exists() else None
    return kept.plan if kept is not None and kept.request == request else None


@dataclass(frozen=True)
class _Kept:
    request: dict[str, Any]
    plan: BudgetPlan


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _minutes_up(seconds: float) -> str:
    return f"{math.ceil(seconds)}s" if seconds < 90 else f"{math.ceil(seconds / 60)}m"
