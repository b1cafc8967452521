"""Injections that change weights: zeros stay, what trains is what is saved and exported, and parts act together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES
from support.tiers import mostly_slow
from support.tiny import build_model, save_model

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.hooked.hooks import z_name
from lcc_lens.models.hooked.losses import token_kl_divergence
from lcc_lens.models.hooked.weights import changed_weights, plain_modules
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.restoration.injections.changes import Gain, LowRank, Shift
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import METHODS
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.injections.weights import check_reached
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.lr_range import range_test
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.state import learning_rates
from lcc_lens.restoration.training.validation import validation_loss, validation_terms
from lcc_lens.restoration.training_data import training_sequences

#: Joint query-key-value maps, which TransformerLens computes from copies.
WEIGHT_METHODS = ("gain", "norms", "low-rank", "masked")
TOKENS = torch.arange(12)[None]


def build(pair, found: Scan, method: str):
    heads = found.select("mse", share=0.5)
    return MethodSpec.parse(method).build(Ingredients(pair.pruned, found.components, heads, pair.output_projections))


def disturbed(injection, size: float = 0.1):
    """The injection with all its numbers moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in injection.parameters():
            number += size * torch.randn(number.shape, generator=generator)
    return injection


@pytest.mark.parametrize("change", [
    LowRank(torch.randn(2, 6), torch.randn(4, 2)), Gain(torch.randn(3), torch.tensor([0, 2, 5])),
    Shift(torch.randn(4, 6)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_keeps_zeros_and_format(change, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).masked_fill(torch.rand(4, 6) < 0.5, 0).to(dtype)
    new = change(weight)
    assert new.dtype == dtype
    assert not bool(new[weight == 0].any())
    assert bool((new != weight).any())


def test_low_rank_by_hand() -> None:
    weight, A, B = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]])
    assert LowRank(A, B)(weight).tolist() == [[2.0, 0.0], [12.0, 23.0]]


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_nothing_changes_at_first_and_all_comes_back(pair, found: Scan, method: str) -> None:
    injection = build(pair, found, method)
    before = pair.pruned(TOKENS)
    with injection.applied_to(pair.pruned) as model:
        assert torch.equal(model(TOKENS), before)
    with torch.no_grad(), disturbed(injection).applied_to(pair.pruned) as model:
        assert float((model(TOKENS) - before).abs().max()) > 1e-3
    assert torch.equal(pair.pruned(TOKENS), before)


def test_changed_weights_come_back_after_an_error(pair) -> None:
    name = pair.output_projections[0]
    weight = plain_modules(pair.pruned)[name].weight

    def fail(old):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), changed_weights(pair.pruned, {name: fail}) as model:
        model(TOKENS)
    assert plain_modules(pair.pruned)[name].weight is weight
    with (
        pytest.raises(RequestError, match="got one without; name the model"),
        changed_weights(pair.pruned, {"x": fail}),
    ):
        pass


def test_gain_scales_chosen_head_outputs(pair, found: Scan) -> None:
    heads = [Head(1, 2)]
    injection = MethodSpec.parse("gain").build(Ingredients(pair.pruned, None, heads, pair.output_projections))
    assert injection.n_trained == pair.d_head
    disturbed(injection, 0.5)
    gain = next(injection.parameters()).detach()

    def scale(z, hook):
        z = z.clone()
        z[..., 2, :] *= 1 + gain
        return z

    expected = pair.pruned.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", scale)])
    with injection.applied_to(pair.pruned) as model:
        assert torch.allclose(model(TOKENS), expected, atol=1e-5)


def test_parts_act_together(pair, found: Scan) -> None:
    injection = disturbed(build(pair, found, "lcc+gain+low-rank"), 0.02)
    assert injection.n_trained == sum(build(pair, found, name).n_trained for name in ("lcc", "gain", "low-rank"))
    assert learning_rates(injection, None) == [3e-2, 3e-2, 3e-3]
    assert learning_rates(injection, 6e-2) == [6e-2, 6e-2, 6e-3]
    results = []
    for part in (injection, *injection.parts):
        with torch.no_grad(), part.applied_to(pair.pruned) as model:
            results.append(model(TOKENS))
    assert all(float((results[0] - other).abs().max()) > 1e-4 for other in results[1:])


