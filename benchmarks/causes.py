"""Why the heads of a pruned model lost: causes, head types and circuit tasks, and what finding causes costs.

    lcc-lens prune smollm2 out/wanda50 --method wanda --sparsity 0.5
    python benchmarks/causes.py smollm2 out/wanda50 [--out benchmarks/causes.json]

16 sequences of 256 tokens of C4, float32, one thread. Costs are CPU seconds of a scan without and with causes, and with
attribution patching, its default selector, once each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import lcc_lens as lcc
from lcc_lens.core.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pair = lcc.load_pair(arguments.dense, arguments.pruned, dtype=torch.float32)
    data = lcc.load_data("c4", n=16, role="probe")
    first = lcc.load_data("c4", n=1, role="probe")
    lcc.scan(pair, first, max_length=32, limit=2, display=0, selectors=("attribution",), causes=True)  # checks, once
    seconds: dict[str, float] = {}
    scans: dict[str, lcc.Scan] = {}
    for name, options in {
        "plain": {"selectors": ()},
        "causes": {"selectors": (), "causes": True},
        "attribution": {"selectors": ("attribution",)},
    }.items():
        start = time.process_time()
        scans[name] = lcc.scan(pair, data, max_length=256, limit=16, display=0, **options)
        seconds[name] = time.process_time() - start
        print(name, f"{seconds[name]:.0f} s", flush=True)
    types = lcc.head_types(pair, n_sequences=6, length=50)
    result = {**found(scans, types), "cpu_seconds": seconds, "tasks": tasks(pair)}
    write_json(arguments.out, result)


def found(scans: dict[str, lcc.Scan], types: lcc.HeadTypes) -> dict[str, Any]:
    """Means over heads and layers, the head that lost most by itself, selectors and circuits."""
    scan, attribution = scans["causes"], scans["attribution"].scores("attribution")
    heads = scan.causes.heads
    by_cause = heads.by_cause()
    inherited = by_cause["inherited"].clone()
    inherited[:2] = torch.inf  # the first layers read nearly the same stream
    own = lcc.Head(*divmod(int(inherited.argmin()), inherited.shape[1]))
    scores = {"own": lcc.HeadScores("own", heads.own, heads.own_stderr, 16), "mse": scan.scores("mse")}
    return {
        "mean_over_heads": {cause: float(value.double().nanmean()) for cause, value in by_cause.items()},
        "inherited_by_layer": [float(row.double().nanmean()) for row in by_cause["inherited"]],
        "mlp_mean": {c: float(value.double().nanmean()) for c, value in scan.causes.mlp.by_cause().items()},
        "largest_gap_of_the_sum": float((heads.mean.sum(2) - scan.mean_difference).abs().max()),
        "most_own_head": {
            "head": str(own),
            **{cause: float(value[own]) for cause, value in by_cause.items()},
            "value_constant": float(heads.constant_fraction[own][2]),
            "relative_loss": float(scan.relative_loss[own]),
            "sink": types.value["sink"][:, own.layer, own.head].tolist(),
        },
        "rank_correlation_with_attribution": {n: attribution.rank_correlation(s) for n, s in scores.items()},
        "induction": types.strongest("induction").to_dict("records"),
        "behaviour": types.behaviour()[["model", "first_copy", "repetition"]].to_dict("records"),
        "samples": scan.record.n_samples,
    }


def tasks(pair: lcc.Pair) -> dict[str, Any]:
    """Logit differences of both tasks, or why there are none."""
    rows: dict[str, Any] = {}
    for name in ("indirect-object", "greater-than"):
        try:
            rows[name] = lcc.circuit_task(pair, name, effects=False).table().to_dict("records")
        except lcc.RequestError as error:
            rows[name] = str(error)
    return rows


if __name__ == "__main__":
    main()
