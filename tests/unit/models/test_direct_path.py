"""The way from heads to logits: every family's own, checked against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.tiers import HAS_TL4
from support.tiny import save_model
from transformers import AutoModelForCausalLM

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head
from lcc_lens.models.hooked.direct_path import Norm, OutputProjections, Unembedding
from lcc_lens.models.hooked.hooks import z_name
from lcc_lens.models.loading.hooked import load_hooked

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
SIZES = {
    "vocab_size": 257, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**SIZES, "initializer_range": 0.2, "intermediate_size": 44, "num_key_value_heads": 1}
WIDE = {"head_dim": 6, "tie_word_embeddings": False}
NEOX = {**SIZES, "initializer_range": 0.2, "intermediate_size": 44}
OPT = {**SIZES, "init_std": 0.2, "ffn_dim": 44, "word_embed_proj_dim": 40}
GPT2 = {
    "vocab_size": 257, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_positions": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {**LLAMA, **WIDE, "attention_bias": True},
    "Gemma": {**LLAMA, **WIDE},
    "Gemma2": {**LLAMA, **WIDE, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 6},
    "GPT2": GPT2,
    "OPT": OPT,
    "GPTNeoX": NEOX,
    "Phi": NEOX,
    "Granite": {**LLAMA, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "Cohere": {**LLAMA, "logit_scale": 0.25},
    "Olmo2": {**LLAMA, "tie_word_embeddings": False},
}
PARALLEL = ("GPTNeoX", "Phi", "Cohere")


def build_family(name: str):
    """A tiny random model of a family; gains and biases are random too, or they would not be tested."""
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    heads = ("LMHeadModel",) if name == "GPT2" else ("ForCausalLM",)
    torch.manual_seed(0)
    model = getattr(transformers, name + heads[0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory: pytest.TempPathFactory):
    """A family's name, its hooked model, and the plain one."""
    if request.param == "Cohere" and not HAS_TL4:
        pytest.skip("needs TransformerLens 4")
    path = save_model(build_family(request.param), tmp_path_factory.mktemp(request.param))
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")  # the default one may differ
    return request.param, load_hooked(path).model, plain.eval()


