"""Slots: which bias takes the constants is asked of the architecture, and every way is exact or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.conformance import assert_equal, logits_of, save_family
from support.restorations import TOKENS, mlp_alone, restoration_of, with_mlp
from support.tiers import HAS_TL4, mostly_slow
from support.tiny import build_model, save_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, Qwen2Config

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.reading import read_json
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.bias_slots import BiasSlots, find_slots
from lcc_lens.models.architecture.joint_bias_slots import JointSlots, find_joint_slots
from lcc_lens.models.architecture.retyping import retyped_configs
from lcc_lens.models.architecture.tiny_models import build_tiny, shrink, tiny_logits
from lcc_lens.models.hooked.sites import ConstantSite, projection_names
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.pair import load_pair
from lcc_lens.restoration.injections.changes import Shift
from lcc_lens.restoration.result import Restoration


def reloaded(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def check_export(pruned: Path, restoration: Restoration, out: Path) -> None:
    """The export is what the hooked model computes, which is not what the pruned one computes."""
    export(restoration, pruned, out)
    assert_equal(reloaded(out), logits_of(load_pair(pruned, pruned), restoration))


@pytest.mark.parametrize("agree", [True, False])
def test_heads_that_share_a_value_head_need_the_same_constant(agree: bool, tmp_path: Path) -> None:
    pruned = save_family("stablelm", tmp_path / "pruned")  # three heads to a value head
    restoration = restoration_of(pruned, heads=[Head(1, 3), Head(1, 4), Head(1, 5)])
    if agree:
        restoration.constants[:] = restoration.constants[0]
        check_export(pruned, restoration, tmp_path / "out")
        biases = load_file(tmp_path / "out" / "model.safetensors")
        own = biases["model.layers.1.self_attn.v_proj.bias"]
        assert torch.equal(own, torch.cat([torch.zeros(8), restoration.constants[0]]))
        assert float(biases["model.layers.0.self_attn.v_proj.bias"].abs().max()) == 0
    else:
        with pytest.raises(RequestError, match="got stablelm, which has none that is exact"):
            export(restoration, pruned, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_value_bias_takes_the_constant_itself(tmp_path: Path) -> None:
    pruned = save_family("qwen2, multi-head", tmp_path / "pruned")
    restoration = restoration_of(pruned, heads=[Head(0, 2), Head(2, 4)])
    check_export(pruned, restoration, tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    changed = sorted(name for name in old if not torch.equal(old[name], new[name]))
    assert changed == [f"model.layers.{layer}.self_attn.v_proj.bias" for layer in (0, 2)]
    assert old.keys() == new.keys()
    difference = (new[changed[0]] - old[changed[0]]).reshape(5, 8)
    assert torch.allclose(difference[2], restoration.constants[0], atol=1e-6)
    assert float(difference[[0, 1, 3, 4]].abs().max()) == 0


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize("rope", mostly_slow(ROPES, "yarn"))
def test_retyped_model_keeps_rope_norm_and_tied_embeddings(rope: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257, hidden_size=48, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-2, tie_word_embeddings=True, rope_parameters=ROPES[rope],
        initializer_range=0.2, max_position_embeddings=512, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:  # the model's own biases, which a fresh model has as zeros
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    pruned = save_model(model, tmp_path / "pruned")
    check_export(pruned, restoration_of(pruned), tmp_path / "out")
    kept = AutoConfig.from_pretrained(tmp_path / "out")
    assert (kept.model_type, kept.rms_norm_eps, kept.tie_word_embeddings) == ("llama", 1e-2, True)
    assert kept.rope_parameters == config.rope_parameters
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"]
    assert len(tiny_tokenizer()) == kept.vocab_size


def test_local_attention_acts_after_retyping(tmp_path: Path) -> None:
    pruned = save_family("mistral, sliding window", tmp_path / "pruned")
    check_export(pruned, restoration_of(pruned), tmp_path / "out")
    kept = AutoConfig.from_pretrained(tmp_path / "out")
    assert (kept.model_type, kept.sliding_window) == ("smollm3", 16)
    assert set(kept.layer_types) == {"sliding_attention"}
    kept.layer_types, kept.use_sliding_window = 3 * ["full_attention"], False
    everywhere = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=kept, attn_implementation="eager")
    assert TOKENS.shape[1] > 16
    with torch.no_grad():
        assert float((everywhere(TOKENS).logits - reloaded(tmp_path / "out")(TOKENS).logits).abs().max()) > 0.1


@pytest.mark.slow
def test_fused_maps_are_split_and_may_be_changed(tmp_path: Path) -> None:
    pruned = save_family("phi3", tmp_path / "pruned")
    name = "model.layers.1.self_attn.o_proj"
    shift = Shift(0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3)))
    constants = restoration_of(pruned)
    both = Restoration(
        constants.record, constants.heads, constants.constants, constants.magnitudes, constants.offset, ((name, shift),)
    )
    check_export(pruned, both, tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    parts = [new[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), old["model.layers.2.self_attn.qkv_proj.weight"])
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in new)
    assert not torch.equal(new[f"{name}.weight"], old[f"{name}.weight"])


def test_architecture_with_the_same_tensors_and_other_mathematics_is_not_retyped() -> None:
    """Gemma's tensors fit Llama by name and shape, but its norms add one to their gains."""
    config = GemmaConfig(
        vocab_size=257, hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    plain = build_tiny(shrink(config))
    assert plain is not None
    assert len(list(retyped_configs(config))) == 2
    for retyped in retyped_configs(config):
        tiny = build_tiny(shrink(retyped), dict(plain.named_parameters()))
        assert tiny is not None
        assert float((tiny_logits(tiny) - tiny_logits(plain)).abs().max()) > 0.1


def test_a_twin_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_tiny(shrink(build_model().config))
    assert not torch.equal(torch.rand(2), expected)  # build_model seeds itself
    torch.manual_seed(3)
    build_tiny(shrink(AutoConfig.for_model("llama")))
    assert torch.equal(torch.rand(2), expected)


def test_a_twin_is_small_and_has_every_kind_of_layer() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=26)
    small = shrink(config)
    assert set(small.layer_types) == set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.head_dim == config.head_dim
    tiny = build_tiny(small)
    assert tiny is not None
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 20_000_000


