"""Time training and inference on the embedded model, as ratios against bare transformers in the same run.

    python benchmarks/run.py [--repeats 5] [--out benchmarks/results.json]

Every pair of timings is interleaved (ours, theirs, ours, ...), so that a slow moment of the machine hits both sides;
a ratio is the median over repeats of ours / theirs, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.config import compute_dtype, default_device, package_version
from lcc_lens.core.files import write_json
from lcc_lens.core.machine.memory import peak_memory, release_memory
from lcc_lens.core.reading import read_json
from lcc_lens.data.batches import Batch, batches
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.efficiency.timing import interleaved
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.demo import passages
from lcc_lens.models.hooked.losses import logits_where, token_kl_divergence, token_nll
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune, refit
from lcc_lens.restoration.injections.adapters import adapters
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import optimise
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.state import TrainingState

#: Methods whose training step is timed; the first also against LoRA's.
STEPS = ("lcc", "offset", "gain", "norms", "low-rank", "masked")


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Interleave both sides; gives the median ratio with its range, and both medians in seconds."""
    if warm_up:
        ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "smallest": round(ratios[0], 3),
        "largest": round(ratios[-1], 3),
        "ours_s": round(statistics.median(a for a, _ in pairs), 4),
        "theirs_s": round(statistics.median(b for _, b in pairs), 4),
    }


def training_steps(pair: Pair, found: Scan) -> dict[str, Callable[[], object]]:
    """One optimiser step of every method over the same batch, and the floor: what no training of activations avoids."""
    sequences = encode(passages("train", 8, 0), pair.tokenizer, max_length=128)
    config = TrainConfig(micro_tokens=1024)
    plain = load_plain(pair.pruned_id.path)
    grouped = batches(sequences, max_tokens=config.micro_tokens)
    given = Ingredients(pair.pruned, found.components, found.select("mse", share=1.0), pair.output_projections)

    def bare() -> None:
        for batch in grouped:
            _activation_backward(plain, batch)

    def step(injection: Injection) -> Callable[[], object]:
        state = TrainingState(injection, config, n_sequences=len(sequences), identity="")
        return lambda: optimise(pair.pruned, injection, state, sequences, None)

    own = {method: step(MethodSpec.parse(method).build(given)) for method in STEPS}
    return {"bare": bare, "lora": step(adapters(pair.pruned)), **own}


def bench_training(pair: Pair, found: Scan, repeats: int) -> dict[str, dict[str, float]]:
    """Every method's step against forward + activation backward of the plain model, and against peft's LoRA step."""
    steps = training_steps(pair, found)
    jobs = {name: functools.partial(timed, work) for name, work in steps.items()}
    seconds = interleaved(jobs, repeats, "training steps")
    rows = {}
    for base, floor in (("bare", "bare forward + activation backward"), ("lora", "LoRA step (peft; q, k, v, o)")):
        for name in ("lora", *STEPS) if base == "bare" else STEPS[:1]:
            rows[f"training step, {name} / {floor}"] = _ratios(seconds[name], seconds[base])
    return rows


def bench_polish(pair: Pair, repeats: int) -> dict[str, dict[str, float]]:
    """A step of ``polish`` against a step that trains all weights by the same loss and leaves zeros alone to change."""
    sequences = encode(passages("train", 8, 0), pair.tokenizer, max_length=256)
    config = TrainConfig(objective=Objective.parse("3*distillation+lm"), micro_tokens=1024)
    injection = MethodSpec.parse("all-weights").build(Ingredients.of(pair, None, ()))
    state = TrainingState(injection, config, n_sequences=len(sequences), identity="")
    student, teacher = load_plain(pair.pruned_id.path), load_plain(pair.dense_id.path)
    masters = [weight.detach().float().requires_grad_() for weight in student.parameters()]
    optimiser = torch.optim.AdamW(masters, lr=1e-4)
    grouped = batches(sequences, max_tokens=1024)

    def plain() -> None:
        for batch in grouped:
            tokens, counted = batch.tokens.to(student.device), batch.is_target().to(student.device)
            with torch.inference_mode():
                expected = logits_where(teacher, tokens, counted)
            found, targets = logits_where(student, tokens, counted), batch.targets().to(student.device)
            distance = token_kl_divergence(expected.clone(), found)
            (3 * distance + token_nll(found, targets)).sum().backward()
        with torch.no_grad():
            for weight, master in zip(student.parameters(), masters, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
            optimiser.step()
            for weight, master in zip(student.parameters(), masters, strict=True):
                weight.copy_(master)

    row = compare(lambda: optimise(pair.pruned, injection, state, sequences, pair.dense), plain, repeats)
    return {"polish step / plain distillation step, all weights": row}


def bench_refit(folder: Path, n_samples: int = 64) -> dict[str, dict[str, float]]:
    """A refit against the forward passes of both models over its tokens, once."""
    data = load_data("python", 4 * n_samples, role="calibration")
    tokenizer = AutoTokenizer.from_pretrained(folder / "pruned")
    models = [load_plain(resolve("smollm2")), load_plain(folder / "pruned")]
    blocks = [s.tokens for s in encode(data, tokenizer, max_length=512) if len(s) == 512][:n_samples]

    def read() -> None:
        with torch.inference_mode():
            for model, block in itertools.product(models, blocks):
                model(block[None].to(model.device), logits_to_keep=1)

    def fit() -> None:
        refit(
            "smollm2", folder / "pruned", folder / "refit", calibration="python", n_samples=len(blocks), overwrite=True
        )

    return {
        f"refit of {len(blocks)} x 512 tokens / forward passes of both models": compare(fit, read, 1, warm_up=False)
    }


def _ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "smallest": round(ratios[0], 3),
        "largest": round(ratios[-1], 3),
        "ours_s": round(statistics.median(ours), 4),
        "theirs_s": round(statistics.median(theirs), 4),
    }