def activations(model, *names: str) -> list[torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    hooks = [(name, lambda value, hook, name=name: found.__setitem__(name, value[0].clone())) for name in names]
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    return [found[name] for name in names]


def test_the_readout_gives_the_plain_models_logits(family) -> None:
    _, model, plain = family
    readout = Unembedding.of(model)
    (resid,) = activations(model, "blocks.2.hook_resid_post")
    with torch.no_grad():
        expected = plain(TOKENS).logits[0]
    assert torch.allclose(readout.logits(resid), expected, atol=1e-4)
    chosen = torch.randint(257, (8, 2), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(readout.logits_of(resid[:, None], chosen)[:, 0], expected.gather(1, chosen), atol=1e-4)


def test_the_frozen_norm_is_the_textbooks(family) -> None:
    name, model, plain = family
    readout = Unembedding.of(model)
    (at,) = activations(model, "blocks.2.hook_resid_post")
    component = torch.randn(40, generator=torch.Generator().manual_seed(1))
    norm = model.ln_final.original_component
    is_layer_norm = name in ("GPT2", "OPT", "GPTNeoX", "Phi", "Cohere")
    gain = 1 + norm.weight if name.startswith("Gemma") else norm.weight
    W_U = plain.get_output_embeddings().weight
    scale = {"Granite": 1 / 3, "Cohere": 0.25}.get(name, 1.0)
    tokens = torch.tensor([[5, 200]]).expand(len(at), 2)
    got = readout.direct(component[None], at, tokens)[:, 0]
    for row in range(len(at)):
        stream, moved = at[row], component
        if is_layer_norm:
            stream, moved = stream - stream.mean(), moved - moved.mean()
        fixed = (stream.square().mean() + 1e-5).sqrt()
        assert torch.allclose(got[row], scale * W_U[[5, 200]] @ (gain * moved / fixed), atol=1e-4)


def test_direct_effects_of_all_parts_add_up_to_the_logits(family) -> None:
    _, model, _ = family
    readout = Unembedding.of(model)
    (resid,) = activations(model, "blocks.2.hook_resid_post")
    row, tokens = resid[4], torch.tensor([[7, 91]])
    parts = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    parts[-1] += row - parts.sum(0)
    got = readout.direct(parts, row[None], tokens)[0].sum(0)
    constant = readout.project(readout.norm.shift)[tokens[0]] + readout.multiplier * readout.bias[tokens[0]]
    capped = readout.logits(row)[tokens[0]]
    uncapped = 3 * torch.atanh(capped / 3) if family[0] == "Gemma2" else capped
    assert torch.allclose(got + constant, uncapped, atol=2e-3)


def test_heads_write_what_the_residual_stream_gains(family) -> None:
    name, model, plain = family
    if name == "Olmo2" and not HAS_TL4:
        with pytest.raises(LensError, match="expected a known path from head outputs to the residual stream"):
            OutputProjections.of(model)
        return
    writer = OutputProjections.of(model)
    before, after = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"
    # Where attention and feed-forward network run side by side, only the projection's own output is at hand
    stream = ["blocks.1.attn.o.hook_out"] if name in PARALLEL else [before, after]
    z, attn_out, *rest = activations(model, z_name(1), "blocks.1.attn.o.hook_out", *stream)
    gained = rest[0] if name in PARALLEL else rest[1] - rest[0]
    bias = model.blocks[1].attn.o.original_component.bias
    written = sum(writer.output(Head(1, head), z[:, head]) for head in range(5)) / writer.scale(1, attn_out)
    if bias is not None:
        written = written + bias * writer.multiplier
    assert torch.allclose(written, gained, atol=1e-4)
    assert (writer.norms is not None) == (name in ("Gemma2", "Olmo2"))
    assert plain.config.model_type == model.original_model.config.model_type


@pytest.mark.parametrize("d_model", [8, 9])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_taken_apart(kind: str, d_model: int) -> None:
    module = torch.nn.LayerNorm(d_model) if kind == "layer" else torch.nn.RMSNorm(d_model, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    if kind == "layer":
        torch.nn.init.normal_(module.bias)
    norm = Norm.of(module.bfloat16(), d_model, torch.device("cpu"))
    assert norm.is_centred == (kind == "layer")
    assert torch.allclose(norm.gain, module.weight.float(), atol=1e-5)
    assert torch.equal(norm.shift, module.bias.float() if kind == "layer" else torch.zeros(d_model))
    x = torch.randn(4, d_model)
    assert torch.allclose(norm.linear(x) / norm.scale(x) + norm.shift, norm(x), atol=1e-5)


def test_a_model_with_another_way_to_its_logits_is_refused(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_hooked(dense_dir).model
    with monkeypatch.context() as patch:
        patch.setattr(model.adapter, "apply_output_logits_transform", lambda logits: 2 * logits)
        with pytest.raises(LensError, match="path from the residual stream to the logits in this architecture, got"):
            Unembedding.of(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.original_model.config, "residual_multiplier", 2.0, raising=False)
        with pytest.raises(LensError, match="known path from head outputs to the residual stream"):
            OutputProjections.of(model)
    assert Unembedding.of(model).multiplier == OutputProjections.of(model).multiplier == 1.0
    model.unembed.original_component.weight = torch.nn.Parameter(torch.zeros(257, 12))
    with pytest.raises(LensError, match="an unembedding of shape"):
        Unembedding.of(model)


def test_a_head_outside_the_model_is_refused(dense_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected heads within 3 layers x 5 heads, got L3H0"):
        OutputProjections.of(load_hooked(dense_dir).model).output(Head(3, 0), torch.ones(6))


def test_bfloat16_models_are_read_in_float32(dense_dir: Path) -> None:
    model, exact = load_hooked(dense_dir, dtype=torch.bfloat16).model, load_hooked(dense_dir).model
    resid = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    readout = Unembedding.of(model)
    assert readout.logits(resid).dtype == torch.float32
    W_U = exact.unembed.original_component.weight.bfloat16().float()
    normed = resid / (resid.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(readout.logits(resid), normed @ W_U.T, atol=1e-4)
    assert OutputProjections.of(model).output(Head(1, 2), torch.randn(6)).dtype == torch.float32