def test_slots_of_a_stored_bias_are_found_without_a_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lcc_lens.models.architecture.bias_slots

    monkeypatch.delattr(lcc_lens.models.architecture.bias_slots, "build_tiny")
    pruned = save_model(build_model(attention_bias=True), tmp_path / "pruned")
    slots = find_slots(Checkpoint(pruned), load_hooked(pruned).output_projections)
    assert (slots.way, slots.config, slots.zero_biases) == ("output bias", {}, {})


def test_architecture_that_cannot_be_built_in_small_keeps_its_own_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lcc_lens.models.architecture.bias_slots

    def refuse(config: object) -> None:
        raise ValueError("sizes that nobody publishes")

    monkeypatch.setattr(lcc_lens.models.architecture.bias_slots, "shrink", refuse)
    llama, gptj = save_model(build_model(), tmp_path / "llama"), save_family("gptj", tmp_path / "gptj")
    assert find_slots(Checkpoint(llama), load_hooked(llama).output_projections).way == "output bias, by attention_bias"
    with pytest.raises(RequestError, match="got gptj, which has none that is exact"):
        find_slots(Checkpoint(gptj), load_hooked(gptj).output_projections)


#: By family, how constants at the MLP are stored; None where they cannot be.
MLP_WAYS = {
    "llama": "output bias, by mlp_bias",
    "granite": "output bias, by mlp_bias",
    "falcon": "output bias, by bias",
    "gpt2": "output bias",
    "gptj": "output bias",
    "cohere": "bias of the parallel attention, by attention_bias",
    "mistral": "output bias, re-typed as llama",
    "mistral, sliding window": "output bias, re-typed as smollm3",
    "qwen2": "output bias, re-typed as llama",
    "qwen2, multi-head": "output bias, re-typed as llama",
    "phi3": "output bias, re-typed as llama",
    "gemma2": None,
    "mpt": None,
}


