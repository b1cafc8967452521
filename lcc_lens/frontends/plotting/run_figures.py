"""Draws all figures that a run folder has the data for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lcc_lens.analysis.head_types.result import HeadTypes
from lcc_lens.analysis.lens.saved import LENS_FILE, load_lens
from lcc_lens.analysis.scan.result import Scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import require_made
from lcc_lens.core.heads import Head
from lcc_lens.core.outputs.folders import claim_files
from lcc_lens.core.ranges import ranged
from lcc_lens.core.reading import read_json_lines, reading
from lcc_lens.core.showing import Shown
from lcc_lens.evaluation.comparison.compare import COMPARISON
from lcc_lens.evaluation.comparison.results_file import read_comparison
from lcc_lens.evaluation.efficiency.report import read_report
from lcc_lens.frontends.plotting.causes import plot_causes, plot_head_types
from lcc_lens.frontends.plotting.comparisons import plot_comparison, plot_inference_cost, plot_tasks
from lcc_lens.frontends.plotting.components import plot_logit_gain, plot_promoted_tokens, plot_spectra
from lcc_lens.frontends.plotting.domains import plot_domains
from lcc_lens.frontends.plotting.head_maps import plot_loss_map, plot_selectors
from lcc_lens.frontends.plotting.labels import pair_label
from lcc_lens.frontends.plotting.recoveries import Along, plot_recovery, recovery_points
from lcc_lens.frontends.plotting.reports import plot_report
from lcc_lens.frontends.plotting.studies import plot_prompt_study
from lcc_lens.frontends.plotting.theme import with_source
from lcc_lens.frontends.plotting.training import plot_training
from lcc_lens.frontends.plotting.writing import write_html, write_images
from lcc_lens.frontends.run_contents import RunResults
from lcc_lens.prompting.study import STUDY, PromptStudy
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.run_folder import RUN_LOG
from lcc_lens.restoration.training.config import Step

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Format = Literal["html", "png", "svg", "pdf"]
FORMATS: tuple[Format, ...] = get_args(Format)
REPORT = "report.json"
_N_SPECTRA = 3  # heads with a line of their own


@dataclass(frozen=True, repr=False)
class Drawn(Shown):
    """The written files, and the missing figures by name, with what they lack and the command that makes it."""

    files: tuple[Path, ...]
    lacking: dict[str, str]

    def table(self) -> pd.DataFrame:
        """One row per figure: its name, the file or None, and what it lacks or None."""
        import pandas as pd

        rows: list[tuple[str, str | None, str | None]] = [(file.stem, str(file), None) for file in self.files]
        rows += [(name, None, what) for name, what in self.lacking.items()]
        return pd.DataFrame(rows, columns=["figure", "file", "lacking"])


@ranged
def draw_figures(run: str | Path, out: str | Path, *, formats: Sequence[Format] = FORMATS) -> Drawn:
    """Draw every figure that a run folder has the data for; runs no model.

    Args:
        run: a folder of ``scan``, ``restore`` or ``compare``; it may also hold ``report.json``
            (``lcc-lens report --out``) and ``lens.safetensors`` (:func:`~lcc_lens.analysis.lens.saved.save_lens`).
        out: the folder to write.
        formats: ``html``, or images, which need kaleido and a Chromium browser.

    Raises:
        RequestError: the run has the data for no figure, a format is unknown, a file is damaged, or a file of the
            folder would be replaced that is not a figure of this package's.
        LensError: images cannot be drawn; requested HTML pages have been written.

    Example:
        >>> draw_figures("runs/mine", "figures/mine").lacking  # doctest: +SKIP
        {'report': 'expected runs/mine/report.json, got none; make it with lcc-lens report --out'}
    """
    run, out = Path(run), Path(out)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise RequestError(f"expected formats among {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    figures, lacking = run_figures(run)
    if not figures:
        first = next(iter(lacking.values()))
        raise RequestError(f"expected a run with data for a figure in {run}, got none; {first}")
    paths = {out / f"{name}.{kind}": figure for name, figure in figures.items() for kind in formats}
    claim_files(out, [path.name for path in paths])
    for path, figure in paths.items():
        if path.suffix == ".html":
            write_html(figure, path, alone=False)
    try:
        write_images({path: figure for path, figure in paths.items() if path.suffix != ".html"})
    except LensError as error:
        there = f"; the HTML pages are in {out}" if "html" in formats else ""
        raise LensError(f"{error}{there}") from error
    return Drawn(tuple(paths), lacking)


def run_figures(run: str | Path) -> tuple[dict[str, go.Figure], dict[str, str]]:
    """The figures that a run folder has the data for, and what the others lack, both by name.

    Raises:
        RequestError: a file of the run is damaged, or they belong to different weights or restorations.
    """
    _require_whole(Path(run))
    figures: dict[str, go.Figure] = {}
    lacking: dict[str, str] = {}
    for name, draw in _FIGURES.items():
        try:
            figures[name] = draw(Path(run))
        except RequestError as error:
            lacking[name] = str(error)
    return figures, lacking


def _require_whole(run: Path) -> None:
    """Refuse damaged or mixed files; a missing one is listed with the figures that need it."""
    RunResults.read(run)
    readers: dict[str, Callable[[Path], object]] = {
        LENS_FILE: lambda file: load_lens(file.parent), RUN_LOG: _steps, COMPARISON: read_comparison,
        STUDY: PromptStudy.load,
    }  # fmt: skip
    for name, read in readers.items():
        if (run / name).exists():
            read(run / name)


def _steps(log: Path) -> list[Step]:
    return read_json_lines(log, Step, "restore again")


def _loss_map(run: Path) -> go.Figure:
    scan = Scan.load(run)
    heads = Restoration.load(run).heads if (run / RESTORATION_TENSORS).exists() else ()
    return plot_loss_map(scan, heads if len(heads) < scan.relative_loss.numel() else ())


def _spectra(run: Path) -> go.Figure:
    scan = Scan.load(run)
    loss = scan.relative_loss
    worst = loss.flatten().argsort(descending=True, stable=True)[:_N_SPECTRA].tolist()
    return plot_spectra(scan, [Head(*divmod(place, loss.shape[1])) for place in worst])


def _training(run: Path) -> go.Figure:
    record = Restoration.load(run).record
    log = require_made(run / RUN_LOG, "lcc-lens restore")
    pair = pair_label(record.dense, record.pruned_shown)
    learned = f"{record.n_examples} examples of {Path(record.data).name}"
    caption = f"{pair}. {record.method_shown}, {learned}, seed {record.seed}."
    return plot_training(_steps(log), record.losses.get("dense"), record.losses.get("pruned"), caption)


def _gain(run: Path) -> go.Figure:
    gains, _ = load_lens(run)
    if not gains:
        raise RequestError(f"expected logit gains in {run}, got none; save them with save_lens")
    return _of_scan(plot_logit_gain(gains[:4]), run)


def _tokens(run: Path) -> go.Figure:
    _, promoted = load_lens(run)
    if not promoted:
        raise RequestError(f"expected promoted tokens in {run}, got none; save them with save_lens")
    return _of_scan(plot_promoted_tokens(promoted[0]), run)


def _of_scan(figure: go.Figure, run: Path) -> go.Figure:
    """The figure with the pair and seed of the run's scan in its caption."""
    record = Scan.load(run).record
    pair = pair_label(record.dense, record.pruned, record.sparsity, record.pattern)
    return with_source(figure, f"{pair}. {Path(record.data).name}, seed {record.seed}.")