def bench_memory(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """The most memory that a step takes beyond the loaded models, lcc against LoRA, each in a process of its own."""
    peaks: dict[str, list[float]] = {"lcc": [], "lora": []}
    for _ in range(repeats):
        for name, found in peaks.items():
            command = [sys.executable, __file__, "--memory-of", name, "--folder", str(folder)]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    row = _ratios(peaks["lcc"], peaks["lora"])
    row["ours_MiB"], row["theirs_MiB"] = row.pop("ours_s"), row.pop("theirs_s")
    return {"peak memory of a training step, lcc / LoRA": row}


def print_memory(name: str, folder: Path) -> None:
    """What one step takes, in MiB."""
    pair = load_pair(resolve("smollm2"), folder / "pruned")
    step = training_steps(pair, Scan.load(folder / "scan"))[name]
    release_memory()
    with peak_memory(device_of(pair.pruned), every=0.002) as peak:
        step()
    print(peak.mib)


def bench_latency(pair: Pair, found: Scan, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """The folded restoration against the pruned model: a prompt of 256 tokens, and 24 tokens one by one."""
    injection = LccInjection(found.components, found.select("mse", share=1.0), start="mean")
    identity = (pair.dense_id.reference, str(pair.pruned_id.path), pair.dense_id.sha256, pair.pruned_id.sha256)
    restoration = Restoration.of(injection, RestorationRecord(*identity, "lcc", "none", 0, 0))
    export(restoration, pair.pruned_id.path, folder / "restored")
    restored, pruned = load_plain(folder / "restored"), load_plain(pair.pruned_id.path)
    tokens = torch.arange(256)[None] * 131 % 40000

    def prefill(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            model(tokens.to(model.device), logits_to_keep=1)

    def decode(model: torch.nn.Module) -> None:
        model.generate(tokens[:, :16].to(model.device), max_new_tokens=24, min_new_tokens=24, do_sample=False)

    return {
        "restored / pruned, prefill 256": compare(lambda: prefill(restored), lambda: prefill(pruned), 3 * repeats),
        "restored / pruned, decode 24": compare(lambda: decode(restored), lambda: decode(pruned), 3 * repeats),
    }


def _activation_backward(model: torch.nn.Module, batch: Batch) -> None:
    """Backward through all activations and no weight: the input embeddings are the only thing that takes gradient."""
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        logits = logits_where(model, batch.tokens.to(model.device), batch.is_target().to(model.device))
        token_nll(logits, batch.targets().to(model.device)).sum().backward()
    finally:
        handle.remove()


def describe() -> dict[str, object]:
    device = default_device()
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "lcc_lens": package_version(),
    }


def rounded(value: Any) -> Any:
    """Few digits, for a file that people read; None for NaN, where no number is defined."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.4g}")
    return value


def command_given(*places: str) -> str:
    """The command of a script as it was given, without the options that name places."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word not in places or not next(words, None)]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


#: What is measured, by its name on the command line.
PARTS: dict[str, Callable[[Pair, Scan, Path, int], dict[str, dict[str, float]]]] = {
    "training": lambda pair, found, folder, repeats: bench_training(pair, found, repeats),
    "polish": lambda pair, found, folder, repeats: bench_polish(pair, repeats),
    "refit": lambda pair, found, folder, repeats: bench_refit(folder),
    "latency": bench_latency,
    "memory": lambda pair, found, folder, repeats: bench_memory(folder, min(3, repeats)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="measure these anew; others stay as the file has them"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.memory_of:
        print_memory(arguments.memory_of, arguments.folder)
        return
    asked = arguments.parts or list(PARTS)
    results = read_json(arguments.out)["ratios"] if arguments.parts else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prune("smollm2", folder / "pruned", method="magnitude")
        pair = load_pair(resolve("smollm2"), folder / "pruned")
        found = scan(pair, load_data("boolq", 8, role="probe"), max_length=256, run=folder / "scan")
        for part in asked:
            for title, row in PARTS[part](pair, found, folder, arguments.repeats).items():
                results[title] = row
                print(f"{title:<55} {row['ratio']:.3f}  ({row['smallest']:.3f} to {row['largest']:.3f})", flush=True)
    write_json(arguments.out, {"command": "make bench", "machine": describe(), "ratios": results})


if __name__ == "__main__":
    main()
