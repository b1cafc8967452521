"""Peak memory of pruning, time by layer, and llm-compressor beside us on the same model and tokens.

    python benchmarks/pruners.py [--repeats 1] [--n-samples 16] [--peer OTHER_VENV/bin/python]

`--peer` names the Python of an environment with llm-compressor (see `llm_compressor.py`); both sides run in one format
and batch size and take turns within every round, and WikiText-2 perplexity is measured for both results as in
`pruning_quality.py`. Our time goes from reading the checkpoint to the written one, theirs is that of `oneshot` alone.
Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from pruning_quality import blocks, measure
from run import describe
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from lcc_lens.core.config import compute_dtype, default_device
from lcc_lens.core.files import write_json
from lcc_lens.core.progress import tracked_by
from lcc_lens.data.datasets import load_data
from lcc_lens.models.architecture.sparsity_patterns import NofM, Unstructured
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.calibration.texts import calibration_tokens
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.prune import prune_checkpoint

SEQ_LEN = 512
OURS: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "pattern": Unstructured(0.5)},
    "sparsegpt": {"method": "sparsegpt", "pattern": Unstructured(0.5)},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": NofM(2, 4)},
    "slimgpt 20%": {"method": "slimgpt", "pattern": Unstructured(0.2), "sliced": True},
}
PEER = {"wanda": ["--method", "wanda"], "sparsegpt": ["--method", "sparsegpt"]}


def tokens_of(n_samples: int) -> torch.Tensor:
    return calibration_tokens(load_data("c4", role="calibration"), resolve("smollm2"), n_samples, SEQ_LEN, seed=0)


def run_ours(name: str, tokens: torch.Tensor, out: Path) -> None:
    device = default_device()
    prune_checkpoint(
        resolve("smollm2"), out, PruneConfig(**OURS[name]), calibration=tokens, device=device,
        dtype=compute_dtype(device), overwrite=True, provenance={},
    )  # fmt: skip


def layer_seconds(name: str, tokens: torch.Tensor, out: Path) -> list[float]:
    """Seconds per layer, as the progress bar would see them."""
    marks: list[float] = []

    def watch(items: Any, total: int, description: str) -> Any:
        for item in items:
            if description == "pruning layers":
                marks.append(time.perf_counter())
            yield item
        marks.append(time.perf_counter())

    with tracked_by(watch):
        run_ours(name, tokens, out)
    return [round(b - a, 3) for a, b in pairwise(marks)]


def run_peer(python: Path, name: str, tokens_file: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    dtype = str(compute_dtype(default_device())).removeprefix("torch.")
    command = [
        str(python), str(Path(__file__).parent / "llm_compressor.py"), str(resolve("smollm2")), str(tokens_file),
        str(out), *PEER[name], "--dtype", dtype, "--batch-size", "8", "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory(name: str, n_samples: int) -> float:
    """Peak resident memory of a process that does nothing but prune, in MB."""
    code = (
        "import resource, sys, tempfile; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import pruners\n"
        "with tempfile.TemporaryDirectory() as f:\n"
        "    pruners.run_ours(sys.argv[2], pruners.tokens_of(int(sys.argv[3])), Path(f) / 'out')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), name, str(n_samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(float(done.stdout.strip().splitlines()[-1]), 0)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "smallest": round(min(values), 3),
        "largest": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--n-samples", type=int, default=16)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--memory", nargs="*", default=["sparsegpt"], choices=list(OURS))
    parser.add_argument("--memory-samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pruners.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Memory first: a child's peak begins at its parent's size.
    memory = {name: peak_memory(name, arguments.memory_samples) for name in arguments.memory}
    print(memory, flush=True)
    tokens = tokens_of(arguments.n_samples)
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    layers: dict[str, list[float]] = {}
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        for method in [method for _ in range(arguments.repeats) for method in PEER]:
            start = time.perf_counter()
            layers[method] = layer_seconds(method, tokens, folder / method)
            ours[method].append(time.perf_counter() - start)
            if arguments.peer:
                found = run_peer(arguments.peer, method, folder / "tokens.safetensors", folder / f"peer {method}")
                theirs[method].append(found["seconds"])
                versions = {key: found[key] for key in ("llmcompressor", "torch", "transformers")}
            print(method, ours[method][-1], theirs[method][-1:], flush=True)
        sequences = blocks() if arguments.peer else []
        compared = {
            method: {
                "ours_s": spread(ours[method]),
                "theirs_s": spread(values),
                "ratio": spread([a / b for a, b in zip(ours[method], values, strict=True)]),
                "our_perplexity": round(measure(folder / method, sequences)["perplexity"], 2),
                "their_perplexity": round(measure(folder / f"peer {method}", sequences)["perplexity"], 2),
            }
            for method, values in theirs.items()
        }
    result = {
        "command": "python benchmarks/pruners.py --peer OTHER_VENV/bin/python",
        "machine": describe(),
        "tokens": tokens.numel(),
        "layer_seconds": layers,
        "peak_memory_mb": {"tokens": arguments.memory_samples * SEQ_LEN, **memory},
        "llm_compressor": {"versions": versions, **compared} if theirs else None,
    }
    write_json(arguments.out, result)
    print(json.dumps(result["llm_compressor"], indent=1), flush=True)


if __name__ == "__main__":
    main()
