"""Baselines: peft's adapters train under hooks and leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.conformance import save_family
from support.tiers import mostly_slow
from support.tiny import build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.baselines.eora import eora
from lcc_lens.evaluation.baselines.flap import flap
from lcc_lens.evaluation.baselines.lofit import lofit_heads
from lcc_lens.evaluation.comparison.costs import merging_costs
from lcc_lens.models.architecture.layers import is_linear, is_transposed, linear_weight
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.hooked.weights import plain_modules
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.injections.adapters import adapters
from lcc_lens.restoration.injections.base import Composite
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.injections.weights import IN_LAYER
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.validation import validation_loss

TOKENS = torch.arange(12)[None]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_train_and_go(pair, question_file: Path, kind: str) -> None:
    before, names = pair.pruned(TOKENS), [name for name, _ in pair.pruned.named_parameters()]
    injection = adapters(pair.pruned, kind=kind, rank=2)
    assert torch.equal(pair.pruned(TOKENS), before)
    with injection.applied_to(pair.pruned) as model:
        assert torch.allclose(model(TOKENS), before, atol=1e-5)
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    config = TrainConfig(batch_size=4, validate_every=2)
    for _ in train(pair.pruned, injection, sequences, sequences, config):
        assert torch.equal(pair.pruned(TOKENS), before)
    losses = [validation_loss(pair.pruned, part, sequences) for part in (None, injection)]
    assert losses[1] < losses[0]
    assert [name for name, _ in pair.pruned.named_parameters()] == names


def test_lora_counts_its_own_numbers_only(pair) -> None:
    injection = adapters(pair.pruned, rank=2, targets=("o_proj",))
    d_model, width = int(pair.pruned.cfg.d_model), pair.n_heads * pair.d_head
    assert injection.n_trained == pair.n_layers * 2 * (d_model + width)


def test_lora_is_peft_s_own(pair) -> None:
    """What trains equals W x + (alpha / r) B A x of the plain map."""
    injection = adapters(pair.pruned, rank=2, targets=("o_proj",))
    layer = injection.members[0]
    x = torch.randn(3, layer.base_layer.in_features)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B += torch.randn(B.shape)
        assert torch.allclose(layer(x), layer.base_layer(x) + 2 * x @ A.T @ B.T, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("family", mostly_slow(["gpt2", "gpt_neox", "phi3", "bloom"], "gpt2"))
def test_lora_beside_joint_layers_computes_what_merging_gives(family: str, targets: str, tmp_path: Path) -> None:
    path = save_family(family, tmp_path / "model")
    model = load_hooked(path, dtype=torch.float32).model
    injection = adapters(model, rank=2, targets=targets)
    with torch.no_grad():
        for layer in injection.members:
            layer.lora_B["default"].weight.normal_(std=0.1)
        before, plain = model(TOKENS), load_plain(path, dtype=torch.float32)
        with injection.applied_to(model):
            hooked = model(TOKENS)
        for name, change in injection.merged_weights().items():
            at = plain.get_submodule(name)
            merged = change(linear_weight(at))
            at.weight.copy_(merged.T if is_transposed(at) else merged)
        assert float((hooked - before).abs().max()) > 1e-2
        assert torch.allclose(hooked, plain(TOKENS).logits, atol=1e-3)
        assert torch.equal(model(TOKENS), before)
    n_linear = sum(is_linear(m) and IN_LAYER.search(n) is not None for n, m in plain.named_modules())
    assert len(injection.members) == (n_linear if targets == "all" else 2 * model.cfg.n_layers)


def test_dora_beside_a_joint_layer_is_refused(families) -> None:
    with pytest.raises(RequestError, match="expected no joint layers for DoRA or dropout, got transformer"):
        adapters(families("gpt2").pruned, kind="dora", rank=2)


def test_targets_that_are_not_there(pair) -> None:
    with pytest.raises(RequestError, match="expected linear layers named nothing, got none"):
        adapters(pair.pruned, targets=("nothing",))


def test_dora_refuses_rows_of_zeros(pair) -> None:
    weight = plain_modules(pair.pruned)["model.layers.1.self_attn.v_proj"].weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[:2] = 0
        with pytest.raises(RequestError, match=r"no row of zeros for DoRA, got 2 in .*v_proj; restore by LoRA"):
            adapters(pair.pruned, kind="dora", rank=2)
        assert adapters(pair.pruned, kind="dora", rank=2, targets=("o_proj",)).n_trained
        with adapters(pair.pruned, rank=2).applied_to(pair.pruned) as model:
            assert bool(model(TOKENS).isfinite().all())
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_fill_the_zeros(pair, kind: str) -> None:
    injection = adapters(pair.pruned, kind=kind, rank=2, targets=("o_proj",))
    assert merging_costs(injection, pair, pair.pruned) == {"n_added": injection.n_trained, "zeros_kept": 1.0}
    layer, name = injection.members[0], "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    weight = plain_modules(pair.pruned)[name].weight
    before = weight.detach().clone()
    merged = injection.merged_weights()[name](weight)
    x = torch.randn(3, weight.shape[1])
    assert torch.allclose(x @ merged.T, layer(x), atol=1e-4)
    assert torch.equal(weight, before)
    modules = [m for n, m in plain_modules(pair.pruned).items() if n.endswith("_proj")]
    zeros = sum(int((module.weight == 0).sum()) for module in modules)
    expected = 1 - int(((weight == 0) & (merged != 0)).sum()) / zeros
    assert expected < 1
    assert merging_costs(injection, pair, pair.pruned)["zeros_kept"] == pytest.approx(expected)


def test_what_acts_under_the_zero_pattern_costs_biases_at_most(pair, found) -> None:
    given = Ingredients(pair.pruned, found.components, [Head(0, 1)], pair.output_projections, low_rank=2)
    low_rank = MethodSpec.parse("low-rank").build(given)
    with torch.no_grad():
        for number in low_rank.parameters():
            number.normal_()
    assert merging_costs(low_rank, pair, pair.pruned) == {"n_added": 0, "zeros_kept": 1.0}
    # the switch that adds an output bias to a llama layer brings those of q, k and v along
    d_model, width, d_kv = int(pair.pruned.cfg.d_model), pair.n_heads * pair.d_head, pair.d_head
    both = merging_costs(Composite([low_rank, MethodSpec.parse("lcc").build(given)]), pair, pair.pruned)
    assert both == {"n_added": pair.n_layers * (d_model + width + 2 * d_kv), "zeros_kept": 1.0}


@pytest.mark.slow
def test_lofit_finds_the_head_that_was_weakened(question_file: Path, tmp_path: Path) -> None:
    dense_dir, weak_dir = save_model(build_model(), tmp_path / "dense"), tmp_path / "weak"
    weak = build_model()
    d_head = weak.config.head_dim
    with torch.no_grad():
        weak.model.layers[1].self_attn.o_proj.weight[:, 2 * d_head : 3 * d_head] *= 0.2
    pair = load_pair(dense_dir, save_model(weak, weak_dir))
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    heads = [Head(layer, head) for layer in range(pair.n_layers) for head in range(pair.n_heads)]
    distillation = Objective.parse("distillation")
    config = TrainConfig(batch_size=4, validate_every=4, lr=3e-2, objective=distillation)
    given = pair.output_projections, heads, sequences, sequences, config
    assert lofit_heads(pair.pruned, *given, fraction=0.05, teacher=pair.dense) == [Head(1, 2)]
    assert len(lofit_heads(pair.pruned, *given, fraction=0.2, teacher=pair.dense)) == 3
    with pytest.raises(RequestError, match="expected gains that lower the held-out loss"):
        lofit_heads(pair.dense, *given, teacher=pair.dense)
    with pytest.raises(RequestError, match="expected a fraction of heads above 0"):
        lofit_heads(pair.pruned, *given, fraction=0.0)


def test_eora_is_the_best_low_rank_on_the_inputs(pair, question_file: Path) -> None:
    """Nothing of its rank gives outputs nearer to the dense map's; at full rank it gives them exactly."""
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    before = pair.pruned(TOKENS)
    injection = eora(pair.pruned, pair.dense, sequences, rank=2)
    assert torch.equal(pair.pruned(TOKENS), before)
    name = "model.layers.0.self_attn.q_proj"
    module, seen = plain_modules(pair.pruned)[name], []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for one in sequences:
        pair.pruned(one.tokens[None])
    handle.remove()
    x = torch.cat([inputs.flatten(0, 1) for inputs in seen]).double()
    weight, wanted = (plain_modules(model)[name].weight.detach() for model in (pair.pruned, pair.dense))
    lost = (wanted - weight).double()
    merged = injection.merged_weights()[name](weight).double()
    error = float((x @ (wanted.double() - merged).T).square().sum())
    # the optimum: what the outputs' own singular values beyond the rank leave (Eckart and Young)
    expected = float(torch.linalg.svdvals(x @ lost.T)[2:].square().sum())
    assert error == pytest.approx(expected, rel=1e-3)
    tokens, full = sequences[0].tokens[None], eora(pair.pruned, pair.dense, sequences, rank=44)
    with injection.applied_to(pair.pruned) as model:
        assert not torch.allclose(model(tokens), pair.dense(tokens), atol=0.1)
    with full.applied_to(pair.pruned) as model:
        assert torch.allclose(model(tokens), pair.dense(tokens), atol=1e-4)
    costs = merging_costs(injection, pair, pair.pruned)
    modules = [m for n, m in plain_modules(pair.pruned).items() if n.endswith("_proj")]
    assert costs["n_added"] == sum(2 * sum(m.weight.shape) for m in modules)
    assert costs["zeros_kept"] < 0.1
    assert injection.n_trained == 0
    with pytest.raises(RequestError, match="expected a rank of at least 1"):
        eora(pair.pruned, pair.dense, sequences, rank=0)


