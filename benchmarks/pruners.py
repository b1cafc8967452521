"""Time every pruner against two bare forward passes of the same tokens, and against llm-compressor.

    python benchmarks/pruners.py [--repeats 3] [--n-samples 32] [--peer OTHER_VENV/bin/python] [--out ...]

Two passes through every layer are the least that pruning layer after layer needs: one to see a layer's inputs, one to
feed the next. They are timed on the model's body, without the unembedding, which pruning never runs. A pruner's time is
that of `lcc_lens.pruning.prune`, from loading to the written checkpoint. All sides take turns within every round; a
ratio is the median over rounds. `--peer` names the Python of an environment with llm-compressor (see
`llm_compressor.py`); both sides then run in one format and batch size, and WikiText-2 perplexity (every sixth block of
512 tokens) is measured for both results. Peak memory is that of a process of its own.
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
from run import describe, timed
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from lcc_lens.config import compute_dtype, default_device
from lcc_lens.data import load_data
from lcc_lens.files import write_json
from lcc_lens.models import load_plain, resolve
from lcc_lens.progress import tracked_by
from lcc_lens.pruning import NofM, Unstructured, prune
from lcc_lens.recipe import calibration_tokens

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
    prune(
        resolve("smollm2"), out, calibration=tokens, seed=0, device=device, dtype=compute_dtype(device),
        overwrite=True, provenance={}, **OURS[name],
    )  # fmt: skip


def two_passes(model: Any, tokens: torch.Tensor, batch_size: int = 8) -> None:
    body = model.get_decoder()
    with torch.inference_mode():
        for _ in range(2):
            for start in range(0, len(tokens), batch_size):
                body(tokens[start : start + batch_size].to(model.device), use_cache=False)


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--memory-samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pruners.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Memory first: a child's peak begins at its parent's size.
    memory = {name: peak_memory(name, arguments.memory_samples) for name in ("wanda", "sparsegpt", "slimgpt 20%")}
    print(memory, flush=True)
    tokens = tokens_of(arguments.n_samples)
    seconds: dict[str, list[float]] = defaultdict(list)
    peers: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        plain = load_plain(resolve("smollm2"))
        two_passes(plain, tokens[:8])
        for _ in range(arguments.repeats):
            seconds["two passes"].append(timed(lambda: two_passes(plain, tokens)))
            for method in OURS:
                seconds[method].append(timed(lambda method=method: run_ours(method, tokens, folder / method)))
            for method in PEER if arguments.peer else ():
                found = run_peer(arguments.peer, method, folder / "tokens.safetensors", folder / f"peer {method}")
                peers[method].append(found["seconds"])
                versions = {key: found[key] for key in ("llmcompressor", "torch", "transformers")}
            print({key: round(values[-1], 1) for key, values in [*seconds.items(), *peers.items()]}, flush=True)
        layers = {method: layer_seconds(method, tokens, folder / method) for method in OURS}
        sequences = blocks()
        compared = {
            method: {
                "ours_s": spread(seconds[method]),
                "theirs_s": spread(values),
                "ratio": spread([a / b for a, b in zip(seconds[method], values, strict=True)]),
                "our_perplexity": round(measure(folder / method, sequences)["perplexity"], 2),
                "their_perplexity": round(measure(folder / f"peer {method}", sequences)["perplexity"], 2),
            }
            for method, values in peers.items()
        }
    base = seconds["two passes"]
    result = {
        "command": "python benchmarks/pruners.py --peer OTHER_VENV/bin/python" if peers else "make bench",
        "machine": describe(),
        "tokens": tokens.numel(),
        "two_passes_s": spread(base),
        "ratio_to_two_passes": {
            method: spread([a / b for a, b in zip(seconds[method], base, strict=True)]) for method in OURS
        },
        "layer_seconds": layers,
        "peak_memory_mb": {"tokens": arguments.memory_samples * SEQ_LEN, **memory},
        "llm_compressor": {"versions": versions, **compared} if peers else None,
    }
    write_json(arguments.out, result)
    print(json.dumps(result["ratio_to_two_passes"], indent=1), flush=True)


if __name__ == "__main__":
    main()
