"""GGUF by llama.cpp's own converter; where llama-cpp-python is installed, its logits are transformers'."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.conformance import FAMILIES, HEADS
from support.restorations import restoration_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lcc_lens.exporters.gguf import FOLDER_VARIABLE, export_gguf
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.loading.gguf import embedded_gguf

LLAMA_CPP = os.environ.get(FOLDER_VARIABLE)


@pytest.fixture(scope="module")
def known_tokenizer() -> Any:
    """The embedded model's tokenizer, whose pre-processing llama.cpp knows."""
    source = embedded_gguf()
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


#: What llama.cpp's converter asks for by the names of older configurations, and a width that it takes for granted.
REAL = {
    "llama": {}, "phi3": {}, "granite": {}, "stablelm, multi-head": {}, "bloom": {}, "gpt2": {"n_ctx": 512},
    "phi": {"intermediate_size": 160},
}  # fmt: skip


@pytest.mark.skipif(LLAMA_CPP is None, reason=f"{FOLDER_VARIABLE} names no clone of llama.cpp")
@pytest.mark.parametrize("family", REAL)
def test_the_real_converter_loses_nothing(family: str, known_tokenizer: Any, tmp_path: Path) -> None:
    pruned, out, file = tmp_path / "pruned", tmp_path / "out", tmp_path / "x.gguf"
    save_family(family, pruned)
    known_tokenizer.save_pretrained(pruned)
    export(restoration_of(pruned, HEADS), pruned, out)
    report = export_gguf(out, file, llama_cpp=LLAMA_CPP)
    assert report.number_format == "f32"
    if importlib.util.find_spec("llama_cpp") is None:
        return
    tokens = list(range(3000, 3400, 7))
    expected, bare = (logits_of(directory, tokens) for directory in (out, pruned))
    # GELU is a table of float16 in llama.cpp
    tolerance = 1e-4 if family in ("llama", "phi3", "granite", "stablelm, multi-head") else 1e-2
    assert float((expected - bare).abs().max()) > 50 * tolerance
    assert float((logits_in_llama_cpp(file, tokens) - expected).abs().max()) < tolerance


def save_family(family: str, path: Path) -> None:
    kind, sizes = FAMILIES[family]
    changes = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **REAL[family]}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes})).save_pretrained(path)


def logits_of(directory: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def logits_in_llama_cpp(file: Path, tokens: list[int]) -> torch.Tensor:
    llama_cpp = importlib.import_module("llama_cpp")
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(str(file), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False, **kept)
    model.eval(tokens)
    logits = torch.tensor(np.array(model.scores[: len(tokens)]))
    model.close()
    return logits
