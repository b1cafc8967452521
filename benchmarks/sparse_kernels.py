"""What the GPU's sparse kernels gain on exactly 2:4 models: the same weights on both kinds of kernels.

    python benchmarks/sparse_kernels.py [--repeats 15] [--out benchmarks/sparse_kernels.json]

Random weights, pruned 2:4 by magnitude, in the shapes of SmolLM2-135M and of four layers of a Llama of 7B: a pass takes
the same time whatever the weights are. Needs a CUDA device; every pair of timings is interleaved.
"""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path
from typing import Any

import torch
from run import describe
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lcc_lens.core.config import default_device
from lcc_lens.core.files import write_json
from lcc_lens.evaluation.efficiency.semi_structured import require_kernels, to_semi_structured
from lcc_lens.evaluation.efficiency.timing import interleaved, median_interval, spread_tokens, time_prefill
from lcc_lens.models.architecture.sparsity_patterns import parse_pattern
from lcc_lens.pruning.methods.masks import keep_mask

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Llama 7B, four layers": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}  # fmt: skip
LENGTHS = (256, 2048)
VOCABULARY = 32000


def two_of_four(settings: dict[str, int], device: torch.device) -> nn.Module:
    """A random model whose decoder layers' matrices are 2:4 by magnitude, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=max(LENGTHS), **settings)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    pattern = parse_pattern("2:4")
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(keep_mask(layer.weight.float().abs(), pattern))
    return model


def measured(settings: dict[str, int], repeats: int, device: torch.device) -> dict[str, Any]:
    """Time on sparse kernels / time on dense kernels by prompt length, and how far the logits lie apart."""
    dense = two_of_four(settings, device)
    sparse = copy.deepcopy(dense)
    n = to_semi_structured(sparse)
    found: dict[str, Any] = {"matrices": n}
    for length in LENGTHS:
        tokens = spread_tokens(length, VOCABULARY, device)
        with torch.inference_mode():
            a, b = (model(tokens).logits.float() for model in (dense, sparse))
        jobs = {name: functools.partial(time_prefill, m, tokens) for name, m in (("dense", dense), ("sparse", sparse))}
        took = interleaved(jobs, repeats, f"{length} tokens")
        ratios = [s / d for s, d in zip(took["sparse"], took["dense"], strict=True)]
        found[f"{length} tokens"] = {
            "sparse / dense": median_interval(ratios),
            "milliseconds": {name: median_interval(values)["median"] for name, values in took.items()},
            "logit_difference": float((a - b).norm() / a.norm()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sparse_kernels.json")
    arguments = parser.parse_args()
    device = default_device()
    require_kernels(device, torch.bfloat16)
    results = {name: measured(settings, arguments.repeats, device) for name, settings in SHAPES.items()}
    command = "python benchmarks/sparse_kernels.py"
    write_json(arguments.out, {"command": command, "machine": describe(), "models": results})
    print(results)


if __name__ == "__main__":
    main()
