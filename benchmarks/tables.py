"""The tables of the README and of docs/results, drawn from the committed results.

python benchmarks/tables.py            # print them
python benchmarks/tables.py --write    # put the marked ones in their places
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from cause_tables import TABLES as CAUSES

HERE = Path(__file__).parent
ROOT = HERE.parent
#: The pages with marked tables.
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md")))


def quality_table(study: dict[str, Any]) -> str:
    """Perplexity by method and share, mean and standard deviation over seeds (none: one cell)."""
    methods = study["methods"]

    def cell(name: str) -> str:
        if name not in methods:
            return ""
        found = methods[name]
        spread = f" ± {number(found['stdev'])}" if found["n"] > 1 else ""
        return f"{number(found['mean'])}{spread}"

    lines = [
        f"dense: {study['dense']['perplexity']:.2f}", "",
        "| | 50 % | 2:4 |", "|---|---:|---:|",
        *(f"| {label} | {cell(f'{name} 50%')} | {cell(f'{name} 2:4')} |"
          for name, label in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT"))), "",
        "| whole heads and neurons | 10 % | 20 % | 30 % |", "|---|---:|---:|---:|",
        *(f"| {label} | " + " | ".join(cell(f"{name} {share}%") for share in (10, 20, 30)) + " |"
          for name, label in (
              ("slimgpt sliced", "SlimGPT, sliced"), ("slimgpt zeroed", "SlimGPT, zeroed, rising ratio"),
              ("slimgpt zeroed, split by error", "the same, heads and neurons split by error"),
              ("slimgpt sliced, heads in proportion", "SlimGPT, sliced, heads in proportion"),
              ("smallest heads", "smallest weights, sliced"), ("random heads", "random, sliced"))),
    ]  # fmt: skip
    return "\n".join(lines)


def number(value: float) -> str:
    """Few digits, no exponent: 44.5, 381, 402,977."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.2f}"


TIMED = {
    "wanda 50%": "Wanda 50 %",
    "sparsegpt 50%": "SparseGPT 50 %",
    "sparsegpt 2:4": "SparseGPT 2:4",
    "slimgpt sliced 20%": "SlimGPT 20 %, sliced",
}


def time_table(study: dict[str, Any]) -> str:
    """Time of every pruner over two bare forward passes of the same tokens."""
    lines = ["| | time / two forward passes | range |", "|---|---:|---:|"]
    for name, label in TIMED.items():
        row = study["methods"][name]["time / two passes"]
        lines.append(f"| {label} | {row['median']:.2f} | {row['smallest']:.2f} to {row['largest']:.2f} |")
    return "\n".join(lines)


