"""Subcommands that measure models as they are: eval and report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from lcc_lens.core.errors import InterruptedRun, LensError, RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.ranges import Count, Length
from lcc_lens.core.showing import Record, require_table_file, write_table
from lcc_lens.frontends.cli.options import Common, Maybe
from lcc_lens.frontends.cli.show import console, show_report, show_results

if TYPE_CHECKING:
    from lcc_lens.evaluation.evaluate import Evaluation

Models = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint="(required)"),
]


@dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Measure models side by side."""

    example: ClassVar[str] = "smollm2 out/wanda50 out/restored --tasks boolq arc_easy --limit 200"

    models: Models
    """Model references."""
    tasks: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="TASK [TASK ...]")] = None
    """Text (perplexity), instructions (response loss), lm-eval tasks (accuracy); wikitext boolq arc_easy by default."""
    limit: Maybe[Count] = None
    """Blocks, responses or items per task at most."""
    length: Maybe[Length] = None
    """Tokens per block of text (512, or the models' context if shorter)."""
    out: Maybe[Path] = None
    """A file to write: results.json, or .csv for the table alone."""
    add_to: Maybe[Path] = None
    """One of the models, an export, whose model card and .eval_results get the scores."""

    lm_eval_yaml: Maybe[Path] = None
    """A folder for a YAML per model, by which lm-eval itself gives the same accuracies (lm-eval run --config FILE)."""

    def execute(self) -> None:
        from lcc_lens.data.checks import or_mix
        from lcc_lens.evaluation.evaluate import evaluate, unique_names
        from lcc_lens.evaluation.lm_eval_config import require_lm_eval_configs, write_lm_eval_configs
        from lcc_lens.exporters.eval_results import add_evaluation, require_export

        _require(self.out, [*self.models, *(self.tasks or ())])
        names = dict(zip(map(Path, self.models), unique_names(self.models), strict=True))
        if self.add_to is not None and self.add_to not in names:
            raise RequestError(f"expected --add-to to name one of the models, got {self.add_to}; evaluate it, too")
        tasks = self.tasks
        if tasks is None:
            tasks = (*or_mix("wikitext", instead="wikipedia"), "boolq", "arc_easy")
        if self.add_to is not None:
            require_export(self.add_to, list(names.values()), names[self.add_to])
        if self.lm_eval_yaml is not None:
            require_lm_eval_configs(self.lm_eval_yaml, self.models, tasks)
        measured: list[Evaluation] = []
        try:
            results = evaluate(self.models, tasks, limit=self.limit, length=self.length, on_task=measured.append)
        except (KeyboardInterrupt, Exception) as stop:
            if measured:
                self._give_unfinished(measured[-1], stop)
            raise
        with self._given(results):
            if self.add_to is not None:
                add_evaluation(self.add_to, results, names[self.add_to])
            if self.lm_eval_yaml is not None:
                write_lm_eval_configs(self.lm_eval_yaml, self.models, tasks, limit=self.limit)

    @contextmanager
    def _given(self, results: Evaluation) -> Iterator[None]:
        """Write the results, and show them at the end, even where the disk is full by then."""
        try:
            _write(self.out, results)
            yield
        finally:
            show_results(results["models"], str(self.out) if self.out else "results")

    def _give_unfinished(self, results: Evaluation, stop: BaseException) -> None:
        """Write and show what was measured until a failure or Ctrl-C, and say what is missing."""
        with self._given(results):
            pass
        missing = "; ".join(f"{name} on {', '.join(tasks)}" for name, tasks in results["missing"].items())
        console().print(f"not measured: {missing}", soft_wrap=True)
        if isinstance(stop, KeyboardInterrupt):
            raise InterruptedRun(
                f"interrupted; what was measured is {f'in {self.out}' if self.out else 'above'}"
            ) from stop
        if isinstance(stop, RequestError):  # results are written by now
            raise LensError(str(stop)) from stop


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How the models are timed."""

    latency: bool = True
    """Time the models, all of them in memory at once."""
    repeats: Count = 15
    """Timed rounds."""
    prompt_tokens: Count = 256
    """Tokens of the timed forward pass."""
    new_tokens: Count = 24
    """Tokens generated one by one."""


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Measure how sparse, how large and how fast models really are, and whether they load."""

    example: ClassVar[str] = "smollm2 out/wanda50 out/restored --out report.json"

    models: Models
    """Model references; the first, best the dense one, is compared with the others."""
    out: Maybe[Path] = None
    """A file to write: report.json, or .csv for the table alone."""
    timing: Timing = Timing()

    def execute(self) -> None:
        from lcc_lens.evaluation.efficiency.report import report

        _require(self.out, self.models)
        measured = report(self.models, **asdict(self.timing))
        try:
            _write(self.out, measured)
        finally:
            show_report(measured, str(self.out) if self.out else "report")


def _require(out: Path | None, inputs: Sequence[str]) -> None:
    """Refuse a file of another kind, or one that cannot be written, before anything runs."""
    if out is not None:
        require_table_file(out, map(Path, inputs))


def _write(out: Path | None, results: Record) -> None:
    """Write all results as JSON, or their table as CSV."""
    if out is not None and out.suffix == ".json":
        write_json(out, results)
    elif out is not None:
        write_table(out, results.table())