@pytest.mark.parametrize(
    "method", mostly_slow([*WEIGHT_METHODS, "lcc+low-rank", "offset+gain"], "norms", "lcc+low-rank")
)
def test_restore_save_export(pair, found: Scan, question_file: Path, pruned_dir: Path, tmp_path: Path, method) -> None:
    data, heads = load_data(str(question_file)), found.select("mse", share=0.5)
    config = TrainConfig(batch_size=4, validate_every=2)
    restoration = restore(pair, found, heads, data, method=method, config=config, run=tmp_path / "run")
    losses = restoration.record.losses
    assert losses["restored"] < losses["pruned"]
    again = Restoration.load(tmp_path / "run")
    with restoration.applied_to(pair.pruned) as model:
        expected = model(TOKENS)
    with again.applied_to(pair.pruned) as model:
        assert torch.equal(model(TOKENS), expected)
    report = export(again, pruned_dir, tmp_path / "out")
    assert report.logit_effect > 1e-4
    plain = load_plain(tmp_path / "out", dtype=torch.float32, attention="eager")
    assert torch.allclose(plain(TOKENS).logits, expected, atol=1e-4)
    old, new = load_file(pruned_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[name] == 0, tensor == 0) for name, tensor in old.items() if tensor.ndim > 1)


def test_weights_need_no_scan(pair, question_file: Path) -> None:
    data = load_data(str(question_file))
    assert restore(pair, None, (), data, method="low-rank").heads == ()
    with pytest.raises(RequestError, match="expected a scan of this pair for lcc, got none"):
        restore(pair, None, [Head(0, 0)], data)
    with pytest.raises(RequestError, match="expected heads to restore by gain, got none"):
        restore(pair, None, (), data, method="gain")


