"""What a run has measured of its restoration: tables and warnings for the model card, scores for other records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import learned_warning
from lcc_lens.core.reading import read_record
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.run_folder import RUN_METRICS

#: Texts by name and column; rows with the same columns share a table.
Rows = Mapping[str, Mapping[str, Any]]
#: The results of ``lcc-lens compare`` in its folder.
COMPARISON = "comparison.json"
MODELS = ("dense", "pruned", "restored")


@dataclass(frozen=True)
class Score:
    """One score of one model: on which data, by which metric (``acc`` or ``perplexity``), and how it was measured."""

    model: str
    data: str
    metric: str
    value: float
    notes: str


@dataclass(frozen=True)
class Measured:
    """Tables by title, warnings as sentences, and scores."""

    tables: Mapping[str, Rows] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()

    @classmethod
    def of(cls, record: RestorationRecord, run: Path | None = None, comparison: Path | None = None) -> Measured:
        """What is known of a restoration.

        Args:
            record: where the restoration comes from.
            run: the run directory, whose ``metrics.json`` holds what ``restore`` measured.
            comparison: the file or folder of a comparison of the same models, with the controls; the run directory's
                own if not given.

        Raises:
            RequestError: the comparison is of other models.
        """
        file = None if run is None else run / RUN_METRICS
        metrics = read_record(file, dict[str, Any]) if file is not None and file.exists() else {}
        tables: dict[str, Rows] = {}
        panel, recovery = metrics.get("panel"), metrics.get("recovery")
        scores: list[Score] = []
        if panel is not None:
            tables[f"Perplexity of held-out text by kind{_blocks(panel)}, and the fraction recovered"] = {
                name: row for name, row in panel_metrics(panel).items() if name != "warning"
            }
            scores += _panel_scores(panel)
        if recovery is not None:
            tables[f"Zero-shot accuracy on held-out items of {recovery['task']}{_harness(recovery)}"] = {
                name: _task_row(name, model["tasks"][recovery["task"]], recovery)
                for name, model in recovery["models"].items()
            }
            scores += _task_scores(recovery)
        compared = _compared(record, run, comparison)
        if compared:
            tables["The same training under controls, and baselines; mean over seeds"] = compared
        return cls(tables, tuple(_warnings(record, panel, recovery)), tuple(scores))


def panel_metrics(measured: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """A panel as text by domain and column, with its mean, its worst, and a warning where a domain got worse."""
    rows = {}
    for name, row in measured["domains"].items():
        perplexities = {model: f"{row['perplexity'][model]:.2f}" for model in MODELS}
        recovered = "nothing was lost" if row["recovered"] is None else f"{row['recovered']:.1%}"
        rows[name] = {**perplexities, "recovered": recovered, "kind trained on": "yes" if row["in_pool"] else "no"}
    if measured["mean"] is not None:
        rows["mean over domains"] = {"recovered": f"{measured['mean']:.1%}"}
        rows[f"worst domain ({measured['worst_domain']})"] = {"recovered": f"{measured['worst']:.1%}"}
    if measured["worse"]:
        rows["warning"] = {"": f"worse than the pruned model on {', '.join(measured['worse'])}"}
    return rows


def _blocks(panel: Mapping[str, Any]) -> str:
    """How much text of each kind was read, where the run says so."""
    return f" ({panel['blocks']} blocks of {panel['length']} tokens)" if "blocks" in panel else ""


def _harness(recovery: Mapping[str, Any]) -> str:
    return f" ({recovery['harness']}, items drawn with seed {recovery['seed']})" if "harness" in recovery else ""


def _task_row(name: str, scores: Mapping[str, Any], recovery: Mapping[str, Any]) -> dict[str, str]:
    share = recovery["share_recovered"] if name == "restored" else None
    return {
        "accuracy": f"{scores['acc']:.1%} ± {scores['stderr']:.1%}",
        "items": str(scores["n"]),
        f"perplexity of {recovery['text']}": f"{recovery['models'][name]['tasks'][recovery['text']]['perplexity']:.2f}",
        "recovered": "" if share is None else f"{share:.0%}",
    }


def _panel_scores(panel: Mapping[str, Any]) -> list[Score]:
    return [
        Score(model, name, "perplexity", row["perplexity"][model], f"perplexity of held-out text{_blocks(panel)}")
        for name, row in panel["domains"].items()
        for model in MODELS
    ]


def _task_scores(recovery: Mapping[str, Any]) -> list[Score]:
    scored = {name: model["tasks"][recovery["task"]] for name, model in recovery["models"].items()}
    return [
        Score(name, recovery["task"], "acc", found["acc"], f"{task_notes(found)}{_harness(recovery)}")
        for name, found in scored.items()
    ]


def task_notes(scores: Mapping[str, Any]) -> str:
    """How an accuracy was measured."""
    return f"zero-shot accuracy of {scores['n']} items, standard error {scores['stderr']:.4f}"


def _compared(record: RestorationRecord, run: Path | None, comparison: Path | None) -> Rows:
    """The rows of a comparison of the same models: what controls recover is not due to the lost components."""
    named = comparison or run
    if named is None:
        return {}
    file = named / COMPARISON if named.is_dir() else named
    if comparison is None and not file.exists():
        return {}
    results = read_record(file, dict[str, Any])
    theirs, ours = results.get("identity", {}), {"dense_sha256": record.dense_sha256}
    if record.refit is not None:
        ours["pruned_sha256"] = record.refit.pruned_sha256
    elif "refitted" not in record.losses:  # else an earlier version noted the refitted model alone
        ours["pruned_sha256"] = record.pruned_sha256
    if any(theirs.get(name) != sha256 for name, sha256 in ours.items()):
        if comparison is None:
            return {}
        raise RequestError(
            f"expected a comparison of the models that were restored, got other weights in {file}; name another one"
        )
    return {
        row["entry"]: {
            "recovered": _percent(row["recovered"]), "worst kind of text": _percent(row.get("recovered_worst")),
            "KL to dense": "" if row["kl"] is None else f"{row['kl']:.3f}", "seeds": str(row["seeds"]),
        }
        for row in results.get("summary", ())
    }  # fmt: skip


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def _warnings(
    record: RestorationRecord, panel: Mapping[str, Any] | None, recovery: Mapping[str, Any] | None
) -> list[str]:
    """What a reader of the numbers should know."""
    found = [learned_warning(record.losses) if record.n_trained != 0 else None]
    if record.settings.get("shuffle_responses"):
        found.append("a control: every prompt was trained with the response of another")
    if panel is not None and panel["worse"]:
        found.append(f"worse than the pruned model on {', '.join(panel['worse'])}")
    if recovery is not None:
        low, high = recovery["gain_interval"]
        if low <= 0:
            found.append(
                f"the gain on {recovery['task']} may be chance: {low:+.1%} to {high:+.1%} (95 % interval over items)"
            )
        if (recovery["share_recovered"] or 0) > 1:
            found.append(f"more of {recovery['task']} than pruning lost: training also taught the task")
    return [sentence for sentence in found if sentence]
