"""The subcommand demo: the whole method on the embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lcc_lens.core.ranges import Seed
from lcc_lens.frontends.cli.options import Tabled
from lcc_lens.frontends.cli.show import console, show_loss_map, show_panels, show_results, show_table

if TYPE_CHECKING:
    from lcc_lens.analysis.scan.scan import Scan


@dataclass(frozen=True, kw_only=True)
class Demo(Tabled):
    """Prune the embedded model, see what its heads lost, restore it, export it, and open a page."""

    example: ClassVar[str] = "--folder runs/demo"

    folder: Path = Path("runs/demo")
    """Where everything is written."""
    seed: Seed = 0
    """Seed of the draw of data."""

    def execute(self) -> None:
        from lcc_lens.evaluation.evaluate import Evaluation
        from lcc_lens.frontends.demo import DemoConfig, run_demo

        stages = iter(range(1, 10))

        def stage(title: str) -> None:
            if not self.quiet:
                console().print(f"{next(stages)}/7 {title}", style="bold")

        def first_picture(found: Scan, run: Path) -> None:
            if not self.quiet:
                console().print(f"what each head lost: {show_loss_map(found, run)}", soft_wrap=True)

        result = run_demo(DemoConfig(folder=self.folder, seed=self.seed), stage=stage, on_scan=first_picture)
        show_results(
            result.results["models"],
            "dense, pruned, and restored by lcc (a constant per head) and by best, on held-out data",
        )
        show_panels({"lcc": result.results["panel"], "best": result.results["panel_best"]})
        shares = {name: value for name, value in result.results["share_recovered"].items() if value is not None}
        show_table(
            "lost log-likelihood recovered by lcc", ["data", "recovered"],
            [[name, f"{value:.1%}"] for name, value in shares.items()],
        )  # fmt: skip
        self.write(Evaluation(result.results).table)
        console().print(f"models {result.restored}, {result.best}", soft_wrap=True)
        console().print(f"page   {result.page}", soft_wrap=True)
