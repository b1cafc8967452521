"""The whole method on a model of 7 billion weights, one model and one layer in memory at a time.

    python benchmarks/seven_billion.py FOLDER [--shape 7b] [--device-map disk] [--out benchmarks/seven_billion.json]
    python benchmarks/memory_table.py

Makes a random-weight Llama of 7B shape in bfloat16 (13.5 GB, a file per layer), prunes it by Wanda to 2:4, scans 32
short examples, gives it a mean-shift restoration, reconstructs it one layer at a time, and exports it verified. Every
step is a command in a process of its own, whose time and peak resident memory are written down; of the peak, anonymous
memory is what cannot be read again from a file. FOLDER needs 70 GB of disk for 7b (10 GB for 1b) and may be on any;
steps whose result is there are passed over. Results go beside those of the other shapes; the second command puts them
into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from memory_table import MODELS, Shape
from run import describe
from safetensors.torch import save_file
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.files import write_json
from lcc_lens.core.outputs.folders import atomic_directory
from lcc_lens.core.reading import read_json
from lcc_lens.core.rewriting import tensor_bytes

SEED = 0
DENSE, PRUNED, RUN, CLOSER, RESTORED = "dense", "pruned", "run", "closer", "restored"
SHARDS = "model.safetensors.index.json"


SHAPES = {
    "tiny": Shape(3, 64, 176, 4, 4, 300),
    "small": Shape(12, 768, 2048, 12, 12, 32000),
    "1b": Shape(16, 2048, 5632, 16, 16, 32000),
    "7b, four layers": Shape(4, 4096, 11008, 32, 32, 32000),
    "7b": MODELS["Llama 7B"],
}


def make_model(path: Path, shape: Shape) -> None:
    """Write the model, one layer in memory at a time."""
    names: dict[str, str] = {}
    with atomic_directory(path) as part:
        n = shape.n_layers + 1
        for number, tensors in enumerate(_parts(shape), 1):
            file = f"model-{number:05d}-of-{n:05d}.safetensors"
            save_file(tensors, part / file, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, file)
        total = sum(tensor_bytes(file) for file in part.glob("*.safetensors"))
        write_json(part / SHARDS, {"metadata": {"total_size": total}, "weight_map": names})
        _write_config(part, shape)
        _write_tokenizer(part)


def _parts(shape: Shape) -> Iterator[dict[str, Tensor]]:
    """The tensors of every layer, then those around the layers."""
    generator = torch.Generator().manual_seed(SEED)

    def matrix(n_out: int, n_in: int) -> Tensor:
        return (torch.randn(n_out, n_in, generator=generator) * n_in**-0.5).bfloat16()

    def ones() -> Tensor:
        return torch.ones(shape.d_model, dtype=torch.bfloat16)

    d, f = shape.d_model, shape.d_mlp
    kv = shape.n_key_value_heads * shape.d_head
    sizes = {f"self_attn.{name}_proj": (d if name in "qo" else kv, d) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    for layer in range(shape.n_layers):
        tensors = {name: matrix(*size) for name, size in sizes.items()}
        tensors |= {"input_layernorm": ones(), "post_attention_layernorm": ones()}
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    yield {
        "model.embed_tokens.weight": matrix(shape.d_vocab, d),
        "lm_head.weight": matrix(shape.d_vocab, d),
        "model.norm.weight": ones(),
    }


def _write_config(path: Path, shape: Shape) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=shape.d_model, intermediate_size=shape.d_mlp, num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_key_value_heads, vocab_size=shape.d_vocab,
        max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    ).save_pretrained(path)  # fmt: skip


def _write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: no words are needed where weights are random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(path)


def write_data(folder: Path) -> None:
    """Text to calibrate on, and short questions with a right and a wrong answer."""
    text = (f"Paragraph {i} says that {i} times {i} is {i * i}, which nobody doubts." for i in range(400))
    (folder / "text.txt").write_text("\n\n".join(text))
    questions = (
        {"question": f"Is {a} plus {b} more than {c}?", "right": f" {a + b > c}", "wrong": f" {a + b <= c}"}
        for a in range(12)
        for b in range(9)
        for c in (3, 5, 8, 11)
    )
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def commands(folder: Path, shape: str, device_map: str) -> dict[str, tuple[Path, list[str]]]:
    """By step: what shows that it is done, and the command."""
    dense, pruned, run, restored = (str(folder / name) for name in (DENSE, PRUNED, RUN, RESTORED))
    closer = str(folder / CLOSER)
    lens, data = [sys.executable, "-m", "lcc_lens"], ["--data", str(folder / "questions.jsonl")]
    placed = ["--quiet", *(() if device_map == "none" else ("--device-map", device_map))]
    calibration = ["--calibration", str(folder / "text.txt"), "--n-samples", "8", "--seq-len", "128"]
    training = [*calibration[:2], "--n-samples", "16", "--seq-len", "128", "--window", "1", "--epochs", "1"]
    scanning = ["--examples", "32", "--one-at-a-time"]
    restoring = ["--examples", "32", "--method", "mean-shift", "--selector", "mse", "--one-at-a-time"]
    return {
        "make": (folder / DENSE, [sys.executable, __file__, str(folder), "--shape", shape, "--make"]),
        "prune": (folder / PRUNED, [*lens, "prune", dense, pruned, "--pattern", "2:4", *calibration, *placed]),
        "scan": (folder / RUN / "scan.json", [*lens, "scan", dense, pruned, run, *data, *scanning, *placed]),
        "restore": (folder / RUN / "metrics.json", [*lens, "restore", dense, pruned, run, *data, *restoring, *placed]),
        "reconstruct": (
            folder / CLOSER,
            [*lens, "reconstruct", dense, pruned, closer, *training, *placed],
        ),
        "export": (folder / RESTORED, [*lens, "export", run, restored, *placed]),
    }


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    seconds: float
    peak_gib: float
    peak_anonymous_gib: float


def measured(command: list[str]) -> Cost:
    """Run a process to its end; raises where it fails."""
    start, ended, anonymous = time.perf_counter(), threading.Event(), [0]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def watch() -> None:
        while not ended.wait(0.1):
            anonymous.append(max(anonymous.pop(), _anonymous_kib(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return Cost(round(seconds, 1), round(usage.ru_maxrss / 2**20, 3), round(anonymous[0] / 2**20, 3))


def _anonymous_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def found(folder: Path) -> dict[str, Any]:
    """What the steps made."""
    pruning, scanned = read_json(folder / PRUNED / "pruning.json"), read_json(folder / RUN / "scan.json")
    size = sum(map(tensor_bytes, Checkpoint(folder / DENSE).weight_files))
    return {
        "parameters": size // 2,
        "dense_gb": round(size / 1e9, 2),
        "pattern": pruning["pattern_found"],
        "sparsity": round(pruning["sparsity"], 4),
        "scanned_examples": scanned["n_examples"],
        "scanned_tokens": scanned["n_samples"],
        "losses": read_json(folder / RUN / "metrics.json")["validation"]["losses"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device-map", choices=("disk", "none"), default="disk")
    parser.add_argument("--make", action="store_true", help="write the dense model and nothing else")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args(arguments)
    if asked.make:
        make_model(asked.folder / DENSE, SHAPES[asked.shape])
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_data(asked.folder)
    notes = asked.folder / "costs.json"
    costs = read_json(notes) if notes.exists() else {}
    for step, (result, command) in commands(asked.folder, asked.shape, asked.device_map).items():
        if not result.exists():
            costs[step] = asdict(measured(command))
            write_json(notes, costs)
            print(step, costs[step], flush=True)
    runs = read_json(asked.out)["runs"] if asked.out.exists() else {}
    runs[asked.shape] = {
        "device_map": asked.device_map, "machine": describe(), "shape": asdict(SHAPES[asked.shape]), "steps": costs,
        "found": found(asked.folder),
    }  # fmt: skip
    write_json(asked.out, {"command": "python benchmarks/seven_billion.py FOLDER --shape SHAPE", "runs": runs})


if __name__ == "__main__":
    main()
