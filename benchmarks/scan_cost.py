"""What a scan costs: time against the bare forwards that it needs, and memory above the models.

    python benchmarks/scan_cost.py [--examples 1000] [--repeats 2] [--out benchmarks/scan_cost.json]

The scan is that of Alpaca on the embedded model and its Wanda 50 % version, at the question's last token, with every
statistic of all three sites (spectra too), both probes and the losses token by token: from loaded models to a finished
artefact. The bare side runs the same sequences through plain transformers' models, batched by the same rule but each
read whole, without logits and with transformers' default attention: the dense model over question and right answer,
then over the wrong answer from the key-value cache, the pruned model over the question. Sides are interleaved.

Memory is the most during the scan above what is taken after one batch through both models, each in a process of its
own, for 100 and for all examples (as many as the data's probe share holds).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from run import compare, describe
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from lcc_lens.analysis.scan.contrastive import shared_length
from lcc_lens.analysis.scan.passes import ScanPlan
from lcc_lens.analysis.scan.request import pair_sequences
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import bound_kernel_cache
from lcc_lens.core.files import write_json
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.models.hooked.activations import SITES
from lcc_lens.models.hooked.kv_cache import cache_rows
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune

LENGTH = 512


def pruned_model(folder: Path) -> Path:
    if not folder.exists():
        prune("smollm2", folder, sparsity=0.5, calibration="c4", n_samples=64)
    return folder


def full_scan(pair: Pair, data: Data) -> Scan:
    return scan(pair, data, positions="last", spectra=SITES, max_length=LENGTH)


def plan_of(data: Data, pair: Pair) -> ScanPlan:
    right, wrong = pair_sequences(data, pair, LENGTH, None)
    return ScanPlan(tuple(right), wrong, "last", ("z",), 1024)


def bare_forwards(plan: ScanPlan, dense: Any, pruned: Any) -> None:
    questions = [TokenSequence(s.tokens[: s.loss_from], 1) for s in plan.sequences]
    with torch.inference_mode():
        for batch in batches(plan.sequences):
            cache = DynamicCache()
            dense(batch.tokens, past_key_values=cache, use_cache=True)
            right, wrong = ([side[i] for i in batch.index] for side in (plan.sequences, plan.wrong))
            _go_on(dense, cache, right, wrong)
        for batch in batches(questions):
            pruned(batch.tokens, use_cache=False)


def _go_on(model: Any, cache: Any, right: list[TokenSequence], wrong: list[TokenSequence]) -> None:
    lengths = torch.tensor([shared_length(r, w) for r, w in zip(right, wrong, strict=True)])
    for batch in batches([TokenSequence(w.tokens[int(n) :], 1) for w, n in zip(wrong, lengths, strict=True)]):
        shared = lengths[list(batch.index)]
        past = torch.arange(int(shared.max()))[None] < shared[:, None]
        mask = torch.cat([past, batch.is_valid()], dim=1).long()
        positions = shared[:, None] + torch.arange(batch.tokens.shape[1])
        rows = cache_rows(cache, batch.index, int(shared.max()))
        model(batch.tokens, past_key_values=rows, use_cache=True, attention_mask=mask, position_ids=positions)


class Peak:
    """The most memory of this process while the block runs, in MiB above the start; pages of mapped files do not count.

    Those come and go as the system likes.
    """

    def __enter__(self) -> Peak:
        self.process, self.running = psutil.Process(), True
        self.start = self.most = self._now()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def mib(self) -> float:
        return round((self.most - self.start) / 2**20, 1)

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self._now())
            time.sleep(0.005)

    def _now(self) -> int:
        memory = self.process.memory_info()
        return int(memory.rss - memory.shared)


def measure_memory(pruned: Path, n: int) -> dict[str, float]:
    """In this process: the scan of n examples."""
    pair, data = load_pair("smollm2", pruned), load_data("alpaca", n, role="probe")
    for model in (pair.dense, pair.pruned):
        model(torch.arange(512).reshape(4, 128))  # touches every weight
    with Peak() as peak:
        start = time.perf_counter()
        found = full_scan(pair, data)
        seconds = time.perf_counter() - start
    return {"examples": found.record.n_examples, "mib_above_models": peak.mib, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/scan_cost"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scan_cost.json"))
    parser.add_argument("--memory-of", type=int, help="only the memory of a scan of so many examples, as JSON")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    bound_kernel_cache()
    pruned = pruned_model(arguments.folder / "wanda50")
    if arguments.memory_of:
        print(json.dumps(measure_memory(pruned, arguments.memory_of)))
        return
    memory = []
    for n in (100, arguments.examples):
        command = [sys.executable, __file__, "--memory-of", str(n), "--folder", str(arguments.folder)]
        memory.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(memory[-1], flush=True)
    data = load_data("alpaca", arguments.examples, role="probe")
    pair = load_pair("smollm2", pruned)
    plan = plan_of(data, pair)
    dense, plain = (load_plain(path).get_decoder() for path in (pair.dense_id.path, pruned))
    few = Data(data.name, data.kind, data.examples[:64], data.source, data.role, data.negatives)
    full_scan(pair, few), bare_forwards(plan_of(few, pair), dense, plain)
    time_ratio = compare(
        lambda: full_scan(pair, data), lambda: bare_forwards(plan, dense, plain), arguments.repeats, warm_up=False
    )
    tokens = sum(map(len, plan.sequences)) + sum(s.loss_from for s in plan.sequences)
    result = {
        "command": "python benchmarks/scan_cost.py", "machine": describe(), "examples": len(plan.sequences),
        "tokens": tokens, "scan / bare forwards": time_ratio, "memory": memory,
    }  # fmt: skip
    write_json(arguments.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
