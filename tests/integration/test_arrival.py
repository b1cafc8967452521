"""How models arrive: every way gives the same model, and what is no model ends in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conformance import TOKENS, save_family
from support.restorations import restoration_of
from support.tiny import build_model, save_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.injections.changes import Shift
from lcc_lens.restoration.result import Restoration

#: peft asks a model of transformers by the old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def changed(source: Path, target: Path, **settings: object) -> Path:
    """A copy of a directory with another configuration."""
    shutil.copytree(source, target)
    write_json(target / "config.json", {**read_json(source / "config.json"), **settings})
    return target


@pytest.fixture
def hub(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A hub that has the tiny model, and what it was asked for."""
    asked: list[dict] = []

    def download(repository: str, **settings: object) -> str:
        asked.append({"repository": repository, **settings})
        return str(dense_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_revision_of_a_hub_model_is_asked_for(hub: list[dict], dense_dir: Path) -> None:
    assert resolve("owner/name@refs/pr/3") == dense_dir
    assert (hub[0]["repository"], hub[0]["revision"]) == ("owner/name", "refs/pr/3")
    assert load_hooked("owner/name").identity.reference == "owner/name"
    assert hub[1]["revision"] is None
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in hub[0]["allow_patterns"])


def test_hub_model_without_safetensors_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(RequestError, match=r"expected model\.safetensors in .*, got none; if owner/name holds pickles"):
        resolve("owner/name")


def test_model_in_memory_is_scanned_restored_and_left_alone(question_file: Path, tmp_path: Path) -> None:
    dense, pruned = build_model(), build_model()
    with torch.no_grad():
        for layer in pruned.model.layers:
            layer.self_attn.v_proj.weight[:, ::2] = 0
    names, before = list(pruned.state_dict()), logits(pruned)
    pair = lcc.load_pair(dense, pruned, tokenizer=tiny_tokenizer())
    assert torch.allclose(pair.pruned(TOKENS), before, atol=1e-5)
    assert list(pruned.state_dict()) == names
    assert torch.equal(logits(pruned), before)
    data = lcc.load_data(str(question_file))
    found = lcc.scan(pair, data, selectors=(), sites=("z",))
    restoration = lcc.restore(pair, found, found.select("mse", share=0.3), data, method="mean-shift")
    report = export(restoration, restoration.record.pruned, tmp_path / "out")
    assert report.logit_effect > 0.1
    assert lcc.stored_model(pruned, tiny_tokenizer()) == pair.pruned_id.path  # the same contents, the same place
    assert sum(1 for _ in pair.pruned_id.path.parent.iterdir()) == 2


