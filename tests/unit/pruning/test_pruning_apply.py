"""Pruning of whole checkpoints, against a slow re-derivation that reruns the whole model for every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.pruning import prune_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.progress import tracked_by
from lcc_lens.core.side_files import with_older_entries
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, Unstructured, detect_pattern
from lcc_lens.pruning.methods.masks import keep_mask

SHAPE = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "vocab_size": 60}
# Weights large enough that pruning one layer visibly changes what the next one reads.
LLAMA = LlamaConfig(
    **SHAPE, num_attention_heads=5, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True, initializer_range=0.4
)
GPT2 = GPT2Config(n_embd=28, n_head=4, n_layer=3, vocab_size=60, n_positions=32, initializer_range=0.4)
# Windows shorter than the sequences: full and sliding layers get different masks.
SLIDING = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3 = Gemma3TextConfig(**SHAPE, **SLIDING, layer_types=TYPES, initializer_range=0.4)
GEMMA2 = Gemma2Config(**SHAPE, **SLIDING, layer_types=TYPES, initializer_range=0.4)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gemma3": GEMMA3, "gemma2": GEMMA2}

TOKENS = torch.randint(0, 60, (5, 9), generator=torch.Generator().manual_seed(3))
HALF = Unstructured(0.5)


def save_random(config: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model by family."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_random(CONFIGS[family], path)

    return folder


def run(model_dir: Path, out: Path, pattern: Pattern = HALF, **options: Any) -> dict[str, Any]:
    """Prune with Wanda by default, in uneven batches."""
    defaults = {"method": "wanda", "calibration": TOKENS, "batch_size": 2, "provenance": {"data": "random"}}
    return prune_tokens(model_dir, out, pattern=pattern, **{**defaults, **options})


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def rows_of(module: nn.Module) -> Tensor:
    """A view of a weight with one row per output."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def oracle(model_dir: Path, n_zeros: Callable[[int], int], *, sequential: bool) -> dict[str, Tensor]:
    """Wanda by its definition: for every layer the whole model runs again, one sequence at a time."""
    model, source = (AutoModelForCausalLM.from_pretrained(model_dir).eval() for _ in range(2))
    for index, layer in enumerate(layers_of(model)):
        seen: dict[str, list[Tensor]] = {}
        # The inputs come from the model as pruned so far or, for comparison, from the dense one.
        observed = linears(layers_of(model if sequential else source)[index])
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, seen=seen, name=name: seen.setdefault(name, []).append(args[0])
            )
            for name, module in observed.items()
        ]
        for sequence in TOKENS:
            (model if sequential else source)(sequence[None])
        for handle in handles:
            handle.remove()
        for name, module in linears(layer).items():
            inputs = torch.cat([batch.flatten(0, 1) for batch in seen[name]]).double()
            weight = rows_of(module)
            for row in range(weight.shape[0]):
                worth = [abs(float(weight[row, j])) * float(inputs[:, j].norm()) for j in range(weight.shape[1])]
                for j in sorted(range(len(worth)), key=lambda j: worth[j])[: n_zeros(len(worth))]:
                    weight[row, j] = 0
    return {name: value for name, value in model.state_dict().items() if name in tensors(model_dir)}