def test_flap_gives_back_the_mean_of_what_was_removed(pair, question_file: Path) -> None:
    """Behind the dense model's inputs, the mean output of every output and down projection is the dense one's."""
    sequences = encode(load_data(str(question_file), n=9), pair.tokenizer)
    before, injection = pair.pruned(TOKENS), flap(pair, sequences)
    dense, pruned = plain_modules(pair.dense), plain_modules(pair.pruned)
    for site, end in (("z", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        for layer in range(pair.n_layers):
            name, seen = f"model.layers.{layer}.{end}", []
            handle = dense[name].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].double()))
            for one in sequences:
                pair.dense(one.tokens[None])
            handle.remove()
            mean = torch.cat(seen).mean(0)
            weight, bias = pruned[name].weight.detach(), injection.biases(site)[layer]
            removed = torch.where(weight == 0, dense[name].weight.detach(), 0.0).double()
            assert torch.allclose(bias.double(), removed @ mean, atol=1e-4)
            assert float(bias.abs().max()) > 0.01
    biases = {
        name: injection.biases(site)[layer]
        for site in ("z", "mlp") for layer, name in enumerate(projection_names(pair.pruned, site))
    }  # fmt: skip
    handles = [
        pruned[name].register_forward_hook(lambda module, args, output, bias=bias: output + bias)
        for name, bias in biases.items()
    ]
    expected = pair.pruned(TOKENS)
    for handle in handles:
        handle.remove()
    with injection.applied_to(pair.pruned) as model:
        assert torch.allclose(model(TOKENS), expected, atol=1e-4)
        with fused_attention(model):  # the model's own kernels, unless an earlier test made it stepwise
            assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    assert torch.equal(pair.pruned(TOKENS), before)
    assert float((expected - before).abs().max()) > 0.01
    assert injection.n_trained == 0
    costs = merging_costs(injection, pair, pair.pruned)
    d_model, width, d_kv, d_mlp = int(pair.pruned.cfg.d_model), pair.n_heads * pair.d_head, pair.d_head, 44
    added = pair.n_layers * (d_model + width + 2 * d_kv + d_model + 2 * d_mlp)  # with the zeros that come along
    assert costs == {"n_added": added, "zeros_kept": 1.0}
    with pytest.raises(RequestError, match="expected sequences to take means on, got none"):
        flap(pair, [])