@pytest.mark.parametrize("family", mostly_slow(MLP_WAYS, "cohere", "qwen2", "gemma2"))
def test_constants_at_the_mlp_are_stored_alone_and_beside_those_of_heads(family: str, tmp_path: Path) -> None:
    if family == "cohere" and not HAS_TL4:
        pytest.skip("needs TransformerLens 4")
    pruned = save_family(family, tmp_path / "pruned")
    maps = projection_names(load_hooked(pruned).model, "mlp")
    both = with_mlp(restoration_of(pruned, heads=[Head(0, 1), Head(2, 3)]), pruned)
    way = MLP_WAYS[family]
    if way is None:
        with pytest.raises(RequestError, match=r"a constant per MLP in a bias, got .*, which has none that is exact"):
            export(mlp_alone(both), pruned, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [pruned]
        return
    assert find_slots(Checkpoint(pruned), maps, "mlp").way == way
    check_export(pruned, mlp_alone(both), tmp_path / "mlp")
    check_export(pruned, both, tmp_path / "both")


@pytest.mark.slow
def test_both_sites_share_a_bias_where_blocks_are_parallel(tmp_path: Path) -> None:
    pruned = save_family("gptj", tmp_path / "pruned")
    constants = restoration_of(pruned, heads=[Head(2, 3)])
    name, change = "transformer.h.2.mlp.fc_out.bias", {}
    for case, one in {
        "z": constants,
        "mlp": mlp_alone(with_mlp(constants, pruned)),
        "both": with_mlp(constants, pruned),
    }.items():
        check_export(pruned, one, tmp_path / case)
        old, new = (load_file(folder / "model.safetensors")[name] for folder in (pruned, tmp_path / case))
        change[case] = new - old
        assert float(change[case].abs().max()) > 0.1
    assert torch.allclose(change["both"], change["z"] + change["mlp"], atol=1e-6)


def test_joint_configuration_switches_both_sites_on(tmp_path: Path) -> None:
    """Each site's own has the other one's switch off; biases that only come along stay zero."""
    pruned = save_family("qwen2", tmp_path / "pruned")
    model = load_hooked(pruned).model
    sites: tuple[ConstantSite, ...] = ("z", "mlp")
    slots = find_joint_slots(Checkpoint(pruned), {site: projection_names(model, site) for site in sites})
    assert slots.by_site["z"].config["mlp_bias"] is False
    assert (slots.retyped_as, slots.config["attention_bias"], slots.config["mlp_bias"]) == ("llama", True, True)
    added = {name.split(".", 3)[3] for name in slots.new_biases(load_file(pruned / "model.safetensors").keys())}
    assert added == {f"{name}.bias" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


def test_ways_that_exclude_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import lcc_lens.models.architecture.joint_bias_slots

    ways = {
        "z": BiasSlots(("a.bias",), {"attention_bias": True}, {}, switches=("attention_bias",)),
        "mlp": BiasSlots(("b.bias",), {"mlp_bias": True}, {}, retyped_as="llama", switches=("mlp_bias",), site="mlp"),
    }
    monkeypatch.setattr(
        lcc_lens.models.architecture.joint_bias_slots, "find_slots", lambda checkpoint, maps, site, **_: ways[site]
    )
    message = "holds the constants of z and mlp, got output bias, by attention_bias and output bias, re-typed as llama"
    with pytest.raises(RequestError, match=message):
        find_joint_slots(Checkpoint(Path()), {"z": ("a",), "mlp": ("b",)})
    ways["z"] = BiasSlots(("a.bias",), {}, {})  # a stored bias is under either name
    assert isinstance(find_joint_slots(Checkpoint(Path()), {"z": ("a",), "mlp": ("b",)}), JointSlots)
