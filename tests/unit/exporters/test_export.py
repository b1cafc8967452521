"""Exports: fold equals hook, nothing else changes, and what cannot be exact is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.restorations import TOKENS, restoration_of
from support.tiny import build_model, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, MptConfig

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.heads import Head
from lcc_lens.exporters.huggingface import _Expected, export
from lcc_lens.exporters.model_card import model_card
from lcc_lens.models.loading.hooked import load_hooked


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=30, n_head=5, n_layer=3, n_positions=128, initializer_range=0.2)
    )


MODELS = {
    "llama": build_model,
    "llama tied": lambda: build_model(tie_word_embeddings=True),
    "llama with biases": lambda: build_model(attention_bias=True),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("name", MODELS)
def test_fold_equals_hook(name: str, tmp_path: Path) -> None:
    pruned = save_model(MODELS[name](), tmp_path / "pruned")
    before = sha256_file(pruned / "model.safetensors")
    restoration = restoration_of(pruned, heads=[Head(0, 4), Head(2, 1), Head(2, 3)])
    report = export(restoration, pruned, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    hooked = load_hooked(pruned).model
    with torch.no_grad():
        untouched = hooked(TOKENS)
        with restoration.applied_to(hooked) as restored:
            expected = restored(TOKENS)
        got = plain(TOKENS).logits
    assert float((expected - untouched).abs().max()) > 0.1
    assert float((got - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    assert report.logit_effect > 0.1
    assert sha256_file(pruned / "model.safetensors") == before


def test_a_restoration_without_effect_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    with pytest.raises(RequestError, match="got one without effect; train it first"):
        export(restoration_of(pruned, size=0.0), pruned, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["pruned"]


@pytest.mark.parametrize(
    ("losses", "warning"),
    [((2.0, 3.0, 2.4), None), ((2.0, 3.0, 1.5), "also taught the task"), ((3.1, 3.0, 1.5), "pruning lost nothing")],
)
def test_the_card_says_where_the_task_was_learned(losses, warning: str | None, tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    restoration = restoration_of(pruned)
    named = dict(zip(("dense", "pruned", "restored"), losses, strict=True))
    card = model_card(
        dataclasses.replace(restoration, record=dataclasses.replace(restoration.record, losses=named)), {}, 0.0
    )
    assert ("Read with care" in card) == (warning is not None)
    assert warning is None or warning in card


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_other_tensor_is_bit_identical(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[parameter.abs() < 0.1] = 0.0
    pruned = save_model(model, tmp_path / "pruned")
    report = export(restoration_of(pruned), pruned, tmp_path / "out")
    old, new = (load_file(d / "model.safetensors") for d in (pruned, tmp_path / "out"))
    edited = set(report.added) | set(report.changed)
    assert all(torch.equal(old[key], new[key]) for key in old if key not in edited)
    assert set(new) - set(old) == set(report.added)
    assert report.identical_tensors == len(set(old) - edited)
    assert all(key.endswith(".bias") for key in edited)
    o_biases = [key for key in edited if "o_proj" in key or "attn.c_proj" in key]
    assert len(o_biases) == 3
    assert all(float(new[key].abs().max()) > 0 for key in o_biases)
    assert all(float(new[key].abs().max()) == 0 for key in edited - set(o_biases))
    zeros = sum(int((t == 0).sum()) for t in old.values() if t.ndim == 2)
    assert zeros > 1000
    assert zeros == sum(int((t == 0).sum()) for t in new.values() if t.ndim == 2)


def test_architecture_without_a_slot_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MptConfig(vocab_size=257, d_model=30, n_heads=5, n_layers=3))
    pruned = save_model(model, tmp_path / "pruned")
    with pytest.raises(RequestError, match=r"got mpt, which has none that is exact; .* lcc_lens\.load_restored"):
        export(restoration_of(pruned), pruned, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    first = save_model(build_model(), tmp_path / "first")
    second = save_model(build_model(seed=1), tmp_path / "second")
    with pytest.raises(RequestError, match="expected the pruned model with SHA-256"):
        export(restoration_of(first), second, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept(tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(RequestError, match="exists already; name another folder or pass --overwrite"):
        export(restoration_of(pruned), pruned, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    with pytest.raises(RequestError, match="expected a folder that lcc-lens wrote"):
        export(restoration_of(pruned), pruned, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    with pytest.raises(RequestError, match="does not hold the input"):
        export(restoration_of(pruned), pruned, pruned, overwrite=True)
    (tmp_path / "out" / "precious").unlink()
    export(restoration_of(pruned), pruned, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    export(restoration_of(pruned, size=0.2), pruned, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_export_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    pruned = save_model(build_model(), tmp_path / "pruned")
    module = sys.modules["lcc_lens.exporters.folding"]
    right = module.fold
    monkeypatch.setattr(module, "fold", lambda *args: {layer: 1.01 * bias for layer, bias in right(*args).items()})
    with pytest.raises(LensError, match="expected the reloaded export"):
        export(restoration_of(pruned), pruned, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_rounding_of_one_token_may_be_large_but_not_that_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    """Some models enlarge the rounding of a token a hundredfold, where their stream is close to zero."""
    pruned = save_model(build_model(), tmp_path / "pruned")
    of = _Expected.of

    def rounded(*args: Any) -> _Expected:
        expected = of(*args)
        off = torch.zeros_like(expected.restored)
        off[:] = 3e-5 if everywhere else 0
        off[1, 2, 5] = 3e-5
        return dataclasses.replace(expected, restored=expected.restored + off * expected.restored.abs().max())

    monkeypatch.setattr(_Expected, "of", rounded)
    if everywhere:
        with pytest.raises(LensError, match=r"within 1e-05 of their norm, got 0\.0001\d; nothing was kept"):
            export(restoration_of(pruned), pruned, tmp_path / "out")
    else:
        report = export(restoration_of(pruned), pruned, tmp_path / "out")
        assert report.logit_difference > 1e-5


def test_bfloat16_checkpoint_stays_bfloat16(tmp_path: Path) -> None:
    pruned = save_model(build_model().to(torch.bfloat16), tmp_path / "pruned")
    export(restoration_of(pruned), pruned, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_sharded_checkpoint_is_exported(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path / "pruned", max_shard_size="20KB")
    from support.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    restoration = restoration_of(tmp_path / "pruned")
    report = export(restoration, tmp_path / "pruned", tmp_path / "out")
    assert report.logit_difference < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].self_attn.o_proj.bias.abs().max() > 0


def test_sharded_checkpoint_whose_first_shard_has_no_bias_is_exported(tmp_path: Path) -> None:
    from support.tiny import tiny_tokenizer

    gpt2().save_pretrained(tmp_path / "pruned", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    first = min((tmp_path / "pruned").glob("model-*.safetensors"))
    assert not [name for name in load_file(first) if name.endswith(".bias")]
    report = export(restoration_of(tmp_path / "pruned"), tmp_path / "pruned", tmp_path / "out")
    assert report.logit_effect > 0.1
    assert report.logit_difference < 1e-4


def test_model_card_holds_the_measured_numbers(tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    restoration = restoration_of(pruned)
    record = dataclasses.replace(restoration.record, losses={"pruned": 2.5, "restored": 2.25})
    export(
        dataclasses.replace(restoration, record=record),
        pruned,
        tmp_path / "out",
        metrics={"boolq": {"acc": 0.625}, "rte": {"acc": 0.5}, "worst": {"text": "code"}},
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| restored | 2.2500 |" in card
    assert "| | acc |\n|---|---|\n| boolq | 0.625 |\n| rte | 0.5 |\n\n| | text |" in card
    assert record.pruned_sha256 in card


def test_another_format_rounds_every_tensor(tmp_path: Path) -> None:
    pruned = save_model(build_model(tie_word_embeddings=True), tmp_path / "pruned")
    restoration = restoration_of(pruned)
    report = export(restoration, pruned, tmp_path / "out", dtype=torch.bfloat16, max_shard_size="20KB")
    assert report.logit_difference < 1e-4  # of what was verified before it was rounded
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 32_000 for name in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(pruned)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kept = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert torch.equal(kept[name], parameter.to(torch.bfloat16))
    assert float(model.model.layers[1].self_attn.o_proj.bias.detach().abs().max()) > 0.1


def test_numbers_that_a_format_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    pruned = save_model(model, tmp_path / "pruned")
    with pytest.raises(LensError, match=r"torch\.float16 holds, got larger ones in lm_head\.weight"):
        export(restoration_of(pruned), pruned, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(RequestError, match=r"expected a size such as 5GB or a number of bytes, got 'much'"):
        export(restoration_of(pruned), pruned, tmp_path / "out", max_shard_size="much")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def test_generation_settings_template_and_tokenizer_are_kept(tmp_path: Path) -> None:
    model = build_model()
    model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=True)
    pruned = save_model(model, tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(pruned)
    export(restoration_of(pruned), pruned, tmp_path / "out")
    kept = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert kept.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.9, True)