def test_flap_is_not_kept_as_an_empty_restoration(pair, question_file: Path) -> None:
    injection = flap(pair, encode(load_data(str(question_file), n=4), pair.tokenizer))
    record = RestorationRecord("d", "p", "", "", "flap", "none", 0, 0)
    with pytest.raises(RequestError, match="got biases of linear layers; compare it instead"):
        Restoration.of(injection, record)


def test_flap_of_a_sliced_model_is_refused(question_file: Path, text_file: Path, tmp_path: Path) -> None:
    dense = save_model(build_model(num_key_value_heads=5), tmp_path / "dense")
    prune(dense, tmp_path / "sliced", method="slimgpt", sparsity=0.5, sliced=True, calibration=str(text_file),
          n_samples=4, seq_len=32)  # fmt: skip
    pair = load_pair(dense, tmp_path / "sliced")
    with pytest.raises(RequestError, match="expected models whose layers have the same shapes, got a sliced one"):
        flap(pair, encode(load_data(str(question_file), n=4), pair.tokenizer))


def test_what_stays_beside_the_weights_is_no_restoration(pair, question_file: Path) -> None:
    record = RestorationRecord("d", "p", "", "", "lora", "none", 0, 0)
    sequences = encode(load_data(str(question_file), n=4), pair.tokenizer)
    for injection in (adapters(pair.pruned, rank=2), eora(pair.pruned, pair.dense, sequences, rank=2)):
        assert not injection.footprint.folds
        with pytest.raises(RequestError, match="expected an injection that folds into the checkpoint"):
            Restoration.of(injection, record)