@OLD_NAME
def test_what_is_in_memory_and_no_plain_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    with pytest.raises(RequestError, match="expected a model of transformers, got Linear"):
        load_hooked(torch.nn.Linear(2, 2), tokenizer=tokenizer)
    with pytest.raises(RequestError, match="expected the tokenizer of a model in memory, got none"):
        load_hooked(build_model())
    adapted = peft.get_peft_model(build_model(), peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(RequestError, match=r"got PeftModel; unwrap it \(of PEFT: merge_and_unload\)"):
        load_hooked(adapted, tokenizer=tokenizer)
    with pytest.raises(RequestError, match=r"expected merged weights, got the adapter .*v_proj"):
        load_hooked(adapted.get_base_model(), tokenizer=tokenizer)
    quantised = build_model()
    quantised.is_quantized = True
    with pytest.raises(RequestError, match="expected plain weights, got a quantised model"):
        load_hooked(quantised, tokenizer=tokenizer)


@OLD_NAME
def test_merged_adapter_is_a_model_and_a_bare_one_is_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build_model(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"got a PEFT adapter; merge it into its base"):
        resolve(tmp_path / "adapter")
    merged = save_model(adapted.merge_and_unload(), tmp_path / "merged")
    got = load_hooked(merged).model(TOKENS)
    assert float((got - logits(build_model())).abs().max()) > 0.1
    assert torch.allclose(got, logits(AutoModelForCausalLM.from_pretrained(merged)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_computes_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load_hooked(save_model(build_model().to(dtype), tmp_path / "half"))
    assert loaded.model.cfg.dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert torch.allclose(loaded.model(TOKENS), logits(expected), atol=1e-4)


def test_sharded_checkpoint_is_the_same_model(dense_dir: Path, tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(load_hooked(tmp_path).model(TOKENS), load_hooked(dense_dir).model(TOKENS))


def test_names_without_the_base_models_prefix_are_found(tmp_path: Path) -> None:
    """As the original GPT-2 is stored."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=30, n_head=5, n_layer=3, n_positions=128, initializer_range=0.2)
    )
    model.transformer.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert "h.0.attn.c_proj.bias" in tensors
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)  # a number without axes, as old checkpoints have
    save_file(tensors, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    constants = restoration_of(tmp_path / "gpt2")
    shift = Shift(0.1 * torch.randn(30, 30, generator=torch.Generator().manual_seed(3)))
    both = Restoration(
        constants.record, constants.heads, constants.constants, constants.magnitudes, constants.offset,
        (("transformer.h.1.attn.c_proj", shift),),
    )  # fmt: skip
    report = export(both, tmp_path / "gpt2", tmp_path / "out")
    assert report.logit_effect > 0.1
    assert {*report.changed} == {*(f"h.{i}.attn.c_proj.bias" for i in range(3)), "h.1.attn.c_proj.weight"}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
def test_quantised_checkpoint_is_refused(method: str, dense_dir: Path, tmp_path: Path) -> None:
    quantised = changed(dense_dir, tmp_path / "quantised", quantization_config={"quant_method": method})
    with pytest.raises(RequestError, match=rf"got {method} quantisation in .*; name the original"):
        load_hooked(quantised)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    for reference in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(RequestError, match=r"pytorch_model\.bin.*; where you trust its source, .*save_pretrained"):
            resolve(reference)


def test_code_of_a_repository_is_never_run(dense_dir: Path, tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    strange = changed(dense_dir, tmp_path / "strange", **own)
    (strange / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(RequestError, match="it brings its own code, which is not run here"):
        load_hooked(strange)
    assert not (tmp_path / "ran").exists()


def test_files_that_do_not_belong_together_are_refused(dense_dir: Path, tmp_path: Path) -> None:
    cases = {
        r"got none named model\.layers\.3\.input_layernorm\.weight \(9 are missing\)": {"num_hidden_layers": 4},
        r"got model\.layers\.2\.input_layernorm\.weight, which it ignores \(9 in all\)": {"num_hidden_layers": 2},
        r"down_proj\.weight of shape \(40, 50\), .* got \(40, 44\)": {"intermediate_size": 50},
        r"expected int, got str": {"num_hidden_layers": "three"},
        r"model type `strange`": {"model_type": "strange"},
    }
    for number, (message, settings) in enumerate(cases.items()):
        with pytest.raises(RequestError, match=message) as caught:
            load_hooked(changed(dense_dir, tmp_path / str(number), **settings))
        assert "\n" not in str(caught.value)


def test_bias_that_transformers_would_drop_is_refused(tmp_path: Path) -> None:
    """Mistral has no bias at the output: plain transformers passes over one that somebody stored."""
    directory = save_family("mistral", tmp_path / "mistral")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.ones(36)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"got model\.layers\.1\.self_attn\.o_proj\.bias, which it ignores"):
        load_plain(directory)
    tensors["model.layers.1.self_attn.bias"] = torch.ones(36)  # a mask, as old checkpoints keep it
    del tensors["model.layers.1.self_attn.o_proj.bias"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    load_plain(directory)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"got token 256 for 200 embeddings; copy the tokenizer that belongs"):
        load_hooked(save_model(build_model(vocab_size=200), tmp_path / "small"))


def test_damaged_headers_are_refused(dense_dir: Path, tmp_path: Path) -> None:
    damaged = changed(dense_dir, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[8:40] = 32 * b"x"
    (damaged / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(RequestError, match="got a damaged one"):
        load_hooked(damaged)
