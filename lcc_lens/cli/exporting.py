"""The subcommand export: a restoration as a plain Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass

from lcc_lens.cli.options import Common, Out, RunPath
from lcc_lens.show import show_table


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Fold a restoration into a plain Hugging Face directory and verify it."""

    run: RunPath
    """The run directory with the restoration."""
    out: Out
    """The directory to write."""
    pruned: str | None = None
    """Where the pruned model lies now (where the run found it, if not given)."""
    overwrite: bool = False
    """Replace an existing directory."""

    def execute(self) -> None:
        from lcc_lens.export import export
        from lcc_lens.restoration import Restoration

        restoration = Restoration.load(self.run)
        report = export(restoration, self.pruned or restoration.record.pruned, self.out, overwrite=self.overwrite)
        rows = [
            ["biases added", str(len(report.added))],
            ["tensors changed", str(len(report.changed))],
            ["tensors bit-identical", str(report.identical_tensors)],
            ["zeros in matrices", f"{report.zeros:,}"],
            ["largest logit difference to the hooked model", f"{report.logit_difference:.2g}"],
            ["largest effect on the logits", f"{report.logit_effect:.2g}"],
        ]
        show_table(f"exported and verified: {self.out}", ["", ""], rows)
