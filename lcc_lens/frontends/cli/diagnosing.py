"""The subcommand doctor: what works for a model, and on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import tyro

from lcc_lens.core.errors import LensError
from lcc_lens.frontends.cli.options import Switch, Tabled
from lcc_lens.frontends.cli.show import show_json, show_table


@dataclass(frozen=True, kw_only=True)
class Doctor(Tabled):
    """See whether a model loads as it should, what works for it, and what this machine offers."""

    example: ClassVar[str] = "smollm2"

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """smollm2, a directory, a .gguf file, or a hub id (owner/name@revision)."""

    json: Switch = False
    """Print one JSON object in place of the tables, for a bug report."""

    def execute(self) -> None:
        from lcc_lens.evaluation.doctor import examine

        diagnosis = examine(self.model)
        if self.json:
            show_json(asdict(diagnosis))
        else:
            show_table(f"model: {diagnosis.reference}", ["", ""], [finding.row for finding in diagnosis.model])
            show_table("machine", ["", ""], [finding.row for finding in diagnosis.machine])
        self.write(diagnosis.table)
        if not diagnosis.is_sound:
            mark = "failed" if self.json else "✗"
            raise LensError(f"expected a model that loads and passes its checks, got {self.model}; see {mark} above")
