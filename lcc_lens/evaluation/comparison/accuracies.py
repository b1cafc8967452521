"""Zero-shot accuracies of a comparison: task by task and their mean, paired by item with the pruned and dense model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcc_lens.core.metrics import bootstrap_interval, share_recovered, stratified_interval

Tasks = Mapping[str, Mapping[str, Any]]


def task_rows(pruned: Tasks, cells: Sequence[Tasks]) -> dict[str, dict[str, Any]]:
    """By task the accuracy of one entry's cells, and the interval of its gain over the pruned model.

    Args:
        pruned: the pruned model's scores by task, with ``items``.
        cells: those of every seed.
    """
    rows = {}
    for task, before in pruned.items():
        scores = [cell[task] for cell in cells]
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
    """One model's accuracy, every task counting alike, and its standard error from the tasks' own."""
    accuracies, errors = [s["acc"] for s in scores.values()], [s["stderr"] for s in scores.values()]
    return statistics.mean(accuracies), math.hypot(*errors) / len(errors)


def tasks_made_worse(bare: Mapping[str, Tasks]) -> list[str]:
    """The tasks in which the dense model is right more often than the pruned one.

    A small model may answer some task at chance, and pruning may make it better there; a mean with such a task does not
    say what was lost.
    """
    return [task for task, score in bare["pruned"].items() if bare["dense"][task]["acc"] > score["acc"]]


def mean_rows(bare: Mapping[str, Tasks], cells: Sequence[Tasks], *, is_restoration: bool = True) -> dict[str, Any]:
    r"""The mean accuracy over tasks of one entry, what it gained, and the share of the loss that it recovered.

    With $\bar d, \bar p, \bar r$ the mean accuracies of dense, pruned and restored (the mean over seeds), the share is
    $(\bar r - \bar p) / (\bar d - \bar p)$. The intervals (95 %) come from drawing items anew within each task, those
    of all models alike; they say nothing about the spread over seeds, which is ``accuracy_sd``.

    Args:
        bare: the ``dense`` and the ``pruned`` model's scores by task, with ``items``.
        cells: those of every seed of the entry.
        is_restoration: whether the entry acts on the pruned model, so that there is a share.

    Returns:
        ``accuracy``, ``accuracy_sd`` (None for one seed), ``accuracy_seeds``, ``accuracy_stderr`` of one seed's,
        ``accuracy_gain_interval``, ``accuracy_recovered`` (None where nothing was lost) and its interval (None where
        nothing may have been lost); of :func:`tasks_made_worse` alone the mean, the share recovered and its interval as
        ``worse_accuracy``, ``worse_recovered`` and ``worse_recovered_interval`` (None where there is no such task).
    """
    means = [mean_accuracy(cell)[0] for cell in cells]
    tasks, worse = list(bare["pruned"]), tasks_made_worse(bare)
    gain = stratified_interval(_gained([bare["pruned"]], cells, tasks))
    return {
        "accuracy": statistics.mean(means),
        "accuracy_sd": statistics.stdev(means) if len(means) > 1 else None,
        "accuracy_seeds": len(cells),
        "accuracy_stderr": mean_accuracy(cells[0])[1],
        "accuracy_gain_interval": None if gain is None else list(gain),
        **_shares(bare, cells, tasks if is_restoration else [], "accuracy"),
        "worse_accuracy": statistics.mean(_mean_of(cell, worse) for cell in cells) if worse else None,
        **_shares(bare, cells, worse if is_restoration else [], "worse"),
    }


def accuracy_difference(
    first: Sequence[Tasks], second: Sequence[Tasks], tasks: Sequence[str]
) -> tuple[float, tuple[float, float] | None]:
    """How far one entry's mean accuracy over some tasks is above another's, and the interval (95 %, items drawn anew).

    Args:
        first: the cells of one, by seed, with ``items``.
        second: those of the other.
        tasks: every one counts alike.
    """
    gained = _gained(second, first, tasks)
    return statistics.fmean(statistics.fmean(items) for items in gained), stratified_interval(gained)


def _shares(bare: Mapping[str, Tasks], cells: Sequence[Tasks], tasks: Sequence[str], name: str) -> dict[str, Any]:
    """The share of these tasks' loss that was recovered, and its interval."""
    share, interval = None, None
    if tasks:
        dense, pruned = (_mean_of(bare[model], tasks) for model in ("dense", "pruned"))
        share = share_recovered(-dense, -pruned, -statistics.mean(_mean_of(cell, tasks) for cell in cells))
        interval = stratified_interval(
            _gained([bare["pruned"]], cells, tasks), _gained([bare["pruned"]], [bare["dense"]], tasks)
        )
    return {f"{name}_recovered": share, f"{name}_recovered_interval": None if interval is None else list(interval)}


def _mean_of(scores: Tasks, tasks: Sequence[str]) -> float:
    return mean_accuracy({task: scores[task] for task in tasks})[0]


def _gained(before: Sequence[Tasks], after: Sequence[Tasks], tasks: Sequence[str]) -> list[list[float]]:
    """By task, how much more often every item was right, over seeds."""
    pairs = ((_right([one[task] for one in after]), _right([one[task] for one in before])) for task in tasks)
    return [[now - was for now, was in zip(*pair, strict=True)] for pair in pairs]


def _right(scores: Sequence[Mapping[str, Any]]) -> list[float]:
    """How often each item was right, over seeds."""
    items = np.array([np.frombuffer(score["items"].encode("ascii"), dtype=np.uint8) for score in scores])
    right: list[float] = (items == ord("1")).mean(axis=0).tolist()
    return right
