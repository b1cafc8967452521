"""Subcommands that show a run: explore and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.frontends.cli.options import Common, Maybe, Out, RunPath, Tabled
from lcc_lens.frontends.cli.show import console, show_drawn


@dataclass(frozen=True, kw_only=True)
class Explore(Common):
    """Write a page to explore a run by layer and head; it opens in any browser with no network."""

    example: ClassVar[str] = "runs/mine"

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN2]", help_behavior_hint="(required)")
    ]
    """A run directory, and a second one of the same dense model to compare with."""
    out: Maybe[Path] = None
    """The page to write (explorer.html in RUN if not given)."""
    results: Maybe[Path] = None
    """A results.json of lcc-lens eval to show as a table."""
    prompts: tuple[str, ...] = ()
    """Texts of your own: their next tokens, and what changed in every head on them."""
    docs: Maybe[str] = None
    """Address or folder of the built documentation, which the page then links to."""
    tokens: bool = True
    """Load the models, once, for promoted tokens and attention patterns; what they give is kept in RUN."""

    def execute(self) -> None:
        from lcc_lens.frontends.explorer.page import explore

        if len(self.runs) not in (1, 2):
            raise RequestError(f"expected one run, or two to compare, got {len(self.runs)}; name RUN or RUN RUN2")
        other = self.runs[1] if len(self.runs) == 2 else None
        page = explore(
            self.runs[0], self.out, other=other, results=self.results, prompts=self.prompts, docs=self.docs,
            read_model=self.tokens,
        )  # fmt: skip
        console().print(f"page  {page}", soft_wrap=True)


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
