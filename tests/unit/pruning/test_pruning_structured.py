"""SlimGPT on whole checkpoints: zeroed and sliced say the same, and every later step understands the head map."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.pruning import prune_tokens
from support.tiers import mostly_slow
from support.tiny import build_model, save_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import HEAD_MAP, Head, HeadMap, read_head_map
from lcc_lens.data.datasets import load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.anatomy import find_anatomies
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.architecture.sparsity_patterns import NofM, Unstructured
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.methods.slimgpt import Quota, fixed_quota, possible_quotas
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig

SHAPE = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "vocab_size": 60}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "initializer_range": 0.4}
TOKENS = torch.randint(0, 60, (14, 9), generator=torch.Generator().manual_seed(3))
SLICEABLE = {
    "llama": LlamaConfig(**SHAPE, **GROUPED, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**SHAPE, **GROUPED, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE, **GROUPED),
    "gemma3": Gemma3TextConfig(**SHAPE, **GROUPED, sliding_window=4),
}
ZEROED_ONLY = {
    "gpt2": GPT2Config(n_embd=28, n_head=4, n_layer=3, vocab_size=60, n_positions=32, initializer_range=0.4),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, vocab_size=60,
        initializer_range=0.4,
    ),
    "opt": OPTConfig(
        hidden_size=24, ffn_dim=44, num_hidden_layers=3, num_attention_heads=4, vocab_size=60, init_std=0.4,
        word_embed_proj_dim=24,
    ),
}  # fmt: skip
FUSED = {"phi3": Phi3Config(**SHAPE, **GROUPED, pad_token_id=0)}
FAMILIES: dict[str, Any] = {**SLICEABLE, **ZEROED_ONLY, **FUSED}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model by family; biases are not zero."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(FAMILIES[family])
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(path)
        return path

    return folder


def run(source: Path, out: Path, share: float = 0.3, **options: Any) -> dict[str, Any]:
    defaults = {"calibration": TOKENS, "batch_size": 5}
    return prune_tokens(source, out, "slimgpt", Unstructured(share), **{**defaults, **options})


def logits(path: Path, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits


@pytest.mark.parametrize("family", [*SLICEABLE, *FUSED])
def test_sliced_and_zeroed_compute_the_same(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    zeroed = run(dense(family), tmp_path / "zeroed", schedule="uniform", split="proportional")
    sliced = run(dense(family), tmp_path / "sliced", sliced=True, split="proportional")
    before, first, second = (logits(path) for path in (dense(family), tmp_path / "zeroed", tmp_path / "sliced"))
    assert (first - before).abs().max() > 0.1
    assert sliced["removed_heads"] == zeroed["removed_heads"]
    if sliced["removed_neurons"] == zeroed["removed_neurons"]:  # widths are rounded up when sliced
        assert torch.allclose(first, second, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 6)
    assert config.intermediate_size == 44 - sliced["removed_neurons"][0]
    n_dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(dense(family)).parameters())
    assert sum(p.numel() for p in model.parameters()) < 0.85 * n_dense


@pytest.mark.parametrize("family", SLICEABLE)
def test_slicing_takes_exactly_what_was_zero(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    """With equal widths the sliced tensors are the zeroed ones without their empty rows and columns."""
    run(dense(family), tmp_path / "sliced", share=0.34, sliced=True, split="proportional")
    report = json.loads((tmp_path / "sliced" / "pruning.json").read_text())
    neurons = report["removed_neurons"]
    assert len(set(neurons)) == 1
    assert neurons[0] % 4 == 0
    tensors, original = (load_file(p / "model.safetensors") for p in (tmp_path / "sliced", dense(family)))
    for layer, gone in enumerate(report["removed_heads"]):
        kept = [h for h in range(8) if h not in gone]
        rows = [6 * head + i for head in kept for i in range(6)]
        name = f"model.layers.{layer}.self_attn.q_proj"
        assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"][rows])
        if f"{name}.bias" in original:
            assert torch.equal(tensors[f"{name}.bias"], original[f"{name}.bias"][rows])
        groups = sorted({head // 2 for head in kept})
        rows = [6 * group + i for group in groups for i in range(6)]
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        assert torch.equal(tensors[name], original[name][rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_heads_and_neurons_are_gone_and_the_rest_is_refitted(
    family: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    report = run(dense(family), tmp_path / "out", split="proportional")
    anatomies = find_anatomies(dense(family), find_matrices(Checkpoint(dense(family))))
    before, after = (load_file(path / "model.safetensors") for path in (dense(family), tmp_path / "out"))
    changed = 0
    for layer, anatomy in enumerate(anatomies):
        for block, gone in (
            (anatomy.attention, [h // anatomy.heads_per_group for h in report["removed_heads"][layer]]),
            (anatomy.mlp, None),
        ):
            output = block.output.rows(after[block.output.name])
            groups = sorted(set(gone)) if gone is not None else None
            is_empty = (output == 0).all(dim=0)
            if groups is None:
                assert int(is_empty.sum()) == report["removed_neurons"][layer]
            else:
                assert is_empty.nonzero().flatten().tolist() == sorted(block.columns[groups].flatten().tolist())
            kept_columns = ~is_empty
            dense_output = block.output.rows(before[block.output.name])
            if bool(is_empty.any()):
                assert not torch.equal(output[:, kept_columns], dense_output[:, kept_columns])  # compensated
                changed += 1
            for matrix, rows in block.inputs:
                stays = torch.tensor([not bool(is_empty[block.columns[g]].all()) for g in range(block.n_groups)])
                was, now = matrix.rows(before[matrix.name]), matrix.rows(after[matrix.name])
                assert torch.equal(now[rows[stays].flatten()], was[rows[stays].flatten()])
                assert not now[rows[~stays].flatten()].any()
    assert changed >= 4
    assert report["share_removed"] == pytest.approx(0.3, abs=0.02)
    assert not torch.allclose(logits(dense(family)), logits(tmp_path / "out"), atol=0.1)


def test_compensation_beats_the_controls(dense: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = torch.randint(0, 60, (64, 9), generator=torch.Generator().manual_seed(5))
    target = logits(dense("llama"), tokens)
    errors = {}
    for choice in ("error", "magnitude", "random"):
        run(dense("llama"), tmp_path / choice, calibration=tokens, choice=choice)
        errors[choice] = float((logits(tmp_path / choice, tokens) - target).square().mean())
    assert errors["error"] < 0.8 * min(errors["magnitude"], errors["random"])


def test_rising_schedules_take_more_from_later_layers(dense: Callable[[str], Path], tmp_path: Path) -> None:
    neurons = {}
    for schedule in ("log", "uniform", "falling"):
        report = run(dense("llama"), tmp_path / schedule, share=0.15, schedule=schedule)
        heads = [len(gone) for gone in report["removed_heads"]]
        neurons[schedule] = [6 * 24 * 3 * h + n * 72 for h, n in zip(heads, report["removed_neurons"], strict=True)]
        assert report["share_removed"] == pytest.approx(0.15, abs=0.01)
    assert neurons["log"] == sorted(neurons["log"])
    assert neurons["falling"] == sorted(neurons["falling"], reverse=True)
    assert len(set(neurons["uniform"])) == 1


def test_neurons_make_up_for_what_whole_groups_cannot_give(dense: Callable[[str], Path]) -> None:
    anatomy = find_anatomies(dense("llama"), find_matrices(Checkpoint(dense("llama"))))[0]
    group, neuron, total = 6 * 24 * 6, 3 * 24, 4 * 6 * 24 * 6 + 44 * 72
    assert (anatomy.attention.group_size(24), anatomy.mlp.group_size(24)) == (group, neuron)
    assert anatomy.n_weights == total
    for ratio in (0.0, 0.05, 0.1, 0.2, 0.4, 0.7):
        quotas = possible_quotas(anatomy, ratio)
        assert quotas[0].groups == (0 if ratio < 0.5 else 2)  # neurons alone cannot give 70 %
        for quota in quotas:
            assert quota.groups * group + quota.neurons * neuron == pytest.approx(ratio * total, abs=neuron / 2 + 1)
    assert all(quota.neurons % 4 == 0 for quota in possible_quotas(anatomy, 0.2, multiple=4))
    assert possible_quotas(anatomy, 0.0) == [Quota(0, 0)]
    assert [quota.groups for quota in possible_quotas(anatomy, 0.4, allowed_groups={0, 2})] == [0, 2]
    quotas = possible_quotas(anatomy, 0.4)
    assert fixed_quota(quotas, "spared", 0.4, 4).groups == 1
    assert fixed_quota(quotas, "proportional", 0.4, 4).groups == 2
    assert fixed_quota(possible_quotas(anatomy, 0.2), "spared", 0.2, 4).groups == 0


def test_the_split_between_heads_and_neurons_follows_the_error(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Heads that do nothing go first, and stay where the neurons do nothing."""
    tokens = torch.randint(0, 60, (40, 9), generator=torch.Generator().manual_seed(5))
    for kind, idle in (("heads", "self_attn.o_proj"), ("neurons", "mlp.down_proj")):
        model = AutoModelForCausalLM.from_pretrained(dense("llama"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if idle in name:
                    parameter *= 1e-3
        model.save_pretrained(tmp_path / f"idle_{kind}")
        report = run(tmp_path / f"idle_{kind}", tmp_path / kind, calibration=tokens, schedule="uniform", split="error")
        n_heads = [len(gone) for gone in report["removed_heads"]]
        assert all(n >= 4 for n in n_heads) if kind == "heads" else n_heads == [0, 0, 0]
        assert report["share_removed"] == pytest.approx(0.3, abs=0.02)


@pytest.fixture(scope="module")
def grouped_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(num_attention_heads=8, num_key_value_heads=4, hidden_size=48)
    return save_model(model, tmp_path_factory.mktemp("grouped") / "dense")


@pytest.fixture(scope="module")
def structured(grouped_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A zeroed and a sliced model pruned from the same dense one."""
    tokens = torch.randint(1, 257, (8, 32), generator=torch.Generator().manual_seed(1))
    root = tmp_path_factory.mktemp("structured")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            run(grouped_dense, root / kind, calibration=tokens, sliced=kind == "sliced", split="proportional")
        return root / kind

    return folder


@pytest.mark.parametrize("kind", mostly_slow(["zeroed", "sliced"], "sliced"))
def test_scan_restore_and_export_follow_the_head_map(
    kind: str, grouped_dense: Path, structured: Callable[[str], Path], question_file: Path, tmp_path: Path
) -> None:
    pair = load_pair(grouped_dense, structured(kind))
    report = json.loads((structured(kind) / "pruning.json").read_text())
    found = scan(pair, load_data(str(question_file)))
    found.save(tmp_path / "run")
    assert Scan.load(tmp_path / "run").record == found.record
    table = found.table()
    if kind == "sliced":
        assert pair.n_heads == 6
        kept = [[h for h in range(8) if h not in gone] for gone in report["removed_heads"]]
        assert found.record.dense_heads == tuple(map(tuple, kept))
        assert table.dense_head.tolist() == [head for heads in kept for head in heads]
    else:
        assert pair.n_heads == 8
        assert [list(gone) for gone in found.record.removed_heads] == report["removed_heads"]
        assert int(table.is_removed.sum()) == sum(map(len, report["removed_heads"]))
    heads = found.select("mse", share=1.0)
    assert len(heads) == sum(pair.n_heads - len(gone) for gone in pair.head_map.removed)
    assert not any(head.head in pair.head_map.removed[head.layer] for head in heads)
    data = load_data(str(question_file))
    restoration = restore(pair, found, heads, data, config=TrainConfig(batch_size=16), run=tmp_path / "run")
    exported = export(restoration, structured(kind), tmp_path / "out")
    assert exported.logit_effect > 1e-3
    assert exported.logit_difference < 1e-3
    assert read_head_map(tmp_path / "out") == read_head_map(structured(kind))
    again = scan(load_pair(grouped_dense, tmp_path / "out"), load_data(str(question_file)))
    assert again.record.dense_heads == found.record.dense_heads


@pytest.mark.slow
def test_a_sliced_head_is_compared_with_its_own_dense_head(
    grouped_dense: Path, structured: Callable[[str], Path], question_file: Path
) -> None:
    """In the first layer kept heads compute exactly what they did, so a wrong map would show a difference."""
    found = scan(load_pair(grouped_dense, structured("sliced")), load_data(str(question_file)))
    assert float(found.relative_loss[0].max()) < 1e-4
    assert float(found.relative_loss[1].min()) > 1e-2
    moved = tuple(tuple((h + 1) % 8 for h in heads) for heads in found.record.dense_heads)
    pair = load_pair(grouped_dense, structured("sliced"))
    object.__setattr__(pair, "head_map", HeadMap(moved, pair.head_map.removed))
    assert float(scan(pair, load_data(str(question_file))).relative_loss[0].max()) > 0.1


def test_a_removed_head_cannot_be_chosen(
    grouped_dense: Path, structured: Callable[[str], Path], question_file: Path
) -> None:
    pair = load_pair(grouped_dense, structured("zeroed"))
    found = scan(pair, load_data(str(question_file)))
    layer = next(i for i, gone in enumerate(pair.head_map.removed) if gone)
    gone = Head(layer, pair.head_map.removed[layer][0])
    with pytest.raises(RequestError, match=f"expected heads that pruning left, got {gone}, removed whole"):
        restore(pair, found, [gone], load_data(str(question_file)))


@pytest.mark.slow
def test_a_sliced_model_without_its_head_map(
    grouped_dense: Path, structured: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(structured("sliced"), tmp_path / "sliced")
    (tmp_path / "sliced" / HEAD_MAP).unlink()
    with pytest.raises(RequestError, match=r"expected head_map\.json beside .*, which has 6 heads of 8, got none"):
        load_pair(grouped_dense, tmp_path / "sliced")
    (tmp_path / "sliced" / HEAD_MAP).write_text('{"dense_heads": [[0, 9]], "removed_heads": [[]]}')
    with pytest.raises(RequestError, match="expected a head map of 3 layers with 6 of 8 heads"):
        load_pair(grouped_dense, tmp_path / "sliced")
    (tmp_path / "sliced" / HEAD_MAP).write_text('{"heads": []}')
    with pytest.raises(RequestError, match=r"expected .*head_map\.json as lcc-lens reads it, got another layout"):
        load_pair(grouped_dense, tmp_path / "sliced")


@pytest.mark.parametrize("family", ZEROED_ONLY)
def test_families_that_cannot_be_sliced_say_so_before_any_work(
    family: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        RequestError, match="expected an architecture whose configuration holds fewer heads of the same"
    ):
        run(dense(family), tmp_path / "out", sliced=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_key_value_heads": 1}, "expected to remove 90% of a layer .* got only 1 key-value groups"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "expected heads that fall into equal key-value groups"),
    ],
)
def test_heads_that_cannot_be_grouped_as_asked(changes: dict[str, int], match: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, **{**GROUPED, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(RequestError, match=match):
        run(tmp_path / "dense", tmp_path / "out", share=0.9, schedule="uniform")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_norm_over_all_heads_is_refused(tmp_path: Path) -> None:
    config = Olmo2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(RequestError, match=r"expected heads that can be removed one by one, got self_attn\.[qk]_norm"):
        run(tmp_path / "dense", tmp_path / "out")


def test_too_few_calibration_tokens_name_the_minimum(dense: Callable[[str], Path], tmp_path: Path) -> None:
    match = r"expected at least 48 calibration tokens for slimgpt, as many as model\.layers\.0\..* has inputs, got 9"
    with pytest.raises(RequestError, match=match):
        run(dense("llama"), tmp_path / "out", calibration=TOKENS[:1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "wanda", "sliced": True}, "expected slimgpt for sliced, schedule, split and choice, got wanda"),
        (
            {"method": "sparsegpt", "schedule": "log"},
            "expected slimgpt for sliced, schedule, split and choice, got spars",
        ),
        ({"method": "magnitude", "choice": "random"}, "expected slimgpt for sliced, .* got magnitude"),
        ({"sliced": True, "schedule": "log"}, "expected the schedule uniform for a sliced model, got log"),
        ({"pattern": NofM(2, 4)}, "expected a fraction for slimgpt, got the pattern 2:4"),
        ({"sliced": True, "schedule": "uniform", "split": "error"}, "expected the split spared or proportional"),
        ({"choice": "random", "split": "error"}, "expected the split spared or proportional"),
    ],
)
def test_combinations_that_no_method_has(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        PruneConfig(**{"method": "slimgpt", "pattern": Unstructured(0.2), **options})
