"""The tables of docs/results/causes.md, drawn from causes.json by tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

#: Rows of layers by depth, of 30.
DEPTHS = {"0": (0, 1), "1": (1, 2), "2 to 9": (2, 10), "10 to 19": (10, 20), "20 to 29": (20, 30)}
#: The fraction of heads that selectors choose to train.
TRAINED_SHARE = 0.25


def cause_table(study: dict[str, Any]) -> str:
    """Fractions of the squared difference by cause, of heads and of MLPs."""
    heads, mlps = ("inherited", "pattern", "value"), ("inherited", "gate_up", "down")
    lines = [
        "| | heads inherit, % | pattern | value | MLPs inherit, % | gate, up | down |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, parts in study["parts"].items():
        cells = [_percent(part["mean_over_heads"][cause] for part in parts) for cause in heads]
        cells += [_percent(part["mlp_mean"][cause] for part in parts) for cause in mlps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def depth_table(study: dict[str, Any]) -> str:
    """The inherited fraction of the heads by depth."""
    lines = [f"| layers | {' | '.join(study['parts'])} |", "|---|" + "---:|" * len(study["parts"])]
    for label, (first, end) in DEPTHS.items():
        cells = [
            _percent(_mean_of_known(part["by_layer"]["inherited"][first:end]) for part in parts)
            for parts in study["parts"].values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def circuit_table(study: dict[str, Any]) -> str:
    """What is left of the strongest heads of a type, and of what they do."""
    lines = [
        "| | induction left, % | previous token left, % | loss on a repetition | in-context loss | indirect object |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows: list[tuple[str, int, list[dict[str, Any]]]] = [("dense", 0, next(iter(study["parts"].values())))]
    rows += [(name, 1, parts) for name, parts in study["parts"].items()]
    for name, place, parts in rows:
        model = ("dense", "pruned")[place]
        left = [_percent(_left(part[kind], kind, model) for part in parts) for kind in ("induction", "previous")]
        measured = [_spread(part["behaviour"][place][what] for part in parts) for what in ("repetition", "in_context")]
        task = _spread(part["tasks"]["indirect-object"][place]["difference"] for part in parts)
        lines.append(f"| {' | '.join([name, *left, *measured, task])} |")
    return "\n".join(lines)


def judged_table(study: dict[str, Any]) -> str:
    """How the selector ``own`` agrees with exact patching, and what training its choice removes of the divergence."""
    lines = [
        "| | task | `own` | `mse` | trained `own`, % | `attribution` | `random` | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cells in study["judged"].items():
        for task in dict.fromkeys(cell.split()[0] for cell in cells):
            mine = [found for cell, found in cells.items() if cell.split()[0] == task]
            both = [_spread(found[selector] for found in mine) for selector in ("own", "mse")]
            removed = [
                _percent(row["kl_removed"] for found in mine for row in found.get("trained", [])
                         if row["selector"] == selector and row["share"] == TRAINED_SHARE)
                for selector in ("own", "attribution", "random")
            ]  # fmt: skip
            lines.append(f"| {' | '.join([name, task, *both, *removed, str(len(mine))])} |")
    return "\n".join(lines)


def recovered_table(study: dict[str, Any]) -> str:
    """What is left of the squared difference by cause, and of the circuits, after each restoration."""
    lines = [
        "| | left, % | inherited | pattern | value | constant | induction left, % | loss on a repetition "
        "| indirect object |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    name, parts = next(iter(study["parts"].items()))
    rows = [(f"pruned, {name}", parts[0], 1.0, {**parts[0]["mean_over_heads"], "constant": 0.0}, "pruned")]
    rows += [(f"`{method}`", found, found["remaining"], found["by_cause"], "restored")
             for method, found in study.get("recovered", {}).items()]  # fmt: skip
    for label, found, left, by_cause, model in rows:
        place = ("dense", "pruned", "restored").index(model)
        cells = [
            _percent([left]),
            *(_percent([by_cause[cause]]) for cause in ("inherited", "pattern", "value", "constant")),
        ]
        cells += [_percent([_left(found["induction"], "induction", model)])]
        cells += [_spread([found["behaviour"][place]["repetition"]])]
        cells += [_spread([found["tasks"]["indirect-object"][place]["difference"]])]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def _left(heads: list[dict[str, Any]], kind: str, model: str) -> float:
    """The summed score of the dense model's ten strongest heads, over the dense model's."""
    return float(sum(head[f"{kind}_{model}"] for head in heads) / sum(head[f"{kind}_dense"] for head in heads))


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the layers that lost something."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(values: Iterable[float | None]) -> str:
    return _spread((None if value is None else 100 * value for value in values), ".1f")


def _spread(values: Iterable[float | None], digits: str = ".2f") -> str:
    """The mean, and the standard deviation over seeds where there is one; a dash where nothing was lost."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    spread = stdev(found) if len(found) > 1 else 0.0
    mean = f"{fmean(found):{digits}}"
    mean = mean if mean.strip("-0.") else mean.lstrip("-")  # no minus before a zero
    return mean + (f" ± {spread:{digits}}" if spread else "")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "causes": cause_table, "causes by depth": depth_table, "circuits": circuit_table, "own": judged_table,
    "recovered by cause": recovered_table,
}  # fmt: skip
