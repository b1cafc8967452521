"""A comparison on a cluster: a job for each run, collected by the call that submitted them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import first_line
from lcc_lens.core.machine.cluster import JOBS, Cluster
from lcc_lens.core.ranges import Count
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.tables import Comparison

logger = logging.getLogger(__name__)


def compare_on_cluster(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    entries: Sequence[str],
    *,
    cluster: Cluster,
    seeds: Count = 3,
    config: CompareConfig | None = None,
) -> Comparison:
    """Train and measure every entry with every seed, each run in a job of its own; waits, and gives the results.

    Finished runs get no job, and each run is computed once (see
    :meth:`~lcc_lens.core.machine.cluster.Cluster.compute`). After an interruption the same call collects the jobs.

    Args:
        run: as the other arguments of :func:`~lcc_lens.evaluation.comparison.compare.compare`; on a disk that all
            machines share.
        cluster: where the jobs run.

    Raises:
        RequestError: see :func:`~lcc_lens.evaluation.comparison.compare.compare`; or submitit refuses the options.
        InterruptedRun: Ctrl-C; the jobs go on.
    """
    run = Path(run).resolve()
    cluster.check()
    settings: dict[str, Any] = {"seeds": seeds, "config": config}
    known = compare(dense, pruned, run, entries, **settings, deadline=-math.inf)  # refuses early, and begins the file
    names = [f"{Entry.parse(text).text} | {seed}" for seed in range(seeds) for text in entries]
    tasks = set(() if config is None else config.tasks)
    jobs = {
        name: (str(dense), str(pruned), run, tuple(entries), (number, len(names)), settings)
        for number, name in enumerate(names)
        if not _is_finished(known["cells"].get(name, {}), tasks)
    }
    for name, error in cluster.compute(run, compute_one, jobs).items():
        logger.warning("%s failed: %s; its output is in %s", name, first_line(error), run / JOBS)
    return compare(dense, pruned, run, entries, **settings, deadline=-math.inf)


def compute_one(
    dense: str, pruned: str, run: Path, entries: tuple[str, ...], part: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Compute one run of a comparison: what a job does."""
    compare(dense, pruned, run, entries, part=part, **settings)


def _is_finished(cell: Mapping[str, Any], tasks: set[str]) -> bool:
    """Whether a run has been measured on every task."""
    return "perplexity" in cell and cell["tasks"].keys() >= tasks
