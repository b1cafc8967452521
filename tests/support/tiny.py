"""Tiny models, a tokenizer built in code, and small data.

No network is needed, and all sizes differ, so no two axes can be swapped unnoticed.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

N_LAYERS, N_HEADS, D_HEAD, D_MODEL = 3, 5, 6, 40


def tiny_tokenizer():
    """A byte-level tokenizer: every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def with_an_end(tokenizer):
    """The same tokenizer, but with its end token behind every text."""
    from tokenizers.processors import TemplateProcessing

    ending, end = copy.deepcopy(tokenizer), tokenizer.eos_token
    ending.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", None, [(end, tokenizer.eos_token_id)])
    return ending


def build_model(seed: int = 0, **changes):
    """A random Llama of unequal sizes, with weights large enough that heads matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 257,
        "hidden_size": D_MODEL,
        "intermediate_size": 44,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 1,
        "head_dim": D_HEAD,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def save_model(model, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


QUESTIONS = [
    {"question": f"is {a} plus {b} more than {c}?", "right": f" {a + b > c}".lower(), "wrong": f" {a + b <= c}".lower()}
    for a in range(6) for b in range(4) for c in (3, 5)
]  # fmt: skip
PARAGRAPHS = [
    f"Paragraph {i} says that {i} times {i} is {i * i}, which nobody doubts; see page {7 * i}." for i in range(60)
]
