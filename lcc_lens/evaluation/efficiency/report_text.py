"""Tables and sentences of an efficiency report, from measured values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcc_lens.evaluation.efficiency.timing import CONFIDENCE
from lcc_lens.evaluation.formatting import interval
from lcc_lens.models.architecture.sparsity_patterns import shown_pattern

Entry = Mapping[str, Any]
#: A stored size this close to the first model's is the same size.
_SAME_SIZE = 0.99


def size_table(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each model's sparsity and the size of its weight files in megabytes."""
    columns = ["model", "sparsity", "pattern", "parameters", "MB", "zstd MB"]
    rows = [
        [
            name, f"{entry['sparsity']:.2%}", shown_pattern(entry["pattern"], entry.get("pattern_asked")),
            f"{entry['parameters']:,}", f"{entry['bytes'] / 1e6:.1f}", f"{entry['bytes_zstd'] / 1e6:.1f}",
        ]
        for name, entry in report["models"].items()
    ]  # fmt: skip
    return columns, rows


def time_table(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: median times with intervals, also as multiples of the first model's; no rows without times."""
    columns = ["model", "prefill ms", "to first", "decode ms/token", "to first"]
    rows = []
    for name, ratios in report["ratios"].items():
        row = [name]
        for kind in ("prefill", "decode"):
            # the interval has its own line, so that the table fits 80 columns
            row += [_median(report["models"][name][f"{kind}_ms"], ".1f", "\n"), _median(ratios[kind], ".2f", "\n")]
        rows.append(row)
    return columns, rows


def findings(report: Entry) -> list[str]:
    """One sentence per finding: zeros, sizes, slicing, 2:4 kernels, whether zeros agree, and loading."""
    return [
        *_about_zeros(report),
        *_about_slicing(report),
        *_about_kernels(report),
        *_about_patterns(report),
        *_about_loading(report),
    ]


def _about_zeros(report: Entry) -> list[str]:
    """Whether zeros alone save time or space: pruned models of the first one's size, if the first is dense."""
    models, first = report["models"], next(iter(report["models"]))
    pruned = [name for name, entry in models.items() if entry["pattern"] != "dense"]
    if not pruned:
        return []
    same_size = [name for name in pruned if models[name]["parameters"] >= models[first]["parameters"]]
    names = same_size if models[first]["pattern"] == "dense" else []
    no_speed = "Zeros stored in dense tensors bring no speed: dense kernels multiply them all the same"
    if not names:
        return [f"{no_speed}. (No dense model of the same size stands first, so none of this was measured.)"]
    return [*_zeros_in_time(report, names, no_speed), _zeros_on_disk(report, names)]


def _zeros_in_time(report: Entry, names: list[str], no_speed: str) -> list[str]:
    first, ratios = next(iter(report["models"])), report["ratios"]
    if not ratios:
        return [f"{no_speed}. (Times were not measured.)"]
    details = "; ".join(f"{name} took {_times(ratios[name])} times {first}'s time" for name in names)
    if any(_verdict(ratios[name]).startswith("faster") for name in names):
        return [
            f"Dense kernels multiply stored zeros all the same, so zeros are no reason for a shorter time: {details}. "
            "Run again with more --repeats to see whether the difference stays."
        ]
    return [f"{no_speed}. {details}."]


def _zeros_on_disk(report: Entry, names: list[str]) -> str:
    models, first = report["models"], next(iter(report["models"]))
    stored, packed = (
        {name: models[name][key] / models[first][key] for name in names} for key in ("bytes", "bytes_zstd")
    )
    only_packed = min(stored.values()) >= _SAME_SIZE > max(packed.values())
    head = "Files become smaller only when compressed" if only_packed else "Size of the files"
    details = "; ".join(f"{name} {stored[name]:.0%} as stored, {packed[name]:.0%} with zstd" for name in names)
    return f"{head}: of {first}'s size, {details}."


def _about_slicing(report: Entry) -> list[str]:
    """What fewer parameters save: models smaller than the first one."""
    models, first = report["models"], next(iter(report["models"]))
    sentences = []
    for name, entry in models.items():
        fraction = entry["parameters"] / models[first]["parameters"]
        if fraction < 1:
            text = f"{name} has {1 - fraction:.1%} fewer parameters than {first}"
            text += f" and {entry['bytes'] / models[first]['bytes']:.0%} of its size on disk"
            if report["ratios"]:
                ratios = report["ratios"][name]
                text += f"; it took {_times(ratios)} times its time: {_verdict(ratios)}"
            sentences.append(f"{text}.")
    return sentences


def _about_kernels(report: Entry) -> list[str]:
    first = next(iter(report["models"]))
    sentences = []
    for name, entry in report["models"].items():
        if entry["prefill_semi_structured_ms"]:
            ratio = _median(report["ratios"][name]["prefill_semi_structured"])
            note = entry["semi_structured_note"]
            sentences.append(f"{name} on the GPU's 2:4 kernels ({note}): prefill took {ratio} times {first}'s time.")
        elif entry["semi_structured_note"]:
            sentences.append(f"{name} on 2:4 kernels: {entry['semi_structured_note']}.")
    return sentences


def _about_patterns(report: Entry) -> list[str]:
    sentences, patterns = [], report["zero_patterns"]
    for name, compared in patterns["models"].items():
        if report["models"][name]["pattern"] == "dense":
            continue
        pair = f"{name} against {patterns['reference']}"
        if "note" in compared:
            sentences.append(f"{pair}: zeros not compared, {compared['note']}.")
        elif compared["is_equal"]:
            sentences.append(f"{pair}: same zeros, {compared['equal_matrices']} of {compared['matrices']} matrices.")
        else:
            different = next(iter(compared["different"]))
            n_different = compared["matrices"] - compared["equal_matrices"]
            sentences.append(
                f"{pair}: zeros differ in {n_different} of {compared['matrices']} matrices ({different} first); "
                f"{compared['both']:,} zero in both, {compared['only_first']:,} only in "
                f"{patterns['reference']}, {compared['only_second']:,} only in {name}."
            )
    return sentences


def _about_loading(report: Entry) -> list[str]:
    models = report["models"]
    sentences = [
        f"{name} lacks {len(entry['missing_parameters'])} tensors ({entry['missing_parameters'][0]} first), which "
        "transformers fills with random values."
        for name, entry in models.items()
        if entry["missing_parameters"]
    ]
    whole = [name for name, entry in models.items() if not entry["missing_parameters"]]
    if all(entry["loads_in_transformers"] for entry in models.values()) and whole:
        sentences.append(f"Load in plain transformers {report['machine']['transformers']}: {', '.join(whole)}.")
    return sentences


def _verdict(ratios: Entry) -> str:
    """Whether a model was faster than the first one: the whole interval of the ratio lies below 1."""
    if ratios["prefill"]["coverage"] < CONFIDENCE:
        return "too few rounds to tell"
    faster = [kind for kind in ("prefill", "decode") if ratios[kind]["high"] < 1]
    return {0: "no faster", 1: f"faster in {''.join(faster)} only", 2: "faster"}[len(faster)]


def _times(ratios: Entry) -> str:
    return f"{_median(ratios['prefill'])} (prefill) and {_median(ratios['decode'])} (decode)"


def _median(summary: Entry, form: str = ".2f", gap: str = " ") -> str:
    return f"{summary['median']:{form}}{gap}{interval([summary['low'], summary['high']], form)}"
