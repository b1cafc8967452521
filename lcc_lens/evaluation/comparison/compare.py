"""Compare methods, baselines and controls on one pruned model, trained and measured alike over several seeds."""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import InterruptedRun, LensError, RequestError, first_line
from lcc_lens.core.files import locked
from lcc_lens.core.metrics import bootstrap_interval, share_recovered
from lcc_lens.core.ranges import Count, ranged
from lcc_lens.data.checks import MIX, check_data
from lcc_lens.data.panel import panel_labels
from lcc_lens.data.registry import domains as domains_of
from lcc_lens.evaluation.comparison.accuracies import mean_rows, task_rows
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.costs import served_as
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.results_file import ComparisonFile, read_comparison
from lcc_lens.evaluation.comparison.runner import Runner
from lcc_lens.evaluation.comparison.tables import Comparison
from lcc_lens.evaluation.evaluate import check_tasks
from lcc_lens.evaluation.panel import mean_and_worst
from lcc_lens.models.architecture.context import context_of
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.loading.references import resolve

logger = logging.getLogger(__name__)
COMPARISON = "comparison.json"
MEASURES = ("perplexity", "log_perplexity", "kl", "response_loss")
COSTS = ("n_trained", "n_added", "zeros_kept", "training_seconds", "memory_mib", "mendable_share")


@ranged
def compare(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    entries: Sequence[str],
    *,
    seeds: Count = 3,
    config: CompareConfig | None = None,
    out: str | Path | None = None,
    deadline: float = math.inf,
    part: tuple[int, int] = (0, 1),
    on_cell: Callable[[str, dict[str, Any]], None] | None = None,
) -> Comparison:
    """Train and measure every entry with every seed; finished runs are kept, failed ones are reported and tried again.

    A run is one entry with one seed, which draws the examples, their order and the initial values. Trained parameters
    are kept in ``run/trained``: a later call with more tasks measures finished runs on those alone.
    The results are those of :class:`~lcc_lens.evaluation.comparison.measures.Measures` and of
    :func:`~lcc_lens.evaluation.comparison.costs.merging_costs`, the number of trained parameters, and the training's
    seconds and memory; of a mean shift also the fraction of the squared difference that is constant.

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        run: a folder for the scans, the refitted model and ``comparison.json``.
        entries: what to compare; see :class:`Entry`; ``seeds``: how many.
        config: what all runs share.
        out: the file for the results and their :func:`summary`; ``comparison.json`` in ``run`` if not given.
        deadline: start no run after this value of ``time.monotonic()``.
        part: ``(i, n)`` computes every n-th run from the i-th, counted from 0; the last of n processes times inference.
        on_cell: called with the name and results of every new run.

    Raises:
        RequestError: an unknown entry, files of another comparison, or too few held-out data.
        InterruptedRun: Ctrl-C; finished runs are kept.
    """
    parsed, config, run = [Entry.parse(text) for text in entries], config or CompareConfig(), Path(run)
    check_comparison(parsed, config, part=part, seeds=seeds)
    config = _fitting(config, Path(out or run / COMPARISON), pruned)
    runner = Runner(dense, pruned, run, config)
    runs = {f"{entry.text} | {seed}": (entry, seed) for seed in range(seeds) for entry in parsed}
    kept = ComparisonFile(Path(out or run / COMPARISON), run, runner.models.hashes, config, [*runs])
    runner.models.check_refit(any(entry.on_refit for entry in parsed))
    for name in [*runs][part[0] :: part[1]]:
        before = kept.results["cells"].get(name, {})
        if "perplexity" in before and before["tasks"].keys() >= {*config.tasks}:
            continue
        if time.monotonic() > deadline:
            return _summarised(kept)
        runner.require_data()
        kept.results["cells"][name] = _run(runner, *runs[name], kept, before)
        _summarised(kept, new_run=name)
        if on_cell is not None:
            on_cell(name, kept.results["cells"][name])
    kept.refresh()
    is_last = runs.keys() <= kept.results["cells"].keys()  # no other process disturbs the timing
    if config.speed_rounds and is_last and _is_measured(kept.results) and time.monotonic() <= deadline:
        runner.time(parsed, kept.results)
        kept.keep(own=["inference"])
    return _summarised(kept)


def _is_measured(results: Mapping[str, Any]) -> bool:
    """Whether any run succeeded."""
    return any("perplexity" in run for run in results["cells"].values())


