"""Comparisons: methods, baselines and controls on one pruned model, by the same rule, over several seeds."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import InterruptedRun, LensError, RequestError
from lcc_lens.core.files import locked
from lcc_lens.core.metrics import bootstrap_interval, share_recovered
from lcc_lens.evaluation.comparison.accuracies import mean_rows, task_rows
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.costs import served_as
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.results_file import ComparisonFile
from lcc_lens.evaluation.comparison.runner import Runner

logger = logging.getLogger(__name__)
COMPARISON = "comparison.json"
MEASURES = ("perplexity", "log_perplexity", "kl", "response_loss")
COSTS = ("n_trained", "n_added", "zeros_kept", "training_seconds", "memory_mib", "mendable_share")


def compare(
    dense: str | Path,
    pruned: str | Path,
    run: str | Path,
    entries: Sequence[str],
    *,
    seeds: int = 3,
    config: CompareConfig | None = None,
    out: str | Path | None = None,
    deadline: float = math.inf,
    part: tuple[int, int] = (0, 1),
    on_cell: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train and measure every entry with every seed; finished cells are kept, failed ones are reported and tried anew.

    What was trained is kept in ``run/trained``, so that more tasks can be asked later: cells that are there are
    measured on what they lack.

    A cell holds what :class:`~lcc_lens.evaluation.comparison.measures.Measures` measures, the numbers trained, the
    numbers that the
    checkpoint of the result gains, the share of the pruned weights' zeros that are left once it is merged, and the
    training's seconds and memory; for a mean shift also the share of the squared difference that is
    constant at all (``mendable_share``). The seed draws the examples, their order and initial values.

    Args:
        dense: reference of the dense model.
        pruned: reference of the pruned model.
        run: a folder for the scan, the refitted model and ``comparison.json``.
        entries: what to compare; see :class:`Entry`.
        seeds: how many.
        config: what all cells share.
        out: the file to keep cells and their :func:`summary` in; ``comparison.json`` in ``run`` if not given.
        deadline: begin no cell after this moment of ``time.monotonic()``.
        part: ``(i, n)`` computes every n-th cell from the i-th (of 0 to n - 1): n processes with the same arguments but
            for this one share the work, the folder and the file. The one that ends last times inference.
        on_cell: called with every new cell.

    Raises:
        RequestError: an unknown entry, or a file, scan or refitted model of another comparison.
        InterruptedRun: Ctrl-C; finished cells are kept.
    """
    parsed, config, run = [Entry.parse(text) for text in entries], config or CompareConfig(), Path(run)
    if config.heads >= 1 and any(entry.control == "random-heads" for entry in parsed):
        raise RequestError("expected a share of heads below 1 for random heads, got all of them; lower it")
    if not 0 <= part[0] < part[1]:
        raise RequestError(f"expected one of the parts 0 to n - 1 of n, got {part[0]} of {part[1]}")
    runner = Runner(dense, pruned, run, config)
    asked = {f"{entry.text} | {seed}": (entry, seed) for seed in range(seeds) for entry in parsed}
    kept = ComparisonFile(
        Path(out) if out is not None else run / COMPARISON, run, runner.models.hashes, config, [*asked]
    )
    runner.models.check_refit()
    for name in [*asked][part[0] :: part[1]]:
        before = kept.found["cells"].get(name, {})
        if "perplexity" in before and all(task in before["tasks"] for task in config.tasks):
            continue
        if time.monotonic() > deadline:
            return _summarised(kept)
        try:
            kept.found["cells"][name] = _cell(runner, *asked[name], kept, before)
        except InterruptedRun as error:
            raise InterruptedRun(
                f"stopped in {name}; finished cells are in {kept.path}: the same call goes on"
            ) from error
        _summarised(kept, cell=name)
        if on_cell is not None:
            on_cell(name, kept.found["cells"][name])
    kept.refresh()
    is_last = all(name in kept.found["cells"] for name in asked)  # nobody else is at work, which times would show
    if config.speed_rounds and is_last and time.monotonic() <= deadline:
        runner.time(parsed, kept.found)
        kept.keep(own=["inference"])
    return _summarised(kept)