@pytest.mark.parametrize("family", CONFIGS)
def test_wanda_is_its_definition_layer_after_layer(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    report = run(dense(family), tmp_path / "out")
    pruned = tensors(tmp_path / "out")
    expected = oracle(dense(family), lambda width: width // 2, sequential=True)
    assert pruned.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(pruned[name], value), name
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_later_layers_see_the_pruned_ones(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    run(dense(family), tmp_path / "out")
    pruned = tensors(tmp_path / "out")
    from_dense_inputs = oracle(dense(family), lambda width: width // 2, sequential=False)
    matrices = [[matrix.name for matrix in layer] for layer in find_matrices(Checkpoint(dense(family)))]
    assert all(torch.equal(pruned[name], from_dense_inputs[name]) for name in matrices[0])
    assert not any(torch.equal(pruned[name], from_dense_inputs[name]) for name in matrices[2])


@pytest.mark.parametrize("family", CONFIGS)
def test_only_pruned_weights_change(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    report = run(dense(family), tmp_path / "out", Unstructured(0.3))
    before, after = tensors(dense(family)), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report["matrices"])
    assert len(changed) == 3 * len(linears(layers_of(AutoModelForCausalLM.from_config(CONFIGS[family]))[0]))
    for name in changed:
        survives = after[name] != 0
        assert torch.equal(after[name][survives].view(torch.int32), before[name][survives].view(torch.int32))
        rows = after[name].T if family == "gpt2" else after[name]
        assert set((rows == 0).sum(dim=1).tolist()) == {int(rows.shape[1] * 0.3)}, name


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_four_holds_in_every_group(
    family: str, method: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    report = run(dense(family), tmp_path / "out", NofM(2, 4), method=method)
    after = tensors(tmp_path / "out")
    for name in report["matrices"]:
        rows = after[name].T if family == "gpt2" else after[name]
        assert ((rows.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
        assert detect_pattern(rows) == "2:4"
    assert (report["pattern"], report["pattern_found"], report["sparsity"]) == ("2:4", "2:4", 0.5)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_result_is_a_plain_model(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    run(dense(family), tmp_path / "out")
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense(family), tmp_path / "out")]
    with torch.no_grad():
        logits = [model(TOKENS).logits for model in models]
    assert torch.isfinite(logits[1]).all()
    assert (logits[0] - logits[1]).abs().max() > 0.1
    configs = [json.loads((path / "config.json").read_text()) for path in (dense(family), tmp_path / "out")]
    assert with_older_entries(configs[0]) == configs[1]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_the_stored_format_survives_the_computed_one(
    stored: torch.dtype, computed: torch.dtype, tmp_path: Path
) -> None:
    source = save_random(LLAMA, tmp_path / "dense", stored)
    report = run(source, tmp_path / "out", dtype=computed)
    before, after = tensors(source), tensors(tmp_path / "out")
    for name, value in after.items():
        assert value.dtype == stored
        kept = value != 0 if name in report["matrices"] else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept])
    configs = [json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out")]
    assert with_older_entries(configs[0]) == configs[1]


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_magnitude_needs_no_data_and_keeps_the_largest(
    scope: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    report = run(dense("llama"), tmp_path / "out", method="magnitude", scope=scope, calibration=None)
    before, after = tensors(dense("llama")), tensors(tmp_path / "out")
    for name in report["matrices"]:
        assert torch.equal(after[name], before[name] * keep_mask(before[name].abs(), HALF, scope))
    assert report["calibration"] is None


def test_batches_do_not_matter(dense: Callable[[str], Path], tmp_path: Path) -> None:
    for size in (1, 3, 8):
        run(dense("gemma3"), tmp_path / str(size), batch_size=size)
    first, *others = (tensors(tmp_path / str(size)) for size in (1, 3, 8))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_the_report_names_what_was_done(dense: Callable[[str], Path], tmp_path: Path) -> None:
    steps: list[str] = []

    def note(items: Any, total: int, description: str) -> Any:
        for item in items:
            steps.append(f"{description} of {total}")
            yield item

    with tracked_by(note):
        report = run(dense("llama"), tmp_path / "out", seed=11)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == report
    after = tensors(tmp_path / "out")
    zeros = {name: int((after[name] == 0).sum()) for name in report["matrices"]}
    assert report["matrices"] == {name: pytest.approx(n / after[name].numel()) for name, n in zeros.items()}
    assert report["sparsity"] == pytest.approx(sum(zeros.values()) / sum(after[name].numel() for name in zeros))
    assert report["calibration"] == {"data": "random", "sequences": 5, "length": 9}
    assert (report["method"], report["pattern"], report["scope"]) == ("wanda", "unstructured", "row")
    assert (report["seed"], report["sparsity_asked"], report["pattern_found"]) == (11, 0.5, "unstructured")
    assert report["dense_sha256"] == sha256_file(dense("llama") / "model.safetensors")
    assert steps == ["pruning layers of 3"] * 3


def test_a_checkpoint_of_the_bare_decoder_is_pruned_under_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2Model(GPT2).save_pretrained(tmp_path / "dense")
    report = run(tmp_path / "dense", tmp_path / "out")
    assert "h.0.attn.c_attn.weight" in report["matrices"]
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (pruned.transformer.h[2].mlp.c_proj.weight == 0).float().mean() == pytest.approx(0.5)


def test_shards_are_pruned_where_they_are(dense: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    run(tmp_path / "sharded", tmp_path / "out")
    run(dense("llama"), tmp_path / "whole")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_overwriting_replaces_the_old_result(dense: Callable[[str], Path], tmp_path: Path) -> None:
    run(dense("llama"), tmp_path / "out")
    run(dense("llama"), tmp_path / "out", Unstructured(0.25), overwrite=True)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["sparsity_asked"] == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("pattern", [HALF, NofM(2, 4)], ids=str)
def test_sparsegpt_keeps_the_share_and_errs_less_than_wanda(
    family: str, pattern: Pattern, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    if family == "llama" and isinstance(pattern, NofM):
        pytest.skip("the output projection's 30 inputs are no multiple of 4")
    tokens = torch.randint(0, 60, (40, 9), generator=torch.Generator().manual_seed(9))
    logits = {}
    for method in ("wanda", "sparsegpt"):
        report = run(dense(family), tmp_path / method, pattern, method=method, calibration=tokens)
        assert report["sparsity"] == pytest.approx(0.5, abs=0.001 if method == "sparsegpt" else 0.01)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / method).eval()
        with torch.no_grad():
            logits[method] = model(tokens).logits
    with torch.no_grad():
        target = AutoModelForCausalLM.from_pretrained(dense(family)).eval()(tokens).logits
    errors = {method: float((found - target).square().mean()) for method, found in logits.items()}
    assert errors["sparsegpt"] < errors["wanda"]
    if isinstance(pattern, NofM):
        assert report["pattern_found"] == "2:4"


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_sparsegpt_factorises_in_double_precision_whatever_the_model_computes_in(
    computed: torch.dtype, dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcc_lens.pruning.methods import obs
    from lcc_lens.pruning.methods import sparsegpt as second_order

    seen: list[torch.dtype] = []

    def noting(*args: Any) -> Any:
        found = obs.sparsegpt(*args)
        seen.extend((args[0].dtype, args[1].factor.dtype, found.dtype))
        return found

    monkeypatch.setattr(second_order, "sparsegpt", noting)
    tokens = TOKENS.repeat(2, 1)
    run(dense("llama"), tmp_path / "out", method="sparsegpt", dtype=computed, calibration=tokens)
    assert set(seen[::3]) == {torch.float32} == set(seen[2::3])
    assert set(seen[1::3]) == {torch.float64}


def test_too_few_tokens_to_invert(dense: Callable[[str], Path], tmp_path: Path) -> None:
    match = r"expected at least 44 calibration tokens for sparsegpt, as many as model\.layers\.0\.mlp\.down_proj"
    with pytest.raises(RequestError, match=match):
        run(dense("llama"), tmp_path / "out", method="sparsegpt", calibration=TOKENS[:4])
    assert list(tmp_path.iterdir()) == []


def test_broken_inputs_are_named_by_second_order_methods(dense: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "dense"
    model = AutoModelForCausalLM.from_pretrained(dense("llama"))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(3e38)
    model.save_pretrained(source)
    for method in ("sparsegpt", "slimgpt"):
        with pytest.raises(LensError, match=r"(model\.layers\.1|layer 1)"):
            run(source, tmp_path / "out", Unstructured(0.2), method=method, calibration=TOKENS.repeat(2, 1))
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
