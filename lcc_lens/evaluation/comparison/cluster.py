"""A comparison on a cluster, by submitit: a job for each run, collected by the call that submitted them."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lcc_lens.core.errors import InterruptedRun, RequestError, first_line
from lcc_lens.core.files import locked
from lcc_lens.core.ranges import Count
from lcc_lens.evaluation.comparison.compare import compare
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.tables import Comparison

logger = logging.getLogger(__name__)
ClusterName = Literal["slurm", "local"]
#: Where submitit keeps what it hands to its jobs, and their output.
JOBS = "cluster"


@dataclass(frozen=True)
class Cluster:
    """Where jobs run: SLURM, or processes of this machine (``local``); ``options`` are submitit's parameters.

    Example:
        >>> Cluster("slurm", {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 240}).name
        'slurm'
    """

    name: ClusterName
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("submitit") is None:
            raise RequestError("expected the package submitit for a cluster, got none; pip install 'lcc-lens[cluster]'")

    @classmethod
    def parse(cls, name: ClusterName, options: Sequence[str] = ()) -> Cluster:
        """Read options written as ``name=value``; values of digits are numbers."""
        pairs = [option.partition("=") for option in options]
        if wrong := [option for option, (key, equals, _) in zip(options, pairs, strict=True) if not (key and equals)]:
            raise RequestError(f"expected options name=value such as timeout_min=240, got {wrong[0]!r}; correct it")
        return cls(name, {key: int(value) if value.isdecimal() else value for key, _, value in pairs})


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

    Finished runs get no job. Each run is computed once: a job holds the run's lock, so another one of a second call
    waits for it and then finds the results. After an interruption the jobs go on, and the same call collects them.

    Args:
        run: as the other arguments of :func:`~lcc_lens.evaluation.comparison.compare.compare`; on a disk that all
            machines share.
        cluster: where the jobs run.

    Raises:
        RequestError: see :func:`~lcc_lens.evaluation.comparison.compare.compare`; or submitit refuses the options.
        InterruptedRun: Ctrl-C; the jobs go on.
    """
    import submitit

    run = Path(run).resolve()
    settings: dict[str, Any] = {"seeds": seeds, "config": config}
    known = compare(dense, pruned, run, entries, **settings, deadline=-math.inf)  # refuses early, and begins the file
    names = [f"{Entry.parse(text).text} | {seed}" for seed in range(seeds) for text in entries]
    tasks = set(() if config is None else config.tasks)
    missing = [number for number, name in enumerate(names) if not _is_finished(known["cells"].get(name, {}), tasks)]
    executor = submitit.AutoExecutor(run / JOBS, cluster=cluster.name)
    try:
        executor.update_parameters(**{"timeout_min": 240, "name": "lcc_lens", **cluster.options})
    except (NameError, TypeError, ValueError) as error:
        raise RequestError(f"expected options that submitit takes, got a refusal ({first_line(error)})") from error
    jobs = [
        executor.submit(compute_one, str(dense), str(pruned), run, tuple(entries), (number, len(names)), settings)
        for number in missing
    ]
    try:
        for number, job in zip(missing, jobs, strict=True):
            if (failure := job.exception()) is not None:
                logger.warning("%s failed: %s; its output is in %s", names[number], first_line(failure), run / JOBS)
    except KeyboardInterrupt as stop:
        raise InterruptedRun("stopped waiting; the jobs go on, and the same call collects them") from stop
    return compare(dense, pruned, run, entries, **settings, deadline=-math.inf)


def compute_one(
    dense: str, pruned: str, run: Path, entries: tuple[str, ...], part: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Compute one run of a comparison, alone: what a job does."""
    with locked(run / JOBS, f"run-{part[0]}-of-{part[1]}"):
        compare(dense, pruned, run, entries, part=part, **settings)


def _is_finished(cell: Mapping[str, Any], tasks: set[str]) -> bool:
    """Whether a run has been measured on every task."""
    return "perplexity" in cell and cell["tasks"].keys() >= tasks