def require_a_measured_run(summary: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the summary of a comparison in which every run failed.

    Raises:
        LensError: names the first error.
    """
    errors = [f"{row['entry']}: {error}" for row in summary for error in row["errors"]]
    if errors and not any(row["seeds"] for row in summary):
        raise LensError(f"expected a run that succeeds, got {len(errors)} that failed; the first: {errors[0]}")


def _fitting(config: CompareConfig, file: Path, pruned: str | Path) -> CompareConfig:
    """The settings with lengths within the context; a comparison that began with longer ones goes on with those.

    So does one whose refits were calibrated on data that are replaced by the mix here.
    """
    before = read_comparison(file).get("settings", {}) if file.exists() else {}
    if config.refit_data == (MIX,) and before.get("refit_data"):
        config = replace(config, refit_data=tuple(before["refit_data"]))
    if all(before.get(name) == getattr(config, name) for name in ("max_length", "block_length")):
        return config
    return config.fitting(context_of(read_config(resolve(pruned))))


def check_comparison(
    entries: Sequence[Entry], config: CompareConfig, *, part: tuple[int, int] = (0, 1), seeds: int = 1
) -> None:
    """Refuse entries, settings, data and packages that cannot serve, before any model is loaded.

    Raises:
        RequestError: says which, and what to do.
    """
    if not entries:
        raise RequestError("expected something to compare, got no entry; name methods")
    if config.heads >= 1 and any(entry.control == "random-heads" for entry in entries):
        raise RequestError("expected a share of heads below 1 for random heads, got 1; lower it")
    if not 0 <= part[0] < part[1]:
        raise RequestError(f"expected a part (i, n) with i of 0 to n - 1, got {part}; correct it")
    for entry in entries:
        for method in entry.spec.parts if entry.spec else ():
            method.require_package(entry.text)
    refits = any(entry.on_refit for entry in entries)
    check_data([config.data, *config.texts, *(config.refit_data if refits else ())])
    if config.tasks:
        check_tasks(config.tasks)


def read_part(text: str) -> tuple[int, int]:
    """Read ``i/n``, counted from 1, as the ``part`` of :func:`compare`."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise RequestError(f"expected a part i/n with i of 1 to n, got {text!r}; correct it")
    return int(found[1]) - 1, int(found[2])


def _run(runner: Runner, entry: Entry, seed: int, kept: ComparisonFile, before: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one run; if it fails, its earlier results and the error."""
    done = {key: value for key, value in before.items() if key != "error"}
    try:
        if runner.lacks_baselines(kept.results):
            with locked(runner.folder, "bare"):
                kept.refresh()
                runner.measure_baselines(kept.results)
                kept.keep(own=["bare"])
        return _finite(runner.run(entry, seed, kept.results, done if "perplexity" in done else None))
    except InterruptedRun as error:
        raise InterruptedRun(
            f"stopped in {entry.text} | {seed}; finished runs are in {kept.path}, and the same call continues"
        ) from error
    except (LensError, ArithmeticError, RuntimeError, MemoryError) as error:
        logger.warning("%s | %d failed: %s; the other runs continue", entry.text, seed, first_line(error))
        return {**done, "error": first_line(error)}


def _summarised(kept: ComparisonFile, new_run: str | None = None) -> Comparison:
    """Write the results with a row per entry, so that the file is complete at any time."""
    kept.keep(new_run=new_run, own=["summary"], finish=lambda results: results.update(summary=summary(results)))
    return Comparison(kept.results)


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per entry: mean and standard deviation over seeds, and the fraction of lost log-perplexity recovered.

    ``recovered_interval`` is a 95 % interval from resampling the first text's blocks, the same for all models, with
    each block's loss averaged over seeds. ``tasks`` has by name the accuracy's mean and spread over seeds, the standard
    error for one seed, and ``gain_interval`` of the difference from the pruned model on the same items; where there are
    tasks, :func:`~lcc_lens.evaluation.comparison.accuracies.mean_rows` adds their mean and the fraction recovered.
    ``recovered_mean`` and ``recovered_worst`` are over all texts, whose own fractions are in ``domains``, with
    ``in_pool`` where text of the same kind was calibrated or trained on. ``inference`` is the time and memory of the
    way in which the result is served (see
    :func:`~lcc_lens.evaluation.comparison.costs.inference_costs`). Entries trained on the dense model recover nothing.
    The deviation of a single seed is None. ``errors`` are those of failed runs.
    """
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for name, run in results["cells"].items():
        by_entry.setdefault(name.rpartition(" | ")[0], []).append(run)
    return [_row(text, runs, results) for text, runs in by_entry.items()]


def _row(text: str, runs: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """The row of one entry from the runs of all its seeds."""
    entry, unrestored = Entry.parse(text), results["bare"]
    done = [run for run in runs if "perplexity" in run]
    columns = {key: [run[key] for run in done if run.get(key) is not None] for key in (*MEASURES, *COSTS)}
    is_restoration = entry.control != "dense"
    dense, pruned = (unrestored.get(name, {}).get("log_perplexity", math.nan) for name in ("dense", "pruned"))
    fractions = [share_recovered(dense, pruned, run["log_perplexity"]) for run in done] if is_restoration else []
    columns["recovered"] = [fraction for fraction in fractions if fraction is not None]
    for name in done[0].get("texts", {}) if done else ():
        columns[f"perplexity_{name}"] = [run["texts"][name]["perplexity"] for run in done]
    domains = [_by_text(unrestored, run) for run in done] if is_restoration else []
    for key in ("mean", "worst"):
        columns[f"recovered_{key}"] = [value for run in domains if (value := mean_and_worst(run)[key]) is not None]
    row: dict[str, Any] = {"entry": text, "seeds": len(done), "failed": len(runs) - len(done)}
    for key, values in columns.items():
        row[key] = statistics.mean(values) if values else None
        row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    has_blocks = bool(columns["recovered"]) and "texts" in unrestored["dense"]
    row["recovered_interval"] = _recovered_interval(unrestored, done) if has_blocks else None
    row["inference"] = results.get("inference", {}).get(served_as(entry))
    tasks = {name: model.get("tasks", {}) for name, model in unrestored.items()}
    every = [run.get("tasks", {}) for run in done]
    scored = [scores for scores in every if tasks["pruned"] and scores.keys() >= tasks["pruned"].keys()]
    row["tasks"] = task_rows(tasks["pruned"], scored) if scored else {}
    row |= mean_rows(tasks, scored, is_restoration=is_restoration) if scored else {}
    row["domains"] = _domains(entry, domains, results.get("settings", {}))
    row["errors"] = [run["error"] for run in runs if "error" in run]
    return row


def _by_text(unrestored: dict[str, Any], run: dict[str, Any]) -> dict[str, float | None]:
    """The fraction of the lost log-perplexity that a run recovered, by text."""
    models = (unrestored["dense"], unrestored["pruned"], run)
    return {
        name: share_recovered(*(math.log(model["texts"][name]["perplexity"]) for model in models))
        for name in run.get("texts", {})
    }


def _domains(
    entry: Entry, by_text: Sequence[Mapping[str, float | None]], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """By text the fraction ``recovered``, a mean over seeds, and whether its kind was calibrated or trained on."""
    named = {label: name for name, label in panel_labels(settings.get("texts", ())).items()}
    data = [settings.get("data", ""), *(settings.get("refit_data", ()) if entry.on_refit else ())]
    seen = frozenset().union(*map(domains_of, data))
    rows = {}
    for text in by_text[0] if by_text else ():
        known = [fraction for run in by_text if (fraction := run[text]) is not None]
        in_pool = bool(domains_of(named.get(text, text)) & seen)
        rows[text] = {"recovered": statistics.mean(known) if known else None, "in_pool": in_pool}
    return rows


def _finite(run: dict[str, Any]) -> dict[str, Any]:
    """Refuse results that are NaN or infinite: the training diverged, and JSON cannot hold them."""
    for name in MEASURES:
        if not math.isfinite(run[name]):
            raise LensError(f"expected finite figures, got a {name} of {run[name]}; lower the learning rate")
    return run


def _recovered_interval(unrestored: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[float]:
    name = next(iter(unrestored["dense"]["texts"]))
    dense, pruned = (unrestored[model]["texts"][name]["losses"] for model in ("dense", "pruned"))
    losses = zip(*(run["texts"][name]["losses"] for run in runs), strict=True)
    gained = [p - statistics.mean(r) for p, r in zip(pruned, losses, strict=True)]
    return list(bootstrap_interval(gained, [p - d for p, d in zip(pruned, dense, strict=True)]))
