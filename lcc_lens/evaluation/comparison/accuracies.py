"""Zero-shot accuracies of a comparison, by task and on average, paired by item with the pruned and the dense model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcc_lens.core.metrics import bootstrap_interval, share_recovered, stratified_interval

#: One model's scores by task: ``acc``, ``stderr``, ``n``, and ``items`` (1 for each one right, else 0).
Tasks = Mapping[str, Mapping[str, Any]]


def task_rows(pruned: Tasks, runs: Sequence[Tasks]) -> dict[str, dict[str, Any]]:
    """By task one entry's accuracy over its seeds, and the interval of its gain over the pruned model."""
    rows = {}
    for task, before in pruned.items():
        scores = [run[task] for run in runs]
        accuracies = [score["acc"] for score in scores]
        gained = [now - was for now, was in zip(_right(scores), _right([before]), strict=True)]
        rows[task] = {
            "acc": statistics.mean(accuracies),
            "acc_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "stderr": scores[0]["stderr"],
            "n": scores[0]["n"],
            "gain_interval": list(bootstrap_interval(gained)),
        }
    return rows


def mean_accuracy(scores: Tasks) -> tuple[float, float]:
    """One model's accuracy as a mean over tasks, and its standard error from the tasks' own."""
    accuracies, errors = [s["acc"] for s in scores.values()], [s["stderr"] for s in scores.values()]
    return statistics.mean(accuracies), math.hypot(*errors) / len(errors)


def tasks_made_worse(unrestored: Mapping[str, Tasks]) -> list[str]:
    """The tasks in which the dense model is right more often than the pruned one.

    A small model may answer some tasks at chance, where pruning may raise its accuracy by luck. A mean that includes
    such a task does not measure what was lost.
    """
    return [task for task, score in unrestored["pruned"].items() if unrestored["dense"][task]["acc"] > score["acc"]]


def mean_rows(unrestored: Mapping[str, Tasks], runs: Sequence[Tasks], *, is_restoration: bool = True) -> dict[str, Any]:
    r"""One entry's mean accuracy over tasks, its gain, and the fraction of the loss that it recovered.

    With $\bar d, \bar p, \bar r$ the mean accuracies of the dense, the pruned and the restored model (the mean over
    seeds), the fraction is $(\bar r - \bar p) / (\bar d - \bar p)$. The 95 % intervals come from resampling items
    within each task, the same items for all models; the spread over seeds is ``accuracy_sd`` and not part of them.

    Args:
        unrestored: the ``dense`` and the ``pruned`` model's scores by task.
        runs: the scores of every seed of the entry.
        is_restoration: whether the entry acts on the pruned model; otherwise no fraction is given.

    Returns:
        ``accuracy``, ``accuracy_sd`` (None for one seed), ``accuracy_seeds``, ``accuracy_stderr`` of one seed's,
        ``accuracy_gain_interval``, ``accuracy_recovered`` (None where nothing was lost) and its interval (None where
        nothing may have been lost). The mean, the fraction recovered and its interval over :func:`tasks_made_worse`
        alone are ``worse_accuracy``, ``worse_recovered`` and ``worse_recovered_interval`` (None without such a task).
    """
    means = [mean_accuracy(run)[0] for run in runs]
    tasks, worse = list(unrestored["pruned"]), tasks_made_worse(unrestored)
    gain = stratified_interval(_gained([unrestored["pruned"]], runs, tasks))
    return {
        "accuracy": statistics.mean(means),
        "accuracy_sd": statistics.stdev(means) if len(means) > 1 else None,
        "accuracy_seeds": len(runs),
        "accuracy_stderr": mean_accuracy(runs[0])[1],
        "accuracy_gain_interval": None if gain is None else list(gain),
        **_fractions(unrestored, runs, tasks if is_restoration else [], "accuracy"),
        "worse_accuracy": statistics.mean(_mean_of(run, worse) for run in runs) if worse else None,
        **_fractions(unrestored, runs, worse if is_restoration else [], "worse"),
    }


def accuracy_difference(
    first: Sequence[Tasks], second: Sequence[Tasks], tasks: Sequence[str]
) -> tuple[float, tuple[float, float] | None]:
    """How far one entry's mean accuracy is above another's, with a 95 % interval over items drawn anew.

    Args:
        first: the scores of one entry, by seed, with ``items``.
    """
    gained = _gained(second, first, tasks)
    return statistics.fmean(statistics.fmean(items) for items in gained), stratified_interval(gained)


def _fractions(
    unrestored: Mapping[str, Tasks], runs: Sequence[Tasks], tasks: Sequence[str], name: str
) -> dict[str, Any]:
    """The fraction of these tasks' loss that was recovered, and its interval."""
    fraction, interval = None, None
    if tasks:
        dense, pruned = (_mean_of(unrestored[model], tasks) for model in ("dense", "pruned"))
        fraction = share_recovered(-dense, -pruned, -statistics.mean(_mean_of(run, tasks) for run in runs))
        before = unrestored["pruned"]
        interval = stratified_interval(_gained([before], runs, tasks), _gained([before], [unrestored["dense"]], tasks))
    return {f"{name}_recovered": fraction, f"{name}_recovered_interval": None if interval is None else list(interval)}


def _mean_of(scores: Tasks, tasks: Sequence[str]) -> float:
    return mean_accuracy({task: scores[task] for task in tasks})[0]


def _gained(before: Sequence[Tasks], after: Sequence[Tasks], tasks: Sequence[str]) -> list[list[float]]:
    """By task, how much more often each item is right than before, as means over seeds."""
    pairs = ((_right([run[task] for run in after]), _right([run[task] for run in before])) for task in tasks)
    return [[now - was for now, was in zip(*pair, strict=True)] for pair in pairs]


def _right(scores: Sequence[Mapping[str, Any]]) -> list[float]:
    """How often each item is right, as a mean over seeds."""
    items = np.array([list(score["items"]) for score in scores], dtype=np.float64)
    right: list[float] = items.mean(axis=0).tolist()
    return right
