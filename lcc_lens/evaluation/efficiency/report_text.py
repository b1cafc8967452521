"""The efficiency report in words: a table, and sentences that say only what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcc_lens.evaluation.efficiency.timing import CONFIDENCE

Entry = Mapping[str, Any]
#: A stored size this close to the first model's is the same size.
_SAME_SIZE = 0.99


def size_table(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how sparse every model is and how large, in megabytes of weight files."""
    columns = ["model", "sparsity", "pattern", "parameters", "MB", "zstd MB"]
    rows = [
        [
            name, f"{entry['sparsity']:.2%}", entry["pattern"], f"{entry['parameters']:,}",
            f"{entry['bytes'] / 1e6:.1f}", f"{entry['bytes_zstd'] / 1e6:.1f}",
        ]
        for name, entry in report["models"].items()
    ]  # fmt: skip
    return columns, rows


def time_table(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: medians with their intervals, and as multiples of the first model; no rows without times."""
    columns = ["model", "prefill ms", "to first", "decode ms/token", "to first"]
    rows = []
    for name, ratios in report["ratios"].items():
        cells = [name]
        for kind in ("prefill", "decode"):
            # An interval in a line of its own: the table fits 80 columns.
            cells += [_interval(report["models"][name][f"{kind}_ms"], 1, "\n"), _interval(ratios[kind], 2, "\n")]
        rows.append(cells)
    return columns, rows


def findings(report: Entry) -> list[str]:
    """What the numbers say, one sentence each: zeros, sizes, slicing, 2:4 kernels, same zeros or not, loading."""
    return [
        *_about_zeros(report),
        *_about_slicing(report),
        *_about_kernels(report),
        *_about_patterns(report),
        *_about_loading(report),
    ]


def _about_zeros(report: Entry) -> list[str]:
    """Whether zeros alone bought time or space: models of the first one's size, held to it where it is dense."""
    models, first = report["models"], next(iter(report["models"]))
    pruned = [name for name, entry in models.items() if entry["pattern"] != "dense"]
    if not pruned:
        return []
    same_size = [name for name in pruned if models[name]["parameters"] >= models[first]["parameters"]]
    held = same_size if models[first]["pattern"] == "dense" else []
    no_speed = "Zeros stored in dense tensors bring no speed: dense kernels multiply them all the same"
    if not held:
        return [f"{no_speed}. (No dense model of the same size stands first, so none of this was measured.)"]
    return [*_zeros_in_time(report, held, no_speed), _zeros_on_disk(report, held)]


def _zeros_in_time(report: Entry, held: list[str], no_speed: str) -> list[str]:
    first, ratios = next(iter(report["models"])), report["ratios"]
    if not ratios:
        return [f"{no_speed}. (Times were not measured.)"]
    told = "; ".join(f"{name} took {_times(ratios[name])} times {first}'s time" for name in held)
    if any(_verdict(ratios[name]).startswith("faster") for name in held):
        return [
            f"Dense kernels multiply stored zeros all the same, so zeros are no reason for a shorter time: {told}. "
            "Run again with more --repeats to see whether the difference stays."
        ]
    return [f"{no_speed}. {told}."]


def _zeros_on_disk(report: Entry, held: list[str]) -> str:
    models, first = report["models"], next(iter(report["models"]))
    stored, packed = (
        {name: models[name][key] / models[first][key] for name in held} for key in ("bytes", "bytes_zstd")
    )
    only_packed = min(stored.values()) >= _SAME_SIZE > max(packed.values())
    head = "Files become smaller only when compressed" if only_packed else "Size of the files"
    told = "; ".join(f"{name} {stored[name]:.0%} as stored, {packed[name]:.0%} with zstd" for name in held)
    return f"{head}: of {first}'s size, {told}."


def _about_slicing(report: Entry) -> list[str]:
    """What fewer parameters bought: models smaller than the first one."""
    models, first = report["models"], next(iter(report["models"]))
    told = []
    for name, entry in models.items():
        share = entry["parameters"] / models[first]["parameters"]
        if share < 1:
            text = f"{name} has {1 - share:.1%} fewer parameters than {first}"
            text += f" and {entry['bytes'] / models[first]['bytes']:.0%} of its size on disk"
            if report["ratios"]:
                ratios = report["ratios"][name]
                text += f"; it took {_times(ratios)} times its time: {_verdict(ratios)}"
            told.append(f"{text}.")
    return told


def _about_kernels(report: Entry) -> list[str]:
    first = next(iter(report["models"]))
    told = []
    for name, entry in report["models"].items():
        if entry["prefill_semi_structured_ms"]:
            ratio = _interval(report["ratios"][name]["prefill_semi_structured"])
            note = entry["semi_structured_note"]
            told.append(f"{name} on the GPU's 2:4 kernels ({note}): prefill took {ratio} times {first}'s time.")
        elif entry["semi_structured_note"]:
            told.append(f"{name} on 2:4 kernels: {entry['semi_structured_note']}.")
    return told


def _about_patterns(report: Entry) -> list[str]:
    told, patterns = [], report["zero_patterns"]
    for name, found in patterns["models"].items():
        if report["models"][name]["pattern"] == "dense":
            continue
        pair = f"{name} against {patterns['reference']}"
        if "note" in found:
            told.append(f"{pair}: zeros not compared, {found['note']}.")
        elif found["is_equal"]:
            told.append(f"{pair}: same zeros, {found['equal_matrices']} of {found['matrices']} matrices.")
        else:
            different = next(iter(found["different"]))
            n_different = found["matrices"] - found["equal_matrices"]
            told.append(
                f"{pair}: zeros differ in {n_different} of {found['matrices']} matrices ({different} first); "
                f"{found['both']:,} zero in both, {found['only_first']:,} only in "
                f"{patterns['reference']}, {found['only_second']:,} only in {name}."
            )
    return told


def _about_loading(report: Entry) -> list[str]:
    models = report["models"]
    told = [
        f"{name} lacks {len(entry['missing_parameters'])} tensors ({entry['missing_parameters'][0]} first), which "
        "transformers fills with random numbers."
        for name, entry in models.items()
        if entry["missing_parameters"]
    ]
    whole = [name for name, entry in models.items() if not entry["missing_parameters"]]
    if all(entry["loads_in_transformers"] for entry in models.values()) and whole:
        told.append(f"Load in plain transformers {report['machine']['transformers']}: {', '.join(whole)}.")
    return told


def _verdict(ratios: Entry) -> str:
    """Where a model was faster than the first one by more than the interval of the ratio."""
    if ratios["prefill"]["coverage"] < CONFIDENCE:
        return "too few rounds to tell"
    faster = [kind for kind in ("prefill", "decode") if ratios[kind]["high"] < 1]
    return {0: "no faster", 1: f"faster in {''.join(faster)} only", 2: "faster"}[len(faster)]


def _times(ratios: Entry) -> str:
    return f"{_interval(ratios['prefill'])} (prefill) and {_interval(ratios['decode'])} (decode)"


def _interval(summary: Entry, digits: int = 2, gap: str = " ") -> str:
    median, low, high = (f"{summary[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median}{gap}[{low}, {high}]"
