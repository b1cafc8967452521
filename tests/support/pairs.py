"""Pairs of tiny models of four architectures, the pruned one without half of its weights."""

from __future__ import annotations

import pytest
import torch
from support.tiny import QUESTIONS, build_model, save_model

from lcc_lens.data.batches import TokenSequence, encode_pair
from lcc_lens.models.pair import Pair, load_pair

FAMILIES = ["llama", "gpt2", "gemma2", "qwen2"]


def build(family: str, seed: int):
    """A tiny random model of a family, with unequal sizes."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {
        "vocab_size": 257, "hidden_size": 40, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 5, "num_key_value_heads": 1, "initializer_range": 0.2, **ends,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "llama":
        return build_model(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=257, n_embd=30, n_head=5, n_layer=3, n_positions=128, initializer_range=0.2, **ends)
        )
    if family == "gemma2":  # alternating windows, soft caps, norms after the attention
        return Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=6, sliding_window=4, query_pre_attn_scalar=6))
    if family == "qwen3":  # norms of queries and keys, two key-value heads
        shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape))
    return Qwen2ForCausalLM(Qwen2Config(**shape))


class Families:
    """A pair by family: the pruned model lacks half of every matrix's weights."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders, self.made = folders, dict[str, Pair]()

    def __call__(self, family: str) -> Pair:
        if family not in self.made:
            folder = self.folders.mktemp(family)
            model = build(family, seed=3).eval()
            save_model(model, folder / "dense")
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.ndim == 2 and (".layers." in name or ".h." in name):
                        weight *= torch.rand(weight.shape, generator=generator) < 0.5
            save_model(model, folder / "pruned")
            self.made[family] = load_pair(folder / "dense", folder / "pruned")
        return self.made[family]


def encoded(pair: Pair, n: int) -> list[TokenSequence]:
    """Questions of different lengths with answers of different lengths."""
    found = []
    for i, question in enumerate(QUESTIONS[:n]):
        sequence = encode_pair(pair.tokenizer, str(i) * i + question["question"], question["right"] + "!" * i, 512)
        assert sequence is not None
        found.append(sequence)
    return found
