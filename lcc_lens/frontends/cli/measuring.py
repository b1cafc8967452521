"""Subcommands that measure models as they are: eval and report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.frontends.cli.options import Common
from lcc_lens.frontends.cli.show import show_report, show_results


@dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Measure models side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model references."""
    tasks: tuple[str, ...] = ("wikitext", "boolq", "arc_easy")
    """Text (perplexity), instructions (response loss), or lm-eval's tasks (accuracy)."""
    limit: int | None = None
    """Blocks, responses or items per task at most."""
    length: int = 512
    """Tokens per block of text."""
    out: Path | None = None
    """A results.json to write."""

    def execute(self) -> None:
        from lcc_lens.core.files import write_json
        from lcc_lens.evaluation.evaluate import evaluate

        if not self.models:
            raise RequestError("expected at least one model, got none; name some")
        results = evaluate(self.models, self.tasks, limit=self.limit, length=self.length)
        if self.out is not None:
            write_json(self.out, results)
        show_results(results["models"], str(self.out) if self.out else "results")


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """See whether models are really as sparse as they say, whether they are faster, and whether they load."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model references; the first, best the dense one, is compared with the others."""
    latency: bool = True
    """Time the models, all of them in memory at once."""
    repeats: int = 15
    """Timed rounds."""
    prompt_tokens: int = 256
    """Tokens of the timed forward pass."""
    new_tokens: int = 24
    """Tokens generated one by one."""
    out: Path | None = None
    """A report.json to write."""

    def execute(self) -> None:
        from lcc_lens.core.files import write_json
        from lcc_lens.evaluation.efficiency.report import report

        if self.out is not None and self.out.is_dir():
            raise RequestError(f"expected a file to write the report to, got the folder {self.out}; name a .json file")
        measured = report(
            self.models, latency=self.latency, repeats=self.repeats, prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )  # fmt: skip
        if self.out is not None:
            write_json(self.out, measured)
        show_report(measured, str(self.out) if self.out else "report")
