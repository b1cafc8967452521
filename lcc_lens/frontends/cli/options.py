"""What subcommands share: positional arguments, --quiet, and data by role."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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


def load_role(name: str, n: int, role: Any, seed: int) -> Any:
    """Examples of a role; all documents of a corpus, since they are cut into n blocks later."""
    from lcc_lens.data.datasets import load_data
    from lcc_lens.data.registry import named_kind

    is_corpus = Path(name).suffix == ".txt" or named_kind(name) == "text"
    return load_data(name, None if is_corpus else n, role=role, seed=seed)
