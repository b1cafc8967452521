"""What llama.cpp's converter does for a Llama, derived row by row: a stand-in where there is no llama.cpp."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16
}  # fmt: skip
SIZES = {"block_count": 3, "attention.head_count": 5, "attention.head_count_kv": 1, "feed_forward_length": 44}
Tensors = dict[str, torch.Tensor]


def name_of(stored: str) -> str:
    stem, _, kind = stored.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}.{kind}" if layer else f"{NAMES[stem]}.{kind}"


def turned(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Row i of a head's first half before row i of its second half, where Hugging Face has the halves one by one."""
    d_head = rows.shape[0] // n_heads
    order = [h * d_head + i + half * d_head // 2 for h in range(n_heads) for i in range(d_head // 2) for half in (0, 1)]
    return rows[order]


def converted(directory: Path) -> Tensors:
    tensors = {name_of(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    heads = {"attn_q": 5, "attn_k": 1}
    return {
        name: turned(tensor, heads[part]) if (part := name.split(".")[-2]) in heads else tensor.clone()
        for name, tensor in tensors.items()
    }


def write_gguf(
    directory: Path,
    file: Path,
    number_format: str = "f32",
    *,
    edit: Callable[[Tensors], object] = lambda tensors: None,
    architecture: str = "llama",
    sizes: dict[str, int] | None = None,
) -> None:
    """Write a Llama's directory as GGUF, after an edit of its tensors; vectors as float32, as the converter does."""
    tensors = converted(directory)
    edit(tensors)
    writer = gguf.GGUFWriter(file, architecture)
    for key, size in {**SIZES, **(sizes or {})}.items():
        writer.add_uint32(f"{architecture}.{key}", size)
    for name, tensor in tensors.items():
        kind = TYPES[number_format] if tensor.ndim > 1 else TYPES["f32"]
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    _, model, _, outfile, _, outtype = sys.argv
    write_gguf(Path(model), Path(outfile), outtype)
