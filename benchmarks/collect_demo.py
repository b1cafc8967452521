"""Collect demo runs over seeds into one results file, and print the README's table from it.

for seed in 0 1 2; do lcc-lens demo --seed $seed --folder runs/demo$seed; done
python benchmarks/collect_demo.py runs/demo0 runs/demo1 runs/demo2
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "demo.json"
COMMAND = "for seed in 0 1 2; do lcc-lens demo --seed $seed --folder runs/demo$seed; done"
COLUMNS = {
    "perplexity, held-out text": ("held-out text", "perplexity", 1, 2),
    "response loss (nats per token)": ("held-out responses", "response_loss", 1, 3),
    "BoolQ (%)": ("boolq", "acc", 100, 1),
    "ARC-easy (%)": ("arc_easy", "acc", 100, 1),
}


def collect(folders: list[Path]) -> dict[str, Any]:
    """The results of several runs, with their seeds and without this machine's paths."""
    runs = []
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        models = {name: entry["tasks"] for name, entry in results["models"].items()}
        keys = ("share_recovered", "export", "seconds", "version")
        runs.append({"seed": results["config"]["seed"], "models": models, **{key: results[key] for key in keys}})
    config = {k: v for k, v in results["config"].items() if k not in ("folder", "seed")}
    return {"command": COMMAND, "config": config, "runs": sorted(runs, key=lambda run: run["seed"])}


def spread(values: list[float], scale: float, digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * deviation:.{digits}f}"


def table(results: dict[str, Any]) -> str:
    """The README's table: one row a model, mean ± standard deviation over seeds."""
    runs = results["runs"]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for model in ("dense", "pruned", "restored"):
        cells = [
            spread([run["models"][model][task][key] for run in runs], scale, digits)
            for task, key, scale, digits in COLUMNS.values()
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    shares = {
        name: spread([run["share_recovered"][name] for run in runs], 100, 1)
        for name in ("held-out text", "held-out responses")
    }
    lines.append(
        f"| *lost log-likelihood recovered (%)* | {shares['held-out text']} | {shares['held-out responses']} | | |"
    )
    return "\n".join(lines)


def bench_table(results: dict[str, Any]) -> str:
    """The README's table of ratios from ``benchmarks/results.json``."""
    lines = ["| ratio | median | range |", "|---|---:|---:|"]
    for name, row in results["ratios"].items():
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['smallest']:.2f} to {row['largest']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:]:
        results = collect([Path(folder) for folder in sys.argv[1:]])
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
