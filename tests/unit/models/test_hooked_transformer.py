"""TransformerLens 3's HookedTransformer goes through what TransformerBridge goes through (``make test-tl3``)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.conformance import FAMILIES, HEADS, TOKENS, assert_equal, logits_of
from support.reference import head_outputs, layer_outputs
from support.tiny import N_HEADS, N_LAYERS, build_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.baselines.eora import eora
from lcc_lens.evaluation.baselines.flap import flap
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.session.side_by_side import generate
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.hooked.fused_attention import can_fuse
from lcc_lens.models.hooked.hooked_transformer import checkpoint_of, is_hooked_transformer, make_hooked_transformer
from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.restoration.injections.adapters import adapters
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig

HAS_IT = int(version("transformer-lens").split(".")[0]) < 4
needs_it = pytest.mark.skipif(not HAS_IT, reason="TransformerLens 4 has no HookedTransformer")
KIND = "hooked-transformer"
_LLAMA = FAMILIES["llama"][1]
#: By name: the model type and its sizes; every bias is random.
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {**_LLAMA, "attention_bias": True}),
    "llama, other frequencies": ("llama", {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "gpt2, own width": ("gpt2", {**FAMILIES["gpt2"][1], "n_inner": 44}),
    **{name: FAMILIES[name] for name in ("gpt2", "gpt_neox", "mistral", "qwen2", "qwen3")},
}


def save(kind: str, settings: dict[str, Any], path: Path) -> Path:
    """A random model with biases that matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return save_model(model, path)


