"""Models: what loads is checked, and what is not a model says so in one line."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, build_model, save_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.models.hooked.hooks import logits_at
from lcc_lens.models.loading import hooked as models
from lcc_lens.models.loading.gguf import converted
from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.models.pair import load_pair


def test_hooked_model_equals_plain_transformers(dense_dir: Path) -> None:
    loaded = load_hooked(dense_dir)
    tokens = torch.arange(1, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(dense_dir)
    with torch.no_grad():
        assert torch.allclose(loaded.model(tokens), plain(tokens).logits, atol=1e-5)
    cfg = loaded.model.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_head) == (N_LAYERS, N_HEADS, D_HEAD)
    assert loaded.output_projections == tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(3))
    assert loaded.identity.sha256 == sha256_file(dense_dir / "model.safetensors") == Checkpoint(dense_dir).sha256


def test_models_loaded_in_several_threads_leave_transformers_as_it_was(
    dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it loads, transformers replaces ``tie_weights``; of two threads one would put back the replacement."""
    own, inside, most = PreTrainedModel.tie_weights, [], []
    load = AutoModelForCausalLM.from_pretrained
    started = threading.Barrier(4)

    def noting(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        try:
            return load(*args, **kwargs)
        finally:
            inside.pop()

    def one(_: int) -> Any:
        started.wait()
        return load_plain(dense_dir)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(one, range(4)))
    assert most == [1] * 4
    assert PreTrainedModel.tie_weights is own
    assert all(torch.equal(m.lm_head.weight, loaded[0].lm_head.weight) for m in loaded)


def test_only_masked_positions_reach_the_unembedding(pair) -> None:
    tokens = torch.arange(1, 25).reshape(2, 12)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3] = mask[1, 5] = mask[1, 11] = True
    full = pair.dense(tokens)
    narrow = pair.dense.run_with_hooks(tokens, fwd_hooks=logits_at(pair.dense, mask))
    assert narrow.shape == (1, 3, 257)
    assert torch.allclose(narrow[0], full[mask], atol=1e-5)
    assert pair.dense.run_with_hooks(tokens, fwd_hooks=logits_at(pair.dense, None)).shape[1] == 0


def test_model_that_ignores_its_hook_is_refused(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "z_adders", lambda constants: [])
    with pytest.raises(LensError, match="expected a change at hook_z"):
        load_hooked(dense_dir)


def test_model_with_other_logits_is_refused(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = models._bridge

    def wrong(plain, tokenizer, path):
        with torch.no_grad():
            plain.lm_head.weight[5] += 1.0
        return right(plain, tokenizer, path)

    monkeypatch.setattr(models, "_bridge", wrong)
    with pytest.raises(LensError, match="equal to plain transformers'"):
        load_hooked(dense_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    directory = save_model(build_model(), tmp_path / "bad")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LensError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hooked(directory)


def test_pair_of_other_shapes_is_refused(dense_dir: Path, tmp_path: Path) -> None:
    other = save_model(build_model(num_hidden_layers=2), tmp_path / "other")
    with pytest.raises(
        RequestError, match=r"expected two models of the same shape, got .* of 3 layers, .* of 2 layers, 40 wide\)"
    ):
        load_pair(dense_dir, other)
    resized = build_model(vocab_size=300)
    with pytest.raises(RequestError, match=r"expected two models of the same shape, got d_vocab 257 .* and 300"):
        load_pair(dense_dir, save_model(resized, tmp_path / "resized"))


def test_pair_of_other_tokenizers_is_refused(dense_dir: Path, tmp_path: Path) -> None:
    other = save_model(build_model(seed=1), tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<end>"', '"<stop>"'))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace("<end>", "<stop>"))
    with pytest.raises(RequestError, match="expected two models with the same tokenizer"):
        load_pair(dense_dir, other)


def test_wrong_references_are_refused(tmp_path: Path, dense_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    (tmp_path / "pickle" / "pytorch_model.bin").write_text("x")
    cases = {
        tmp_path / "nowhere": "which is not there; check the path",
        "smolm2": "which is not there; check the path",
        tmp_path / "empty": "no config.json there",
        tmp_path / "file": "got the file",
        tmp_path / "pickle": "got the pickle pytorch_model.bin; convert it to safetensors first",
        tmp_path / "gone.gguf": "expected the GGUF file",
        "someone/some-model": "nothing from the hub",
    }
    for reference, message in cases.items():
        with pytest.raises(RequestError, match=message):
            resolve(reference)


def test_truncated_weights_are_refused(dense_dir: Path, tmp_path: Path) -> None:
    directory = save_model(build_model(), tmp_path / "cut")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RequestError, match="got a damaged one"):
        load_hooked(directory)


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [("llama", "LlamaTokenizer"), ("llama", "GemmaTokenizer"), ("gpt2", None), ("qwen2", None), ("mbart", None)],
)
def test_a_directory_without_tokenizer_files_is_refused(
    tmp_path: Path, model_type: str, tokenizer_class: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class:
        settings = {"tokenizer_class": tokenizer_class, "eos_token": "<end>", "pad_token": "<end>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    empty = AutoTokenizer.from_pretrained(tmp_path)
    assert empty("two words")["input_ids"] == empty("no more")["input_ids"]
    with pytest.raises(RequestError, match=r"expected a tokenizer in .*, got none; copy tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_two_words_is_one(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("no")["input_ids"] == [2]
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(RequestError, match=r"expected a tokenizer in .*, got none that loads"):
        load_tokenizer(tmp_path)


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path, max_shard_size="20KB")
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(RequestError, match="expected every shard"):
        resolve(tmp_path)


def test_gguf_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match=r"with SHA-256 abcabcabcabc…, got"):
        converted(tmp_path / "x.gguf", tmp_path / "out", expected_sha256="abc" * 20)
    with pytest.raises(RequestError, match="expected a GGUF file that transformers reads"):
        resolve(tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", ".out.lock")) == ["x.gguf"]


def test_every_public_name_resolves_and_functions_are_not_hidden_by_modules() -> None:
    import lcc_lens

    for name in lcc_lens.__all__:
        assert not isinstance(getattr(lcc_lens, name), type(lcc_lens))
    assert callable(lcc_lens.scan)
    assert callable(lcc_lens.export)
    assert set(lcc_lens.__all__) <= set(dir(lcc_lens))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lcc_lens.nothing


def test_dtype_and_device_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcc_lens.core.config import compute_dtype, default_device

    cpu = torch.device("cpu")
    monkeypatch.setenv("LCC_LENS_DTYPE", "bfloat16")
    assert compute_dtype(cpu) == torch.bfloat16
    monkeypatch.setenv("LCC_LENS_DTYPE", "int8")
    with pytest.raises(RequestError, match="expected LCC_LENS_DTYPE to be one of"):
        compute_dtype(cpu)
    monkeypatch.delenv("LCC_LENS_DTYPE")
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(_is_avx512_bf16_supported=lambda: True))
    assert compute_dtype(cpu) == torch.bfloat16
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert compute_dtype(cpu) == torch.float32
    monkeypatch.setenv("LCC_LENS_DEVICE", "abacus")
    with pytest.raises(RequestError, match="expected LCC_LENS_DEVICE"):
        default_device()
