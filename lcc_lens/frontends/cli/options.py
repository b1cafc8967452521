"""What subcommands share: positional arguments, --quiet and --device-map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
DenseModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DENSE")]
PrunedModel = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRUNED")]


@dataclass(frozen=True, kw_only=True)
class Common:
    quiet: bool = False
    """No progress bars and no notes; errors and results still show."""


@dataclass(frozen=True, kw_only=True)
class Placed(Common):
    device_map: Literal["auto", "disk"] | None = None
    """For models larger than a device: spread over all GPUs, memory and disk as it fits (auto), or with every decoder
    layer on disk until its turn (disk)."""
