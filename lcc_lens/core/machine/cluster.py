"""Jobs of a cluster, by submitit: each is computed once, and the call that submitted them waits for all."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lcc_lens.core.errors import InterruptedRun, RequestError, first_line
from lcc_lens.core.files import locked
from lcc_lens.core.fingerprint import fingerprint

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

    def check(self) -> None:
        """Refuse options that submitit does not take, and a cluster that is not there, before anything is written.

        Raises:
            RequestError: says what submitit says.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._executor(Path(folder))

    def compute(
        self, run: Path, function: Callable[..., object], jobs: Mapping[str, Sequence[Any]]
    ) -> dict[str, BaseException]:
        """Call a function once per job, each in a job of its own, and wait for all.

        A job holds a lock of its name, so one of another call waits for it and has to find the results in the run.
        After an interruption the jobs go on.

        Args:
            run: a folder on a disk that all machines share; submitit's files go into its ``cluster``.
            function: of a module, since it is called in another process.
            jobs: the function's arguments by the job's name.

        Returns:
            The errors of jobs that failed, by name.

        Raises:
            RequestError: see :meth:`check`.
            InterruptedRun: Ctrl-C; the jobs go on.
        """
        folder = run.resolve() / JOBS
        executor = self._executor(folder)
        submitted = {
            name: executor.submit(_alone, folder, name, function, tuple(arguments)) for name, arguments in jobs.items()
        }
        try:
            errors = {name: job.exception() for name, job in submitted.items()}
        except KeyboardInterrupt as stop:
            raise InterruptedRun("stopped waiting; the jobs go on, and the same call collects them") from stop
        return {name: error for name, error in errors.items() if error is not None}

    def _executor(self, folder: Path) -> Any:
        import submitit

        try:
            executor = submitit.AutoExecutor(folder, cluster=self.name)
            executor.update_parameters(**{"timeout_min": 240, "name": "lcc_lens", **self.options})
        except (NameError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(
                f"expected a cluster and options that submitit takes, got {first_line(error)!r}; correct the command"
            ) from error
        return executor


def _alone(folder: Path, name: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What a job does."""
    with locked(folder, f"job-{fingerprint(name)[:16]}"):
        function(*arguments)
