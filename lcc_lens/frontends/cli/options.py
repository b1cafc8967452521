"""What subcommands share: positional arguments, --quiet, and the options that spare memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.core.showing import write_table

if TYPE_CHECKING:
    import pandas as pd

    from lcc_lens.core.machine.cluster import Cluster

Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
DenseModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DENSE")]
PrunedModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRUNED")]
#: A switch that is off unless it is given; one that is on by default is a plain ``bool``, shown as ``--x, --no-x``.
Switch = tyro.conf.FlagCreatePairsOff[bool]

_T = TypeVar("_T")
#: An option that need not be given; its help says what holds then.
Maybe = Annotated[_T | None, tyro.conf.arg(help_behavior_hint="")]
SELECTOR_HELP = (
    "Score that heads are chosen by: attribution (if not given), patching, probe (the paper's), interaction, mse, kl, "
    "gradient, own or random."
)


@dataclass(frozen=True, kw_only=True)
class Common:
    """A subcommand: its fields are its options, a field that is a dataclass is a group of them in the help."""

    example: ClassVar[str]
    """A command line that the help ends with."""

    quiet: Switch = False
    """No progress bars and no notes; errors and results still show."""


@dataclass(frozen=True, kw_only=True)
class Tabled(Common):
    """A subcommand that prints a table, and writes its figures where it is told to."""

    table: Annotated[Maybe[Path], tyro.conf.arg(name="out", metavar="TABLE")] = None
    """Also write the table to this file, .csv or .json."""

    def write(self, table: Callable[[], pd.DataFrame]) -> None:
        """Write a table that is made if a file was named."""
        if self.table is not None:
            write_table(self.table, table())


@dataclass(frozen=True, kw_only=True)
class Placement:
    """For models larger than the memory."""

    device_map: Maybe[Literal["auto", "disk"]] = None
    """Spread a model over all GPUs, memory and disk (auto), or keep each layer on disk until its turn (disk)."""


@dataclass(frozen=True, kw_only=True)
class Memory(Placement):
    """For models larger than the memory."""

    one_at_a_time: Switch = False
    """Hold one model in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class ClusterJobs:
    """Every run as a job of a cluster, by submitit."""

    cluster: Maybe[Literal["slurm", "local"]] = None
    """Submit a job for each run, wait, and collect; the same command goes on after an interruption."""
    cluster_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE [NAME=VALUE ...]")] = ()
    """submitit's parameters of a job, such as slurm_partition=gpu gpus_per_node=1 timeout_min=240."""

    def chosen(self) -> Cluster | None:
        """The cluster that was asked for.

        Raises:
            RequestError: options of none.
        """
        from lcc_lens.core.machine.cluster import Cluster

        if self.cluster is None and self.cluster_options:
            raise RequestError(
                f"expected --cluster with its options, got {self.cluster_options[0]} alone; name slurm or local"
            )
        return None if self.cluster is None else Cluster.parse(self.cluster, self.cluster_options)


def option(name: str) -> str:
    """How the command line calls a field."""
    return f"--{name.replace('_', '-')}"


def device_map_of(command: Any) -> Literal["auto", "disk"] | None:
    """The device map that a command asks for."""
    memory = getattr(command, "memory", None)
    return memory.device_map if isinstance(memory, Placement) else None
