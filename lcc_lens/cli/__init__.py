"""The command line: one dataclass a subcommand, a module for each group of them; prints, as only ``show`` does."""

from __future__ import annotations

from lcc_lens.cli.main import run

__all__ = ["run"]