@pytest.mark.parametrize(("method", "message"), [
    ("magic", r"expected a method \(lcc, .*, perp-lora\), got 'magic'"), ("loraa", "did you mean 'lora'"),
    ("lcc+lcc", "expected every part once"), ("lcc+offset", "one constant per head"),
])  # fmt: skip
def test_wrong_methods_are_refused(pair, found: Scan, method: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(pair, found, method)


def test_a_rank_that_offset_has_no_use_for(pair, found: Scan) -> None:
    given = Ingredients(pair.pruned, found.components, [Head(0, 0)], pair.output_projections, rank=3)
    with pytest.raises(RequestError, match="expected no rank with the offset alone, got 3"):
        MethodSpec.parse("offset").build(given)


def test_every_weight_is_reached(pair, found: Scan) -> None:
    for method in METHODS:
        spec = MethodSpec.parse(method)
        if not spec.needs_sequences and "mlp" not in spec.scan_sites:
            build(pair, found, method)
    injection = build(pair, found, "low-rank")
    injection._names = tuple("model.embed_tokens" if "q_proj" in name else name for name in injection._names)
    injection.changes()["model.embed_tokens"].forward = lambda weight: weight  # as if a copy were computed with
    with pytest.raises(RequestError, match=r"reads model\.embed_tokens, got one that computes with a copy"):
        check_reached(pair.pruned, injection)


def test_distillation_objective(pair, found: Scan, question_file: Path) -> None:
    logits = torch.randn(5, 11)
    assert torch.allclose(token_kl_divergence(logits, logits + 3.0), torch.zeros(5), atol=1e-6)
    other = torch.randn(5, 11)
    for T in (1.0, 2.0):
        p, q = (torch.softmax(x.double() / T, -1) for x in (logits, other))
        expected = T**2 * (p * (p.log() - q.log())).sum(-1)
        assert torch.allclose(token_kl_divergence(logits, other, T).double(), expected, atol=1e-5)
    data = load_data(str(question_file))
    config = TrainConfig(batch_size=4, validate_every=2, objective=Objective.parse("distillation"))
    restoration = restore(pair, None, (), data, method="masked", config=config)
    _, held_out = training_sequences(pair, None, data, None, 512, None, None)
    kl = [validation_loss(pair.dense, None, held_out, 1024, config.objective, pair.dense)]
    kl.append(validation_loss(pair.pruned, None, held_out, 1024, config.objective, pair.dense))
    with restoration.applied_to(pair.pruned) as model:
        kl.append(validation_loss(model, None, held_out, 1024, config.objective, pair.dense))
    assert abs(kl[0]) < 1e-6
    assert kl[2] < 0.97 * kl[1]


def test_objectives_count_what_they_compare(pair, question_file: Path) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    everything = [replace(one, loss_from=1) for one in sequences]
    n_response, n_all = (sum(len(s) - s.loss_from for s in group) for group in (sequences, everything))
    mixed = Objective.parse("response+3*distillation")
    assert (mixed.response, mixed.distillation, mixed.heads) == (0.25, 0.75, 0.0)
    assert mixed.counts(sequences) == {"response": n_response, "distillation": n_all}
    narrow = Objective(0.0, 1.0, prompts=False)
    whole = validation_loss(pair.pruned, None, sequences, 1024, Objective(0.0, 1.0), pair.dense)
    assert whole == pytest.approx(validation_loss(pair.pruned, None, everything, 1024, narrow, pair.dense))
    assert whole != pytest.approx(validation_loss(pair.pruned, None, sequences, 1024, narrow, pair.dense))
    terms = validation_terms(pair.pruned, None, sequences, 1024, Objective(1.0, 1.0, heads=1.0), pair.dense)
    assert terms["response"] == pytest.approx(validation_loss(pair.pruned, None, sequences))
    assert terms["distillation"] == pytest.approx(whole)
    both = validation_terms(
        pair.pruned, None, sequences, 1024, Objective(1.0, 1.0, prompts=False, text=1.0), pair.dense
    )
    assert both["lm"] == pytest.approx(validation_loss(pair.pruned, None, everything))
    assert both["response"] == pytest.approx(terms["response"])
    expected = validation_loss(pair.pruned, None, sequences, 1024, narrow, pair.dense)
    assert both["distillation"] == pytest.approx(expected)


@pytest.mark.slow
def test_head_outputs_as_an_objective(pair, question_file: Path) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    heads = Objective(0.0, 0.0, heads=1.0)
    assert validation_loss(pair.dense, None, sequences, 1024, heads, pair.dense) == 0.0
    ratios = []
    for one in sequences:
        tokens, n_layers = one.tokens[None, :-1], pair.dense.cfg.n_layers
        caches = [
            model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))[1]
            for model in (pair.dense, pair.pruned)
        ]
        z = [torch.stack([cache[z_name(i)][0].flatten(1) for i in range(n_layers)]).double() for cache in caches]
        ratios.append(((z[1] - z[0]).square().sum(-1) / z[0].square().sum(-1)).mean(0))
    measured = validation_loss(pair.pruned, None, sequences, 1024, heads, pair.dense)
    assert measured == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-4)
    config = TrainConfig(batch_size=4, validate_every=2, objective=Objective.parse("heads"))
    injection = MethodSpec.parse("masked").build(Ingredients(pair.pruned, None, (), pair.output_projections))
    steps = train(pair.pruned, injection, sequences, sequences, config, teacher=pair.dense)
    losses = [step.validation_loss for step in steps]
    assert losses[-1] is not None
    assert losses[-1] < 0.98 * measured


@pytest.mark.parametrize("text", ["both", "response+response", "x*heads", "-1*heads", "0*heads", "inf*response", ""])
def test_wrong_objectives_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected an objective"):
        Objective.parse(text)


@pytest.mark.parametrize("numbers", [(0.0, 0.0, 1.0), (-1.0, 2.0, 1.0), (1.0, 1.0, 0.0), (1.0, float("nan"), 1.0)])
def test_objectives_without_sense_are_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(RequestError, match="expected"):
        Objective(*numbers)


def test_patience_ends_a_run_without_progress(pair, question_file: Path) -> None:
    data, steps = load_data(str(question_file)), []
    config = TrainConfig(batch_size=1, epochs=3, lr=1e-12, validate_every=1, patience=2)
    restore(pair, None, (), data, method="norms", config=config, on_step=steps.append)
    assert len(steps) == 2
    assert steps[-1].n_steps > 2


