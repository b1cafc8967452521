"""The published extraction beside our scan: the same models, the same tokens, seconds and results of both.

    python benchmarks/published.py [--examples 100] [--tasks alpaca boolq] [--repeats 1] [--peer-python PYTHON]

The published side is `published_extraction.py` in a virtual environment of its own (its head tells how to install it):
one sequence at a time, four full passes an example. Ours is `scan` at the question's last token. Within every round the
sides take turns. Seconds are those of the extraction, passes through the models and decomposition; imports, loading
and tokenising lie outside, and the probes are a part of their own. Ours keeps inside what a scan does besides, such as
counting the pruned model's zeros on disk. A ratio is ours / published.

`as each runs by default`: the published code loads its models in float32, ours in bfloat16 where the processor
multiplies it natively; our scan then also compares the MLP and the residual stream, keeps the loss at single tokens and
fits a second probe. `both float32` and `both bfloat16` do the same work on both sides, head outputs and the published
probe alone. Results are compared there in float32: singular values relative to the head's largest one, component
vectors relative to their own length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from pruners import spread
from run import describe
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.files import read_tensors, write_json
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import encode_pair
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune

RUNS = Path(__file__).parent.parent / "runs"
PUBLISHED = Path(__file__).parent / "published_extraction.py"
MAX_LENGTH = 512
#: What our scan is told to do no more than the published code.
SAME_WORK: dict[str, Any] = {"sites": ("z",), "selectors": ("probe",), "probe_solver": "published", "display": 0}
#: Functions within `lcc_lens.analysis.scan.scan` whose seconds are not extraction, by part.
OUR_PARTS = {"tokenising": "pair_sequences", "probes": "score"}


def pruned_model() -> Path:
    """The embedded model after Wanda at 50 %, made once."""
    folder = RUNS / "published" / "wanda50"
    if not folder.exists():
        prune("smollm2", folder, method="wanda", sparsity=0.5, n_samples=16)
    return folder


def tokens_of(data: Data, dense: Path) -> list[dict[str, list[int]]]:
    """Token ids of every pair that fits, as our scan encodes them."""
    tokenizer, examples = load_tokenizer(dense), []
    for example in data.examples:
        right, wrong = (
            encode_pair(tokenizer, example.prompt, str(text), MAX_LENGTH) for text in (example.response, example.wrong)
        )
        if right is not None and wrong is not None:
            question = right.tokens[: right.loss_from].tolist()
            examples.append({"question": question, "right": right.tokens.tolist(), "wrong": wrong.tokens.tolist()})
    return examples


def run_ours(pair: Pair, data: Data, settings: dict[str, Any]) -> tuple[Scan, dict[str, float]]:
    """Our scan with its seconds by part: extraction, probes, tokenising."""
    scan(pair, replace(data, examples=data.examples[:4]), positions="last", max_length=MAX_LENGTH, **settings)
    with seconds_within(sys.modules["lcc_lens.analysis.scan.scan"], OUR_PARTS) as seconds:
        start = time.perf_counter()
        found = scan(pair, data, positions="last", max_length=MAX_LENGTH, **settings)
        total = time.perf_counter() - start
    return found, {"extraction": total - sum(seconds.values()), **seconds}


@contextmanager
def seconds_within(module: Any, parts: dict[str, str]) -> Iterator[dict[str, float]]:
    """Seconds spent in functions that a module calls by name, by part."""
    seconds = dict.fromkeys(parts, 0.0)

    def watched(part: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for part, name in parts.items():
            stack.enter_context(mock.patch.object(module, name, watched(part, getattr(module, name))))
        yield seconds


def run_published(
    python: Path, models: tuple[Path, Path], tokens: Path, dtype: str, *, with_probes: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The published side's tensors and record."""
    out = tokens.with_suffix(f".{dtype}.safetensors")
    command = [
        str(python), str(PUBLISHED), *map(str, models), str(tokens), str(out), "--dtype", dtype,
        "--device", str(default_device()), "--threads", str(torch.get_num_threads()),
        *([] if with_probes else ["--no-probes"]),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PUBLISHED.name} failed:\n{done.stderr.strip()[-2000:]}")
    record = read_json(out.with_suffix(".json"))
    record["seconds"]["extraction"] = record["seconds"]["passes"] + record["seconds"]["svd"]
    return read_tensors(out)[0], record


