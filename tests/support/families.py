"""Tiny random models of ten architectures, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from support.tiny import build_model, save_model

from lcc_lens.models.architecture.caches import PAST, cache_name
from lcc_lens.models.loading.hooked import load_hooked

BASE = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}


SIZES = {
    "hidden_size": 40, "intermediate_size": 44, "num_hidden_layers": 3, "max_position_embeddings": 128,
    "initializer_range": 0.2,
}  # fmt: skip


GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


GEMMA = {**BASE, **SIZES, **GROUPED, "tie_word_embeddings": True, "query_pre_attn_scalar": 6}


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": build_model,
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**BASE, n_embd=40, n_layer=3, n_head=5, n_positions=128, initializer_range=0.2)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**BASE, **SIZES, num_attention_heads=5)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **BASE, hidden_size=40, word_embed_proj_dim=40, ffn_dim=44, num_hidden_layers=3, num_attention_heads=5,
            max_position_embeddings=128, init_std=0.2,
        )
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**BASE, **SIZES, num_attention_heads=4, num_key_value_heads=2)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**BASE, **SIZES, "hidden_size": 48}, num_attention_heads=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA, sliding_window=24)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, sliding_window=4)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, **SIZES, **GROUPED, sliding_window=24)),
    "mistral, 4": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, **SIZES, **GROUPED, sliding_window=4)),
}  # fmt: skip


TOO_SHORT_A_WINDOW = {"gemma3", "mistral, 4"}


#: TransformerLens 4.3 hands GPT-2's attention a cache under the name that it had before transformers 5.24.
FORGETFUL = {"gpt2"} if cache_name(hf.GPT2LMHeadModel.forward) != PAST else set()


def family(name: str, path: Path) -> Any:
    torch.manual_seed(0)
    return load_hooked(save_model(FAMILIES[name]().eval(), path / "model")).model