def read_part(text: str) -> tuple[int, int]:
    """Read ``i/n``, counted from 1, as the ``part`` of :func:`compare`.

    Raises:
        RequestError: another text, or no such part.
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise RequestError(f"expected a part as i/n with i of 1 to n, got {text!r}")
    return int(i) - 1, int(n)


def _cell(runner: Runner, entry: Entry, seed: int, kept: ComparisonFile, before: Mapping[str, Any]) -> dict[str, Any]:
    """A cell with all that is asked; where that fails, what there was before and the reason."""
    done = {key: value for key, value in before.items() if key != "error"}
    try:
        if runner.lacks_baselines(kept.found):
            with locked(runner.folder, "bare"):
                kept.refresh()
                runner.measure_baselines(kept.found)
                kept.keep(own=["bare"])
        return _finite(runner.run(entry, seed, kept.found, done if "perplexity" in done else None))
    except InterruptedRun:
        raise
    except (LensError, ArithmeticError, RuntimeError, MemoryError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("%s | %d failed: %s; the rest goes on", entry.text, seed, first)
        return {**done, "error": first}


def _summarised(kept: ComparisonFile, cell: str | None = None) -> dict[str, Any]:
    """Keep the cells, one of them new, with a row per entry: one file has all there is to say, at any time."""
    kept.keep(cell=cell, own=["summary"], finish=lambda found: found.update(summary=summary(found)))
    return kept.found


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per entry: mean and standard deviation over its seeds, and the share of lost log-perplexity that came back.

    ``recovered_interval`` is a 95 % interval from drawing the first text's blocks anew, those of all models alike, with
    the losses' mean over seeds; ``tasks`` has by name the accuracy's mean and spread over seeds, the standard error of
    one seed's, and ``gain_interval`` of the difference from the pruned model on the same items; where there are tasks,
    :func:`~lcc_lens.evaluation.comparison.accuracies.mean_rows` adds their mean and the share of its loss recovered.
    ``inference`` is what
    the result's way of being served takes (see :func:`~lcc_lens.evaluation.comparison.costs.inference_costs`).
    Entries trained on
    the dense model have no share. The deviation of a single seed is None. ``errors`` are those of failed cells.
    """
    rows: list[dict[str, Any]] = []
    for text in dict.fromkeys(name.rpartition(" | ")[0] for name in found["cells"]):
        cells = [cell for name, cell in found["cells"].items() if name.rpartition(" | ")[0] == text]
        done = [cell for cell in cells if "perplexity" in cell]
        row: dict[str, Any] = {"entry": text, "seeds": len(done), "failed": len(cells) - len(done)}
        columns = {key: [cell[key] for cell in done if cell.get(key) is not None] for key in (*MEASURES, *COSTS)}
        is_restoration = Entry.parse(text).control != "dense"
        shares = [_share(found["bare"], cell) for cell in done] if is_restoration else []
        columns["recovered"] = [share for share in shares if share is not None]
        for name in done[0].get("texts", {}) if done else ():
            columns[f"perplexity_{name}"] = [cell["texts"][name]["perplexity"] for cell in done]
        for key, values in columns.items():
            row[key] = statistics.mean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        has_blocks = bool(columns["recovered"]) and "texts" in found["bare"]["dense"]
        row["recovered_interval"] = _recovered_interval(found["bare"], done) if has_blocks else None
        row["inference"] = found.get("inference", {}).get(served_as(Entry.parse(text)))
        bare = {name: model.get("tasks", {}) for name, model in found["bare"].items()}
        every = [cell.get("tasks", {}) for cell in done]
        scored = [tasks for tasks in every if bare["pruned"] and tasks.keys() >= bare["pruned"].keys()]
        row["tasks"] = task_rows(bare["pruned"], scored) if scored else {}
        row |= mean_rows(bare, scored, is_restoration=is_restoration) if scored else {}
        row["errors"] = [cell["error"] for cell in cells if "error" in cell]
        rows.append(row)
    return rows


def _finite(cell: dict[str, Any]) -> dict[str, Any]:
    """Refuse figures that are no numbers: what diverged has failed, and JSON could not hold it."""
    for name in MEASURES:
        if not math.isfinite(cell[name]):
            raise LensError(f"expected finite figures, got a {name} of {cell[name]}; lower the learning rate")
    return cell


def _share(bare: dict[str, Any], cell: dict[str, Any]) -> float | None:
    dense, pruned = (bare[name]["log_perplexity"] for name in ("dense", "pruned"))
    return share_recovered(dense, pruned, cell["log_perplexity"])


def _recovered_interval(bare: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[float]:
    name = next(iter(bare["dense"]["texts"]))
    dense, pruned = (bare[model]["texts"][name]["losses"] for model in ("dense", "pruned"))
    losses = zip(*(cell["texts"][name]["losses"] for cell in cells), strict=True)
    gained = [p - statistics.mean(r) for p, r in zip(pruned, losses, strict=True)]
    return list(bootstrap_interval(gained, [p - d for p, d in zip(pruned, dense, strict=True)]))
