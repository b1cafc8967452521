"""Prune a model with llm-compressor's Wanda or SparseGPT modifier, to compare with ours on the same model and tokens.

    python benchmarks/llm_compressor.py MODEL_DIR TOKENS.safetensors OUT --method wanda [--sparsity 0.5 | --pattern 2:4]

Run it with the Python of a virtual environment of its own (llm-compressor pins its own transformers). The constraint
keeps pip on a CPU build of torch; without it llm-compressor draws the newest torch with gigabytes of CUDA libraries.
Installed with:

    python3 -m venv other-venv
    other-venv/bin/pip install torch==2.13.0
    echo 'torch==2.13.0+cpu' > cpu-constraints.txt
    other-venv/bin/pip install -c cpu-constraints.txt llmcompressor==0.14.0.1

TOKENS holds one int64 tensor `tokens` [sequence, pos]: equal lengths, no padding, calibrated in the order given. The
seconds are those of the `oneshot` call alone: tokenising, imports, loading and saving lie outside, tracing the model
into layers lies inside. OUT is a plain Hugging Face directory with dense weights. One JSON line goes to stdout; its
sparsity is measured on the saved Linear layers, and its peak memory covers imports, loading and `oneshot` (start the
script from a small process: Linux hands a parent's peak on to the child).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # while importing: its log goes to stdout

import llmcompressor
import torch
import transformers
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack(rows)}


def zeros(model: torch.nn.Module) -> float:
    """The fraction of exact zeros in the Linear layers other than the output head."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("tokens", type=Path, metavar="TOKENS.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--method", choices=sorted(MODIFIERS), required=True)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--sparsity", type=float, default=0.5)
    target.add_argument("--pattern", choices=["2:4"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    # Its warnings (an indefinite Hessian, say) go to stderr, so that stdout holds the JSON line alone.
    logger.remove()
    logger.add(sys.stderr, level="WARNING", filter=lambda record: record["level"].name != "METRIC")
    torch.set_num_threads(args.threads)
    tokens = load_file(args.tokens)["tokens"]
    # A DataLoader goes through as it is: no shuffling, no truncation, no limit on the number of sequences.
    data = DataLoader(tokens, batch_size=args.batch_size, collate_fn=collate)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    modifier = MODIFIERS[args.method](
        sparsity=0.5 if args.pattern else args.sparsity,
        mask_structure=args.pattern or "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )

    start = time.perf_counter()
    llmcompressor.oneshot(model=model, tokenizer=tokenizer, recipe=modifier, dataset=data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    # `oneshot` replaces the instance's save_pretrained with one that writes compressed-tensors: the class's is plain.
    type(model).save_pretrained(model, args.out)
    tokenizer.save_pretrained(args.out)
    if "quantization_config" in json.loads((args.out / "config.json").read_text()):
        raise SystemExit(f"{args.out}/config.json names a compressed format")
    record = {
        "method": args.method,
        "seconds": round(seconds, 3),
        "peak_rss_mb": round(peak, 1),
        "sparsity": zeros(AutoModelForCausalLM.from_pretrained(args.out)),
        "llmcompressor": llmcompressor.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