def differences(ours: LostComponents, published: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative differences over all heads."""
    S, V = published["singular_values"].double(), published["directions"].double()
    k = S.shape[-1]  # fewer than d_head where there are fewer examples
    theirs = published["coefficients"].double()[..., None] * V
    result = {"singular_values": float(((ours.singular_values[..., :k] - S).abs() / S[..., :1]).max())}
    for name, rank in (("component", k), ("component_rank_1", 1)):
        component = theirs[..., :rank, :].sum(-2)
        distance = (ours.component(rank) - component).norm(dim=-1)
        result[name] = float((distance / component.norm(dim=-1)).max())
    return {name: float(f"{value:.3g}") for name, value in result.items()}


def probe_agreement(ours: Tensor, published: Tensor) -> dict[str, float]:
    """Both sides' probe accuracies: the seed holds out the same pairs and draws the same starts."""
    return {
        "ours_mean": round(float(ours.mean()), 4),
        "published_mean": round(float(published.mean()), 4),
        "mean_absolute_difference": round(float((ours - published).abs().mean()), 4),
    }


def compared(ours: list[float], published: list[float]) -> dict[str, Any]:
    """Both sides' seconds and their ratio, round by round."""
    ratios = [a / b for a, b in zip(ours, published, strict=True)]
    return {"ours_s": spread(ours), "published_s": spread(published), "ratio": spread(ratios)}


def bench(task: str, pairs: dict[str, Pair], python: Path, n: int, repeats: int, folder: Path) -> dict[str, Any]:
    """One task: both sides in every format, in turns."""
    models = resolve("smollm2"), pruned_model()
    data = load_data(task, n, role="probe")
    examples = tokens_of(data, models[0])
    tokens = folder / f"{task}.json"
    tokens.write_text(json.dumps(examples), encoding="utf-8")
    times: dict[tuple[str, str], list[float]] = defaultdict(list)

    def note(side: str, seconds: dict[str, float]) -> None:
        print(task, side, seconds, flush=True)
        for part, value in seconds.items():
            times[side, part].append(value)

    result: dict[str, Any] = {"source": data.source, "examples": len(examples)}
    for _ in range(repeats):
        note("ours by default", run_ours(pairs[default_format()], data, {})[1])
        for dtype, pair in pairs.items():
            with_probes = dtype == "float32"
            tensors, record = run_published(python, models, tokens, dtype, with_probes=with_probes)
            note(f"published {dtype}", record["seconds"])
            found, seconds = run_ours(pair, data, SAME_WORK)
            note(f"ours {dtype}", seconds)
            if found.record.n_examples != len(examples):
                raise SystemExit(
                    f"expected the same {len(examples)} pairs on both sides, got {found.record.n_examples}"
                )
            if with_probes:
                result["largest_relative_difference"] = differences(found.components, tensors)
                result["probe_accuracy"] = probe_agreement(found.scores("probe").value, tensors["probe_accuracy"])
            result["published"] = {name: record[name] for name in ("pyvene", "torch", "transformers", "tokens")}

    def ratio(part: str, ours: str, published: str) -> dict[str, Any]:
        return compared(times[f"ours {ours}", part], times[f"published {published}", part])

    for part, formats in (("extraction", list(pairs)), ("probes", ["float32"])):
        result[part] = {
            "as each runs by default": ratio(part, "by default", "float32"),
            **{f"both {dtype}": ratio(part, dtype, dtype) for dtype in formats},
        }
    return result


def default_format() -> str:
    """The number format in which our side runs on this machine."""
    return str(compute_dtype(default_device())).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=["alpaca", "boolq"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, default=RUNS / "pyvene" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "published.json")
    arguments = parser.parse_args()
    if not arguments.peer_python.exists():
        raise SystemExit(
            f"expected the Python of an environment with pyvene, got none at {arguments.peer_python}; install it with\n"
            "    python3 -m venv runs/pyvene\n"
            "    runs/pyvene/bin/pip install torch==2.13.0\n"
            "    echo 'torch==2.13.0' > torch-constraint.txt\n"
            "    runs/pyvene/bin/pip install -c torch-constraint.txt pyvene==0.1.8"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device, pruned = default_device(), pruned_model()
    dtypes = {"float32": torch.float32, default_format(): compute_dtype(device)}
    pairs = {name: load_pair("smollm2", pruned, device=device, dtype=dtype) for name, dtype in dtypes.items()}
    with tempfile.TemporaryDirectory() as name:
        tasks = {
            task: bench(task, pairs, arguments.peer_python, arguments.examples, arguments.repeats, Path(name))
            for task in arguments.tasks
        }
    result = {"command": "python benchmarks/published.py", "machine": describe(), "tasks": tasks}
    write_json(arguments.out, result)
    print(json.dumps(tasks, indent=1), flush=True)


if __name__ == "__main__":
    main()