def made_elsewhere(path: Path, **processing: bool) -> Any:
    """A HookedTransformer as a notebook has it; TransformerLens' own from_pretrained would ask the hub."""
    plain = AutoModelForCausalLM.from_pretrained(path)
    model = make_hooked_transformer(plain, load_tokenizer(path), path)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    if processing:
        model.load_and_process_state_dict(model.state_dict(), **{step: step in processing for step in steps})
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense Llama with attention biases and grouped-query heads, and the same without its small weights."""
    folder = tmp_path_factory.mktemp("tl3")
    model = build_model(attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    dense = save_model(model, folder / "dense")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter[parameter.abs() < parameter.abs().median()] = 0.0
    return dense, save_model(model, folder / "pruned")


@pytest.fixture(scope="module")
def hooked(directories: tuple[Path, Path]) -> Pair:
    return load_pair(*directories, hooks=KIND)


@pytest.fixture(scope="module")
def scanned(hooked: Pair, question_file: Path) -> Scan:
    data = load_data(str(question_file), role="probe")
    return scan(hooked, data, positions="last", selectors=(), spectra=("z", "mlp"), display=0)


@pytest.mark.skipif(HAS_IT, reason="TransformerLens 3 has it")
def test_without_it_the_request_is_refused(dense_dir: Path) -> None:
    with pytest.raises(
        RequestError, match=r"expected TransformerLens 3 for HookedTransformer, got a version without it"
    ):
        load_hooked(dense_dir, hooks=KIND)


def test_unknown_kind_is_refused(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_HOOKS", "strings")
    with pytest.raises(RequestError, match="expected LCC_LENS_HOOKS to be one of bridge, hooked-transformer"):
        load_hooked(dense_dir)


@needs_it
@pytest.mark.parametrize("name", TAKEN)
def test_logits_and_head_outputs_are_the_plain_models(name: str, tmp_path: Path) -> None:
    kind, settings = TAKEN[name]
    path = save(kind, settings, tmp_path / "model")
    loaded = load_hooked(path, hooks=KIND)
    assert is_hooked_transformer(loaded.model)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    seen: dict[str, torch.Tensor] = {}
    for layer, projection in enumerate(loaded.output_projections):
        plain.get_submodule(projection).register_forward_pre_hook(
            lambda module, inputs, layer=layer: seen.__setitem__(f"blocks.{layer}.attn.hook_z", inputs[0].clone())
        )
    with torch.no_grad():
        logits, cache = loaded.model.run_with_cache(TOKENS)
        assert_equal(plain, logits)
    cfg = loaded.model.cfg
    assert len(seen) == cfg.n_layers
    for point, z in seen.items():
        assert cache[point].shape == (*TOKENS.shape, cfg.n_heads, cfg.d_head)
        assert torch.allclose(cache[point].flatten(2), z, rtol=1e-4, atol=1e-5)
    assert not can_fuse(loaded.model)
    assert cfg.n_ctx == 512
    OutputProjections.of(loaded.model)
    Unembedding.of(loaded.model)


@needs_it
def test_selectors_score_heads_as_with_the_bridge(directories: tuple[Path, Path], question_file: Path) -> None:
    data = load_data(str(question_file), role="probe")
    names = ("probe", "interaction", "attribution", "patching", "gradient", "kl")
    found = {
        kind: scan(load_pair(*directories, hooks=kind), data, selectors=names, selector_examples=6, display=0)
        for kind in ("bridge", KIND)
    }
    for name in names:
        expected, got = (found[kind].scores(name).value for kind in ("bridge", KIND))
        assert torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())), name
        assert float(expected.std()) > 0


@needs_it
def test_output_biases_of_llama_are_kept(directories: tuple[Path, Path], hooked: Pair) -> None:
    plain = AutoModelForCausalLM.from_pretrained(directories[0])
    for block, layer in zip(hooked.dense.blocks, plain.model.layers, strict=True):
        assert float(block.attn.b_O.abs().max()) > 0.1
        assert torch.equal(block.attn.b_O, layer.self_attn.o_proj.bias)
        assert torch.equal(block.attn._b_V.flatten(), layer.self_attn.v_proj.bias)


@needs_it
def test_half_precision_is_the_checkpoints(directories: tuple[Path, Path]) -> None:
    loaded = load_hooked(directories[0], hooks=KIND, dtype=torch.bfloat16)
    assert loaded.model.cfg.dtype == torch.bfloat16 == loaded.model.blocks[0].attn.W_O.dtype


@needs_it
def test_text_is_tokenised_as_the_tokenizer_does(directories: tuple[Path, Path], hooked: Pair) -> None:
    assert hooked.dense.to_tokens("two words").tolist()[0] == load_tokenizer(directories[0])("two words")["input_ids"]


@needs_it
def test_scan_equals_plain_models(
    hooked: Pair, scanned: Scan, directories: tuple[Path, Path], question_file: Path
) -> None:
    sequences = encode(load_data(str(question_file), role="probe"), hooked.tokenizer)
    tokens = [s.tokens for s in sequences]
    ends = [s.loss_from - 1 for s in sequences]
    z, mlp = [], []
    for directory in directories:
        outputs, (posts, _) = head_outputs(directory, tokens, N_HEADS), layer_outputs(directory, tokens)
        z.append(torch.stack([x[end] for x, end in zip(outputs, ends, strict=True)]))
        mlp.append(torch.stack([x[end] for x, end in zip(posts, ends, strict=True)]))
    assert scanned.record.n_samples == len(sequences)
    assert scanned.mean_difference.abs().max() > 0.1
    assert torch.allclose(scanned.mean_difference, (z[0] - z[1]).mean(0), atol=1e-4)
    assert torch.allclose(scanned.others["mlp"].mean_difference, (mlp[0] - mlp[1]).mean(0), atol=1e-4)


@needs_it
@pytest.mark.parametrize("method", ["lcc", "offset", "mean-shift", "gain", "lcc+mlp-gain"])
def test_restored_checkpoint_computes_what_the_hooks_computed(
    method: str, hooked: Pair, scanned: Scan, directories: tuple[Path, Path], question_file: Path, tmp_path: Path
) -> None:
    data = load_data(str(question_file), role="train")
    restoration = restore(hooked, scanned, HEADS, data, method=method, config=TrainConfig(epochs=2))
    if restoration.record.n_trained:
        assert restoration.record.losses["restored"] < restoration.record.losses["pruned"]
    expected = logits_of(hooked, restoration)
    export(restoration, directories[1], tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert_equal(plain, expected)
    with torch.no_grad():  # and the model is as it was
        assert_equal(
            AutoModelForCausalLM.from_pretrained(directories[1], attn_implementation="eager"), hooked.pruned(TOKENS)
        )


@needs_it
def test_export_can_be_verified_by_it_too(
    hooked: Pair, scanned: Scan, directories: tuple[Path, Path], question_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LCC_LENS_HOOKS", KIND)
    data = load_data(str(question_file), role="train")
    restoration = restore(hooked, scanned, HEADS, data, method="mean-shift")
    report = export(restoration, directories[1], tmp_path / "out")
    assert report.logit_effect > 0.1
    again = load_hooked(tmp_path / "out")
    assert is_hooked_transformer(again.model)
    with torch.no_grad():
        assert torch.allclose(again.model(TOKENS), logits_of(hooked, restoration), rtol=1e-4, atol=1e-4)


@needs_it
@pytest.mark.parametrize("method", ["low-rank", "norms", "masked"])
def test_what_needs_other_weights_is_refused(method: str, hooked: Pair, question_file: Path) -> None:
    with pytest.raises(
        RequestError, match=r"got a HookedTransformer, whose weights are copies; use constants and gains"
    ):
        restore(hooked, None, [], load_data(str(question_file), role="train"), method=method)


@needs_it
@pytest.mark.parametrize("build", [lambda pair: adapters(pair.pruned), lambda pair: eora(pair.pruned, pair.dense, []),
                                   lambda pair: flap(pair, [])], ids=["lora", "eora", "flap"])  # fmt: skip
def test_baselines_beside_other_weights_are_refused(build: Any, hooked: Pair) -> None:
    with pytest.raises(RequestError, match=r"got a HookedTransformer.*LCC_LENS_HOOKS=bridge"):
        build(hooked)


@needs_it
def test_generation_is_refused(hooked: Pair) -> None:
    with pytest.raises(RequestError, match=r"that transformers can generate and score tasks with, got a HookedTransf"):
        generate(hooked, {}, "one plus", max_new_tokens=2)


@needs_it
def test_one_in_memory_is_taken_as_it_is(dense_dir: Path, pruned_dir: Path) -> None:
    path = save("gpt_neox", FAMILIES["gpt_neox"][1], dense_dir.parent / "neox")
    made = made_elsewhere(path)
    loaded = load_hooked(made)
    assert loaded.model is made
    assert loaded.identity == load_hooked(path).identity
    pair = load_pair(made, path)
    assert pair.dense is made
    assert len(pair.output_projections) == N_LAYERS


def test_names_of_the_registry_have_their_owners() -> None:
    names = {
        "gpt2-xl": "openai-community/gpt2-xl", "distilgpt2": "distilbert/distilgpt2",
        "EleutherAI/pythia-70m": "EleutherAI/pythia-70m",
    }  # fmt: skip
    for name, wanted in names.items():
        cfg = SimpleNamespace(normalization_type="LN", tokenizer_name=name)
        assert checkpoint_of(SimpleNamespace(cfg=cfg)) == wanted


@needs_it
@pytest.mark.parametrize(
    ("processing", "message"),
    [
        ({"fold_ln": True}, r"got folded norms \(LNPre\); load it by HookedTransformer.from_pretrained_no_processing"),
        ({"center_writing_weights": True}, r"expected the weights of .*, got others in "),
        ({"center_unembed": True}, r"expected the weights of .*, got others in unembed.W_U"),
        ({"fold_value_biases": True}, r"expected blocks.0.attn.b_V of .*, got zeros|got others in blocks.0.attn.b"),
    ],
)
def test_processed_weights_are_refused(processing: dict[str, bool], message: str, tmp_path: Path) -> None:
    path = save("gpt_neox", FAMILIES["gpt_neox"][1], tmp_path / "neox")
    with pytest.raises(RequestError, match=message):
        load_hooked(made_elsewhere(path, **processing))


@needs_it
def test_biases_lost_on_loading_are_refused(directories: tuple[Path, Path]) -> None:
    lost = made_elsewhere(directories[0])
    assert load_hooked(lost).model is lost
    lost.blocks[0].attn.b_O.zero_()
    with pytest.raises(RequestError, match=r"expected blocks.0.attn.b_O of .*, got zeros: TransformerLens drops it"):
        load_hooked(lost)


@needs_it
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("cohere", FAMILIES["cohere"][1], r"expected an architecture that HookedTransformer takes, got cohere"),
        ("llama", {**_LLAMA, "mlp_bias": True}, r"biases before the gate of the MLP, mlp.gate_proj"),
    ],
)
def test_what_it_does_not_compute_is_refused(kind: str, settings: Any, message: str, tmp_path: Path) -> None:
    path = save(kind, settings, tmp_path / "model")
    with pytest.raises(LensError, match=message):
        load_hooked(path, hooks=KIND)


@needs_it
def test_one_that_was_not_loaded_here_is_refused(dense_dir: Path) -> None:
    from lcc_lens.models.hooked.sites import projection_names

    path = save("gpt_neox", FAMILIES["gpt_neox"][1], dense_dir.parent / "own")
    with pytest.raises(RequestError, match="got one that was not checked against its checkpoint"):
        projection_names(made_elsewhere(path), "z")