@pytest.mark.slow
def test_learning_rate_by_range_test(pair, question_file: Path, tmp_path: Path) -> None:
    data = load_data(str(question_file))
    config = TrainConfig(batch_size=2, epochs=2, validate_every=1)
    restoration = restore(pair, None, (), data, method="masked", config=config, tune_lr=True, run=tmp_path)
    tried = {float(rate): loss for rate, loss in restoration.record.settings["lr_range"].items()}
    assert sorted(tried) == pytest.approx([1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    assert restoration.record.settings["lr"] == min(tried, key=tried.__getitem__)
    again = restore(
        pair, None, (), data, method="masked", config=config, tune_lr=True, run=tmp_path, resume=True
    )  # the same choice, so the checkpoint fits
    assert torch.equal(again._tensors()["heads"], restoration._tensors()["heads"])
    assert again.record.settings == restoration.record.settings


def test_range_test_leaves_the_injection_and_counts_divergence(
    pair, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.restoration.training.config.check_numbers", lambda config: None)  # for a rate of 1e36
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    injection = MethodSpec.parse("masked").build(Ingredients(pair.pruned, None, (), pair.output_projections))
    before = {name: value.clone() for name, value in injection.state_dict().items()}
    config = TrainConfig(batch_size=2)
    found = range_test(pair.pruned, injection, sequences, sequences, config, factors=(1.0, 1e40), n_steps=3)
    assert found.n_steps == 3
    assert found.losses[0] < found.losses[1] == math.inf
    assert found.best == pytest.approx(1e-4)
    assert found.is_at_edge
    assert all(torch.equal(value, before[name]) for name, value in injection.state_dict().items())


@pytest.mark.parametrize("method", ["low-rank", "norms"])
@pytest.mark.parametrize(
    "family", mostly_slow(["gpt2", "gpt_neox", "gemma2", "mistral", "phi", "opt"], "gpt2", "gemma2")
)
def test_families_fold(family: str, method: str, tmp_path: Path) -> None:
    """An export compares itself with the hooked model, whose bridge computes joint layers from copies."""
    path = save_model(FAMILIES[family](), tmp_path / "model")
    loaded = load_hooked(path, dtype=torch.float32)
    given = Ingredients(loaded.model, None, (), loaded.output_projections)
    injection = MethodSpec.parse(method).build(given)
    record = RestorationRecord("d", str(path), "", loaded.identity.sha256, method, "none", 0, 0)
    report = export(Restoration.of(disturbed(injection), record), path, tmp_path / "out")
    assert report.logit_effect > 1e-3
    assert report.logit_difference < 1e-4
    assert set(report.changed) == {f"{name}.weight" for part in injection.parts for name in part.changes()}


@pytest.mark.parametrize("method", ["low-rank", "norms", "gain"])
def test_another_model_is_refused(pair, found: Scan, tmp_path: Path, method: str) -> None:
    restoration = Restoration.of(build(pair, found, method), RestorationRecord("d", "p", "", "", method, "none", 0, 0))
    shape = {"hidden_size": 20, "num_attention_heads": 5, "head_dim": 4, "intermediate_size": 24}
    other = load_hooked(save_model(build_model(**shape), tmp_path / "other"), dtype=torch.float32).model
    message = r"expected a model with the weight .* got one of shape .*; name the model"
    with pytest.raises(RequestError, match=message), restoration.applied_to(other):
        pass


def test_parts_that_do_not_train_have_no_rate(pair, found: Scan, question_file: Path) -> None:
    injection = build(pair, found, "mean-shift+low-rank")
    assert learning_rates(injection, 1e-3) == [1e-3]
    assert learning_rates(build(pair, found, "mean-shift"), 1e-3) == []
    steps: list = []
    config = TrainConfig(batch_size=4, lr=1e-3)
    restore(
        pair, found, found.select("mse", share=0.5), load_data(str(question_file)), method="mean-shift+low-rank",
        config=config, on_step=steps.append,
    )  # fmt: skip
    assert steps[0].lr == 1e-3