def peer_table(bench: dict[str, Any]) -> str:
    """Seconds and perplexity beside llm-compressor's."""
    peers = {name: row for name, row in bench["llm_compressor"].items() if name != "versions"}
    lines = ["| | lcc_lens (s) | llm-compressor (s) | ratio | perplexity | theirs |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in peers.items():
        lines.append(
            f"| {name} 50 % | {row['ours_s']['median']:.0f} | {row['theirs_s']['median']:.0f} "
            f"| {row['ratio']['median']:.2f} | {row['our_perplexity']:.2f} | {row['their_perplexity']:.2f} |"
        )
    return "\n".join(lines)


def report_table(report: dict[str, Any]) -> str:
    """Sizes and times of a dense, a pruned and a sliced model, as `lcc-lens report` measured them."""
    lines = [
        "| | zeros | pattern | parameters (M) | MB | zstd MB | prefill / dense | decode / dense |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, entry in report["models"].items():
        ratios = report["ratios"][name]
        times = [f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in (ratios["prefill"], ratios["decode"])]
        lines.append(
            f"| {name} | {entry['sparsity']:.1%} | {entry['pattern']} | {entry['parameters'] / 1e6:.1f} "
            f"| {entry['bytes'] / 1e6:.0f} | {entry['bytes_zstd'] / 1e6:.0f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


SELECTOR_LABELS = {
    "patching": "activation patching (gold standard)",
    "attribution": "attribution patching",
    "gradient": "gradient to the injection",
    "mse": "mean squared difference",
    "kl": "KL of the heads' votes",
    "probe": "linear probe (the paper's)",
    "interaction": "interaction probe",
    "random": "random",
}
MEASURE_LABELS = {
    "recovered": "lost log-likelihood recovered (%)",
    "kl_removed": "divergence from dense removed (%)",
}


def correlation_table(study: dict[str, Any]) -> str:
    """Rank correlation of every selector with the gold standard, by pruned model."""
    models = study["summary"]
    lines = ["| rank correlation with activation patching | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---:|" * len(models))
    for name, label in SELECTOR_LABELS.items():
        if name != "patching":
            cells = [_range(found["correlation"][name], 2, 1) for found in models.values()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    itself = [f"{found['gold_with_itself']['mean']:.2f}" for found in models.values()]
    lines.append("| *activation patching on other examples* | " + " | ".join(itself) + " |")
    return "\n".join(lines)


def recovery_table(study: dict[str, Any], what: str) -> str:
    """One measure of recovery after training the heads of every selector, at both shares of heads, by pruned model."""
    models = study["summary"]
    shares = list(next(iter(models.values()))["recovery"])
    heads = [f"{share} of heads, {name.removeprefix('wanda ')}" for name in models for share in shares]
    lines = [f"| {MEASURE_LABELS[what]} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, label in SELECTOR_LABELS.items():
        cells = [_range(found["recovery"][share][name][what], 1, 100) for found in models.values() for share in shares]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_table(study: dict[str, Any]) -> str:
    """Both measures of recovery by task, at the larger share of heads, for some selectors: means over seeds."""
    names = ("attribution", "probe", "mse", "random")
    tasks, models = (list(dict.fromkeys(cell[key] for cell in study["cells"])) for key in ("task", "model"))
    share = max(row["share"] for row in study["cells"][0]["recovery"])
    lines = [
        "| likelihood recovered / divergence removed (%) | " + " | ".join(SELECTOR_LABELS[n] for n in names) + " |"
    ]
    lines.append("|---|" + "---:|" * len(names))
    for task in tasks:
        for model in models:
            rows = [
                row for cell in study["cells"] if (cell["task"], cell["model"]) == (task, model)
                for row in cell["recovery"] if row["share"] == share
            ]  # fmt: skip
            chosen = [[row for row in rows if row["selector"] == name] for name in names]
            means = [[fmean(row[what] for row in own) for what in MEASURE_LABELS] for own in chosen]
            cells = [" / ".join(f"{100 * value:.0f}" for value in pair) for pair in means]
            lines.append(f"| {task}, {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(cost: dict[str, Any], probes: dict[str, Any]) -> str:
    """What a scan takes beside bare forwards, and its probes beside a loop over heads."""
    time = cost["scan / bare forwards"]
    spread = "" if time["smallest"] == time["largest"] else f" ({time['smallest']:.2f} to {time['largest']:.2f})"
    memory = "; ".join(f"{row['mib_above_models']:.0f} MiB for {row['examples']} pairs" for row in cost["memory"])
    loop = probes["loop / ours"]["newton"]
    return "\n".join([
        "| | |", "|---|---|",
        f"| scan of {cost['examples']} Alpaca pairs / the bare forwards it needs | {time['ratio']:.2f}{spread} |",
        f"| memory above the models | {memory} |",
        f"| published loop over heads / converged probes of all heads | {loop['median']:.1f} "
        f"({loop['smallest']:.1f} to {loop['largest']:.1f}) |",
    ])  # fmt: skip


def published_table(published: dict[str, Any]) -> str:
    """Seconds of the published extraction and of ours on the same examples."""
    lines = ["| | examples | published (s) | ours (s) | times as fast |", "|---|---:|---:|---:|---:|"]
    for task, found in published["tasks"].items():
        for name, row in found["extraction"].items():
            seconds = [row[side]["median"] for side in ("published_s", "ours_s")]
            lines.append(
                f"| {task}, {name} | {found['examples']} | {seconds[0]:.0f} | {seconds[1]:.0f} "
                f"| {1 / row['ratio']['median']:.1f} |"
            )
    return "\n".join(lines)


def _range(found: dict[str, float], digits: int, scale: float) -> str:
    mean, low, high = (f"{scale * found[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text())


RESTORED = {
    "lcc": "`lcc`, the paper's",
    "lcc=1e-2": "`lcc`, learning rate 1e-2",
    "lcc=1e-1": "`lcc`, learning rate 1e-1",
    "random-basis": "`lcc`, random directions",
    "offset": "`lcc`, no directions",
    "mean-shift": "mean difference, no training",
    "lcc@shuffled": "`lcc`, shuffled responses",
    "lcc:distillation": "`lcc`, distilled",
    "lcc@random-heads": "`lcc`, random heads",
    "lcc+mlp-lcc": "`lcc`, MLPs too",
    "mean-shift-sequential": "mean difference, layer behind layer",
    "mean-shift-sequential-mlp": "the same, MLPs too",
    "gain": "`gain`",
    "norms": "`norms`",
    "norms=1e-2": "`norms`, learning rate 1e-2",
    "low-rank": "`low-rank`",
    "masked": "`masked`, all surviving weights",
    "refit+all-weights:3*distillation+lm=3e-4": "`best`",
    "refit+low-rank:3*distillation+lm=5e-3": "`best-low-rank`",
    "lora": "LoRA (peft; q, k, v, o)",
    "lora:3*distillation+lm=1e-2": "LoRA (q, k, v, o)",
    "lora=1e-3": "LoRA, learning rate 1e-3",
    "lora=1e-2": "LoRA, learning rate 1e-2",
    "lora:text+distillation": "LoRA, text and distillation",
    "lora:distillation": "LoRA, distilled",
    "lora-vo": "LoRA (v, o)",
    "dora": "DoRA (peft; q, k, v, o)",
    "lofit": "LoFiT",
    "lofit=3e-2": "LoFiT, learning rate 3e-2",
    "perp": "PERP (biases and norms)",
    "perp-lora": "PERP (LoRA under the mask)",
    "perp-lora=1e-3": "the same, learning rate 1e-3",
    "eora": "EoRA, no training",
    "flap": "FLAP's biases, no training",
    "low-rank:text+distillation": "`low-rank`, text and distillation",
    "refit": "`refit`, no training",
    "refit+low-rank:text+distillation": "the same at another learning rate, as it was first",
    "refit+low-rank:text+distillation=0.005": "`refit+low-rank`, text and distillation",
    "refit+low-rank": "`refit`, then `low-rank`",
    "refit+low-rank:distillation": "`refit`, then `low-rank`, distilled",
    "refit+low-rank+lcc:distillation": "`refit`, then `low-rank+lcc`, distilled",
    "refit+masked:distillation": "`refit`, then `masked`, distilled",
    "lcc@dense": "*`lcc` on the dense model*",
    "lora@dense": "*LoRA on the dense model*",
    "low-rank@dense:text+distillation": "*`low-rank`, text and distillation, on the dense model*",
}


#: The line of a comparison in the paper's setting that recovers most.
BEST = "refit+low-rank:text+distillation=0.005"


def restoration_table(study: dict[str, Any]) -> str:
    """Mean over seeds, with the standard deviation where there are several, of every entry of a comparison."""
    from lcc_lens.evaluation.comparison.compare import summary

    def cell(row: dict[str, Any], key: str, digits: int, scale: float = 1.0) -> str:
        value, spread = row[key], row[f"{key}_sd"]
        if value is None:
            return ""
        return f"{scale * value:.{digits}f}" + ("" if spread is None else f" ± {scale * spread:.{digits}f}")

    lines = [
        "| | WikiText perplexity | recovered, % | C4 perplexity | KL to dense | response loss | trained | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(f"| {name} | {m['perplexity']:.2f} | | {m['texts']['c4']['perplexity']:.2f} | {m['kl']:.3f} "
          f"| {m['response_loss']:.3f} | | |"
          for name, m in study["bare"].items()),
    ]  # fmt: skip
    rows = {row["entry"]: row for row in summary(study) if row["seeds"]}
    for entry, label in RESTORED.items():
        if entry in rows:
            row = rows[entry]
            values = [
                cell(row, "perplexity", 2), cell(row, "recovered", 1, 100), cell(row, "perplexity_c4", 2),
                cell(row, "kl", 3), cell(row, "response_loss", 3), f"{row['n_trained'] or 0:,}", str(row["seeds"]),
            ]  # fmt: skip
            lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def overview_table(studies: dict[str, dict[str, Any]]) -> str:
    """The README's table: the paper's method, LoRA and the best line, by pruned model.

    Args:
        studies: comparisons by the name of the pruned model.
    """
    from lcc_lens.evaluation.comparison.compare import summary

    labels = {"lcc": "`lcc`, the paper's", "lora": "LoRA (peft; q, k, v, o)", BEST: "`refit+low-rank`"}
    header = [
        f"{name}: {what}" for name in studies for what in ("WikiText recovered, %", "C4 perplexity", "KL to dense")
    ]
    lines = [f"| | {' | '.join(header)} |", f"|---|{'---:|' * len(header)}"]
    lines += [
        f"| {name} | "
        + " | ".join(
            f"| {m['texts']['c4']['perplexity']:.1f} | {m['kl']:.3f}"
            for m in (s["bare"][name] for s in studies.values())
        )
        + " |"
        for name in ("dense", "pruned")
    ]
    rows = {name: {row["entry"]: row for row in summary(study)} for name, study in studies.items()}
    for entry, label in labels.items():
        cells = [
            f"{scale * rows[name][entry][key]:.{digits}f} ± {scale * rows[name][entry][f'{key}_sd']:.{digits}f}"
            for name in studies
            for key, digits, scale in (("recovered", 1, 100), ("perplexity_c4", 1, 1), ("kl", 3, 1))
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(study: dict[str, Any]) -> str:
    """Zero-shot accuracies of every entry that was scored, task by task, and what the mean gained (95 %, items).

    Beside them the mean of those tasks alone that pruning made worse, and the share of that loss recovered.
    """
    from lcc_lens.evaluation.comparison.accuracies import mean_accuracy, tasks_made_worse
    from lcc_lens.evaluation.comparison.compare import summary

    bare = {name: model["tasks"] for name, model in study["bare"].items()}
    tasks, worse = list(bare["dense"]), tasks_made_worse(bare)

    def line(name: str, accuracies: list[float], mean: float, gain: str, of: float, share: str, seeds: str) -> str:
        shown = " | ".join(f"{100 * one:.1f}" for one in (*accuracies, mean))
        return f"| {name} | {shown} | {gain} | {100 * of:.1f} | {share} | {seeds} |"

    columns = [
        *tasks, "mean", "gain of the mean, points", f"mean of {len(worse)} that pruning made worse",
        "share of that loss recovered, %", "seeds",
    ]  # fmt: skip
    lines = ["| accuracy, % | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, scores in bare.items():
        of = mean_accuracy({task: scores[task] for task in worse})[0]
        lines.append(line(name, [scores[task]["acc"] for task in tasks], mean_accuracy(scores)[0], "", of, "", ""))
    rows = {row["entry"]: row for row in summary(study) if row.get("tasks")}
    for entry, label in RESTORED.items():
        if entry in rows:
            row = rows[entry]
            low, high = (100 * end for end in row["accuracy_gain_interval"])
            gain = f"{100 * (row['accuracy'] - mean_accuracy(bare['pruned'])[0]):+.1f} [{low:+.1f}, {high:+.1f}]"
            share = "" if row["worse_recovered"] is None else f"{100 * row['worse_recovered']:.0f}"
            if row["worse_recovered_interval"] is not None:
                share += " [{:.0f}, {:.0f}]".format(*(100 * end for end in row["worse_recovered_interval"]))
            accuracies, seeds = [row["tasks"][task]["acc"] for task in tasks], str(row["accuracy_seeds"])
            lines.append(line(label, accuracies, row["accuracy"], gain, row["worse_accuracy"], share, seeds))
    return "\n".join(lines)


#: A refit, then low rank or all weights, and LoRA on the mix.
LOW_RANK, ALL_WEIGHTS, LORA = (
    "refit+low-rank:3*distillation+lm=5e-3", "refit+all-weights:3*distillation+lm=3e-4", "lora:3*distillation+lm=1e-2"
)  # fmt: skip
#: Entries, or models as they came, whose accuracies are held against each other.
DIFFERENCES = (
    ("refit+low-rank:text+distillation=0.005", "lora"), ("refit+low-rank:text+distillation=0.005", "lcc"),
    ("refit+low-rank:text+distillation=0.005", "refit"), ("lcc", "lora"), ("lcc", "random-basis"), ("lcc", "offset"),
    ("lcc", "lcc@shuffled"), ("lcc", "pruned"), ("lcc@dense", "dense"), (ALL_WEIGHTS, LORA), (LOW_RANK, LORA),
    (ALL_WEIGHTS, LOW_RANK),
)  # fmt: skip


def with_best(study: dict[str, Any]) -> dict[str, Any]:
    """The study of 205 thousand tokens of the mix, with `best`, which was trained on the same ones in smaller steps."""
    return {**study, "cells": {**study["cells"], **read("domains_mix_205k_batch2.json")["cells"]}}


def difference_table(study: dict[str, Any]) -> str:
    """Differences of mean accuracy over the tasks that pruning made worse, of the same items with the same seeds."""
    from lcc_lens.evaluation.comparison.accuracies import accuracy_difference, tasks_made_worse

    bare = {name: model["tasks"] for name, model in study["bare"].items()}
    worse = tasks_made_worse(bare)
    scored: dict[str, dict[int, Any]] = {}
    for name, one in study["cells"].items():
        entry, _, seed = name.rpartition(" | ")
        if one.get("tasks"):
            scored.setdefault(entry, {})[int(seed)] = one["tasks"]
    drawn = {seed for seeds in scored.values() for seed in seeds}
    once = {**bare, **({"refit": scored["refit"][0]} if "refit" in scored else {})}  # nothing here is drawn by a seed
    scored |= {name: dict.fromkeys(drawn, tasks) for name, tasks in once.items()}
    lines = [
        f"| mean of {len(worse)} tasks that pruning made worse | difference, points [95 %, items] | seed by seed |",
        "|---|---:|---:|",
    ]
    for first, second in (both for both in DIFFERENCES if scored.keys() >= {*both}):
        seeds = sorted(scored[first].keys() & scored[second].keys())
        ours, others = ([scored[name][seed] for seed in seeds] for name in (first, second))
        difference, interval = accuracy_difference(ours, others, worse)
        assert interval is not None
        low, high = interval
        pairs = zip(ours, others, strict=True)
        each = ", ".join(f"{100 * accuracy_difference([one], [other], worse)[0]:+.1f}" for one, other in pairs)
        names = " - ".join(_short(RESTORED.get(name, name)) for name in (first, second))
        lines.append(f"| {names} | {100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {each} |")
    return "\n".join(lines)


def _short(label: str) -> str:
    return re.split(r":| \(|, the paper|, no training", label.strip("*"))[0]


def one_task_table(studies: dict[str, dict[str, Any]]) -> str:
    """Accuracy after training on a task, the gain over the pruned model (95 %, items), and perplexity elsewhere."""
    from lcc_lens.evaluation.comparison.compare import summary

    lines = [
        "| accuracy, % (gain); WikiText perplexity | " + " | ".join(studies) + " |",
        "|---|" + "---:|" * len(studies),
    ]
    for name in ("dense", "pruned"):
        bare = {task: study["bare"][name] for task, study in studies.items()}
        cells = [f"{100 * one['tasks'][task]['acc']:.1f}; {number(one['perplexity'])}" for task, one in bare.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rows = {task: {row["entry"]: row for row in summary(study)} for task, study in studies.items()}
    for entry, label in RESTORED.items():
        if any(entry in found and found[entry]["tasks"] for found in rows.values()):
            cells = []
            for task, found in rows.items():
                row = found.get(entry, {})
                if not row.get("tasks"):
                    cells.append("")
                    continue
                score = row["tasks"][task]
                low, high = (100 * end for end in score["gain_interval"])
                cells.append(f"{100 * score['acc']:.1f} ({low:+.1f} to {high:+.1f}); {number(row['perplexity'])}")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_tasks(model: str) -> dict[str, dict[str, Any]]:
    """The comparisons on one task each of a pruned model, by task."""
    files = sorted(HERE.glob(f"restorations_{model}_*.json"))
    return {file.stem.removeprefix(f"restorations_{model}_"): read(file.name) for file in files}


def ratio_table(bench: dict[str, Any]) -> str:
    """Times and memory beside bare transformers and peft, in one run."""
    lines = ["| ratio | median | range |", "|---|---:|---:|"]
    for name, row in bench["ratios"].items():
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['smallest']:.2f} to {row['largest']:.2f} |")
    return "\n".join(lines)


def prompt_table(study: dict[str, Any]) -> str:
    """Gains of every variant of prompts on the dense and the pruned models, and how they differ."""
    parts = []
    for name, found in study["models"].items():
        restored = {f"interaction, `{method}`": rows for method, rows in found["restored"].items()}
        tasks = [f"{task} of pruned, %" for task in found["choices"]]
        head = ["", "words", "gain on dense", "gain on pruned", "pruned - dense", *restored, *tasks]
        lines = [f"{name}, {found['examples']} responses", "", _row(head), "|---|" + "---:|" * (len(head) - 1)]
        for row in found["rows"]:
            cells = [row["variant"], f"{row['words']:.0f}"]
            cells += [_interval(row, key) for key in ("gain_dense", "gain_pruned", "pruned_minus_dense")]
            cells += [_interval(_named(rows, row["variant"]), "interaction") for rows in restored.values()]
            scored = [_named(rows, row["variant"]) for rows in found["choices"].values()]
            cells += [f"{100 * other['accuracy_pruned']:.1f}" if other else "" for other in scored]
            lines.append(_row(cells))
        spread = {row["model"]: row for row in found["sensitivity"]}
        lines += ["", f"Standard deviation over the variants: dense {_interval(spread['dense'], 'sensitivity', '')}, "
                  f"pruned {_interval(spread['pruned'], 'sensitivity', '')}; difference "
                  f"{_interval(spread['pruned'], 'over_dense')}."]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def prompt_head_table(study: dict[str, Any]) -> str:
    """Where the heads are that react to a prompt, and whether pruning changed them most."""
    head = ["", "variant", "in the top 10 % by lost norm, %", "in random heads, %", "rank correlation", "highest"]
    lines = [_row(head), "|---|---|---:|---:|---:|---|"]
    for name, found in study["models"].items():
        for row in found["heads"]:
            random = [100 * row[key] for key in ("share_of_random_heads", "random_low", "random_high")]
            lines.append(_row([
                name, row["variant"], f"{100 * row['share_of_lost_heads']:.1f}",
                "{:.1f} [{:.1f}, {:.1f}]".format(*random), f"{row['rank_correlation']:.2f}",
                ", ".join(label for label, *_ in row["highest"][:3]),
            ]))  # fmt: skip
    return "\n".join(lines)


#: Rows of the studies of domains, by how the entry begins.
DOMAIN_ROWS = {
    "refit": "`refit`",
    "refit+all-weights": "refit, then all weights",
    "refit+low-rank": "refit, then low rank",
    "lora": "LoRA (q, k, v, o)",
    "lora-all": "LoRA (all linear)",
    "dora": "DoRA (q, k, v, o)",
    "perp": "PERP (biases and norms)",
    "perp-lora": "PERP (LoRA under the mask)",
    "all-weights": "all remaining weights and norm gains, no refit",
    "lcc": "`lcc`, the paper's",
}  # fmt: skip


def domain_table(study: dict[str, Any], *, only_best: bool = False) -> str:
    """Lost log-perplexity recovered on every kind of text; a star where the kind was not in the pool.

    Args:
        only_best: of every method the row at its best rate alone.
    """
    from lcc_lens.evaluation.comparison.compare import summary

    rows = [row for row in summary(study) if row["seeds"]]
    texts = [Path(text).stem for text in study["settings"]["texts"]]
    shown = rows[0]["domains"]
    names = [text if shown[text]["in_pool"] else f"{text} *" for text in texts]
    lines = [_row(["", "mean", "worst", *names, "KL to dense", "seeds"]), "|---|" + "---:|" * (len(texts) + 4)]
    for name, label in DOMAIN_ROWS.items():
        own = [row for row in rows if row["entry"].partition(":")[0] == name]
        for row in sorted(own, key=lambda row: -row["recovered_mean"])[: 1 if only_best else None]:
            cells = [_percent_of(row, "recovered_mean"), _percent_of(row, "recovered_worst")]
            cells += [f"{100 * row['domains'][text]['recovered']:.1f}" for text in texts]
            rate = f", rate {row['entry'].partition('=')[2]}" if len(own) > 1 else ""
            label_here = f"{_preset_like(row, study) or label}{rate}"
            lines.append(_row([label_here, *cells, f"{row['kl']:.3f}", str(row["seeds"])]))
    return "\n".join(lines)


def _preset_like(row: dict[str, Any], study: dict[str, Any]) -> str | None:
    """The preset that a row trains like, in steps as large; None if there is none."""
    from lcc_lens.evaluation.comparison.entry import Entry
    from lcc_lens.restoration.injections.spec import MethodSpec

    for name in ("best", "best-low-rank"):
        if Entry.parse(row["entry"]).trains_like(Entry.parse(name)):
            batch = MethodSpec.parse(name).preset.batch_size
            return f"`{name}`" if batch in (None, study["settings"]["batch_size"]) else None
    return None


def domain_overview(study: dict[str, Any]) -> str:
    """The mean and the worst of the domains alone, of every method at its best rate; of the baselines LoRA alone."""
    drawn = domain_table(study, only_best=True).splitlines()
    lines = [line.split("|") for line in drawn if not line.startswith(("| DoRA", "| PERP"))]
    return "\n".join("|".join([*line[:4], *line[-3:]]) for line in lines)


def budget_table(study: dict[str, Any]) -> str:
    """What a restoration within a time budget read, took and recovered."""
    runs = sorted(study["runs"].values(), key=lambda run: (run["method"], run["budget"]))
    lines = [
        _row(["", "minutes", "took", "refit, sequences", "trained, blocks", "the dense model writes", "mean",
              "worst"]),
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]  # fmt: skip
    for run in runs:
        cells = [
            f"`{run['method']}`",
            f"{run['budget'] / 60:g}",
            f"{run['took'] / 60:.1f}",
            str(run["refit_samples"]),
            str(run["blocks"]),
        ]
        found = [f"{100 * run['panel'][name]:.1f}" for name in ("mean", "worst")]
        lines.append(_row([*cells, "yes" if run["writes"] else "no", *found]))
    return "\n".join(lines)


def reconstruct_table(study: dict[str, Any]) -> str:
    """What `reconstruct` adds to a refit or to the pruned model, by window and learning rate, beside longer refits."""
    head = ["from", "layers in a window", "rate", "seconds", "mean", "worst"]
    lines = [_row(head), "|---|---:|---:|---:|---:|---:|"]
    labels = {"refit": "the refit", "refit-288": "a refit on 288 sequences", "pruned": "the pruned model"}
    for name, part in sorted(study["parts"].items(), key=lambda both: "seconds" in both[1]):  # refits alone come first
        start, window, rate = [name, "", ""] if name in labels else name.split("-", 2)
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
        found = [f"{100 * part[key]:.1f}" for key in ("mean", "worst")]
        lines.append(_row([labels[start], window, rate, seconds, *found]))
    return "\n".join(lines)


def _percent_of(row: dict[str, Any], key: str) -> str:
    spread = row[f"{key}_sd"]
    return f"{100 * row[key]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _named(rows: list[dict[str, Any]], variant: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["variant"] == variant), None)


def _interval(row: dict[str, Any] | None, key: str, sign: str = "+") -> str:
    """An estimate with its 95 % interval; empty where there is none, a dash for the raw prompt's own zeros."""
    if row is None:
        return ""
    values = [row[key], row[f"{key}_low"], row[f"{key}_high"]]
    return "–" if not any(values) else "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(*values, s=sign)


#: What stands between ``<!-- name -->`` and ``<!-- /name -->`` in a page: a file and how it is drawn.
MARKED: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "restorations": ("restorations_wanda50.json", restoration_table),
    "restorations 2:4": ("restorations_wanda24.json", restoration_table),
    "accuracies": ("restorations_first.json", accuracy_table),
    "accuracies 2:4": ("restorations_wanda24_scored.json", accuracy_table),
    "accuracies, mix": ("domains_mix_205k.json", lambda study: accuracy_table(with_best(study))),
    "differences, mix": ("domains_mix_205k.json", lambda study: difference_table(with_best(study))),
    "differences 2:4": ("restorations_wanda24_scored.json", difference_table),
    "restorations 2:4, two cores": ("restorations_wanda24_scored.json", restoration_table),
    "a quarter of the heads": ("restorations_first_quarter.json", restoration_table),
    "ratios": ("results.json", ratio_table),
    "prompts": ("prompts.json", prompt_table),
    "prompt heads": ("prompts.json", prompt_head_table),
    "prompts, 2:4": ("prompts_variants.json", prompt_table),
    "prompt heads, 2:4": ("prompts_variants.json", prompt_head_table),
    "domains": ("domains_wanda50.json", domain_table),
    "domains, mix": ("domains_mix_51k.json", domain_table),
    "domains, mix, more text": ("domains_mix_205k.json", domain_table),
    "domains, mix, more text in smaller steps": ("domains_mix_205k_batch2.json", domain_table),
    "domains, mix, smaller steps": ("domains_mix_51k_batch2.json", domain_table),
    "domains, mix, an hour's text": ("domains_mix_571k.json", domain_table),
    "domains, mix, an hour's text, 2:4": ("domains_mix_571k_wanda24.json", domain_table),
    "domains, mix, 2:4": ("domains_mix_51k_wanda24.json", domain_table),
    "domains, mix, 2:4, smaller steps": ("domains_mix_51k_wanda24_batch2.json", domain_table),
    "budgets": ("budgets.json", budget_table),
    "reconstruct": ("reconstruct.json", reconstruct_table),
    "domains, in short": ("domains_mix_51k_batch2.json", domain_overview),
    **{mark: ("causes.json", draw) for mark, draw in CAUSES.items()},
}


#: The same for comparisons on one task each: the pruned model.
MARKED_TASKS = {"tasks": "wanda60", "tasks, structured": "structured40"}


#: The README's table: the comparisons by the name of the pruned model.
OVERVIEW = {"Wanda 50 %": "restorations_wanda50.json", "Wanda 2:4": "restorations_wanda24.json"}


def marked_tables() -> dict[str, str]:
    """Every marked table by its mark, drawn anew."""
    return {
        "overview": overview_table({name: read(file) for name, file in OVERVIEW.items()}),
        **{name: draw(read(file)) for name, (file, draw) in MARKED.items()},
        **{name: one_task_table(read_tasks(model)) for name, model in MARKED_TASKS.items()},
    }


def between(text: str, begin: str, end: str, new: str) -> str:
    """A text with something new between two marks."""
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"expected the marks {begin.strip()} and {end.strip()} in the page, got no such; add them")
    return before + begin + new + end + after


def write_marked() -> None:
    """Draw every marked table again, in the page that has its mark."""
    tables = marked_tables()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            if f"<!-- {name} -->" in text:
                text = between(text, f"<!-- {name} -->\n", f"\n<!-- /{name} -->", table)
        page.write_text(text, encoding="utf-8")


def print_tables() -> None:
    """All tables, one below the other."""
    for table in (
        quality_table(read("pruning_quality.json")),
        time_table(read("pruning_quality.json")),
        peer_table(read("pruners.json")),
        report_table(read("report.json")),
        correlation_table(read("selector_study.json")),
        *(recovery_table(read("selector_study.json"), what) for what in MEASURE_LABELS),
        task_table(read("selector_study.json")),
        cost_table(read("scan_cost.json"), read("probes.json")),
        published_table(read("published.json")),
        *marked_tables().values(),
    ):
        print(table, end="\n\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the marked ones, into their pages")
    write_marked() if parser.parse_args().write else print_tables()