def _along(along: Along) -> Callable[[Path], go.Figure]:
    """Draws recovery over the comparisons in a run and in the folders below it."""

    def draw(run: Path) -> go.Figure:
        files = sorted([*run.glob(COMPARISON), *run.glob(f"*/{COMPARISON}")])
        files = files or [require_made(run / COMPARISON, "lcc-lens compare")]
        n = len(files)
        caption = f"{n} comparison{'s' * (n > 1)}; intervals: blocks of text drawn anew."
        with reading(run):
            return plot_recovery(recovery_points([read_comparison(file) for file in files], along), along, caption)

    return draw


def _of_comparison(plot: Callable[[dict[str, Any]], go.Figure]) -> Callable[[Path], go.Figure]:
    """Draws the comparison of a run."""
    return _of_file(COMPARISON, "lcc-lens compare", lambda file: plot(read_comparison(file)))


def _of_file(name: str, command: str, draw: Callable[[Path], go.Figure]) -> Callable[[Path], go.Figure]:
    """Draws a file of a run; what the command wrote but another program changed is refused in one line."""

    def draw_run(run: Path) -> go.Figure:
        file = require_made(run / name, command)
        with reading(file, f"make it again with {command}"):
            return draw(file)

    return draw_run


_FIGURES: dict[str, Callable[[Path], go.Figure]] = {
    "loss_map": _loss_map,
    "selectors": lambda run: plot_selectors(Scan.load(run)),
    "spectra": _spectra,
    "causes": lambda run: plot_causes(Scan.load(run)),
    "head_types": lambda run: plot_head_types(HeadTypes.load(run)),
    "logit_gain": _gain,
    "promoted_tokens": _tokens,
    "training": _training,
    "comparison": _of_comparison(plot_comparison),
    "domains": _of_comparison(plot_domains),
    "tasks": _of_comparison(plot_tasks),
    "recovery_by_heads": _along("heads"),
    "recovery_by_examples": _along("examples"),
    "recovery_by_learning_rate": _along("learning rate"),
    "prompts": lambda run: plot_prompt_study(PromptStudy.load(run / STUDY)),
    "inference_cost": _of_comparison(plot_inference_cost),
    "report": _of_file(REPORT, f"lcc-lens report --out RUN/{REPORT}", lambda file: plot_report(read_report(file))),
}
