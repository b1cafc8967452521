"""The subcommand figures: every figure that a run has the data for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lcc_lens.frontends.cli.options import Out, RunPath, Tabled
from lcc_lens.frontends.cli.show import show_drawn


@dataclass(frozen=True, kw_only=True)
class Figures(Tabled):
    """Draw every figure that a run has the data for, and name what would produce the others."""

    example: ClassVar[str] = "runs/mine figures/mine --formats png html"

    run: RunPath
    """A directory of scan, restore or compare."""
    out: Out
    """The folder to write."""
    formats: tuple[Literal["html", "png", "svg", "pdf"], ...] = ("html", "png", "svg", "pdf")
    """HTML opens everywhere; images need a Chromium browser."""

    def execute(self) -> None:
        from lcc_lens.frontends.plotting.run_figures import draw_figures

        drawn = draw_figures(self.run, self.out, formats=self.formats)
        show_drawn(drawn, self.out)
        self.write(drawn.table)
