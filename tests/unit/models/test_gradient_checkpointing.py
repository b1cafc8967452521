"""Gradient checkpointing: the same gradients as without, from layers that really run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.passes import passes
from support.tiers import mostly_slow
from support.tiny import N_LAYERS, save_model

from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence, pad
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.models.hooked.hooks import kept_hooks
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.restoration.injections.adapters import adapters
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.objectives import Checkpointed, Objective
from lcc_lens.restoration.training.reuse import StartedLater, first_layer

EVERYTHING = Objective(1.0, 1.0, heads=1.0, text=1.0)


def disturbed(injection):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in (number for number in injection.parameters() if number.requires_grad):
            number += 0.05 * torch.randn(number.shape, generator=generator)
    return injection


def gradients(model, hooked, injection, batch, counts, objective, teacher) -> list[torch.Tensor]:
    injection.zero_grad(set_to_none=True)
    with injection.attached(hooked):
        objective.loss(model, batch, counts, injection.hooks(), teacher).backward()
    return [number.grad.clone() for number in injection.parameters() if number.requires_grad]


@pytest.mark.parametrize("objective", [Objective(), EVERYTHING])
@pytest.mark.parametrize("method", ["lcc", "lcc+gain+low-rank+norms", "lora"])
def test_gradients_are_the_same_bits(pair, found, question_file: Path, monkeypatch, method: str, objective) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:5]
    batch, counts = pad(sequences, range(5)), objective.counts(sequences)
    given = Ingredients(pair.pruned, found.components, found.select("mse", share=0.5), pair.output_projections)
    injection = disturbed(adapters(pair.pruned) if method == "lora" else MethodSpec.parse(method).build(given))
    arguments = injection, batch, counts, objective, pair.dense
    expected = gradients(pair.pruned, pair.pruned, *arguments)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    seen = passes(pair.pruned, monkeypatch)
    gradients(pair.pruned, pair.pruned, *arguments)
    assert len(seen) == N_LAYERS
    seen.clear()
    got = gradients(Checkpointed(pair.pruned), pair.pruned, *arguments)
    assert len(seen) == 2 * N_LAYERS - first_layer(injection)  # below it there is nothing to derive
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all("forward" not in block.__dict__ for block in pair.pruned.blocks)
    assert not any(point.fwd_hooks for point in pair.pruned.hook_dict.values())


def test_hooks_of_a_kept_read_and_stepwise_attention_are_recomputed(pair, found, question_file: Path) -> None:
    """Somebody looks at attention patterns, so attention is stepwise, in the second run as well."""
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:5]
    batch, counts = pad(sequences, range(5)), Objective().counts(sequences)
    injection = disturbed(LccInjection(found.components, [Head(0, 1), Head(2, 3)]))
    arguments = pair.pruned, injection, batch, counts, Objective(), None
    seen: list[int] = []
    with kept_hooks(pair.pruned, [("blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(1))]):
        expected = gradients(pair.pruned, *arguments)
        got = gradients(Checkpointed(pair.pruned), *arguments)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_layers_left_out_stay_out(pair, found, question_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:5]
    batch, counts = pad(sequences, range(5)), Objective().counts(sequences)
    injection = disturbed(LccInjection(found.components, [Head(1, 1), Head(2, 3)]))
    arguments = pair.pruned, injection, batch, counts, Objective(), None
    plain, again = StartedLater(pair.pruned, 1), StartedLater(pair.pruned, 1, checkpoint_layers=True)
    expected = gradients(plain, *arguments)
    gradients(again, *arguments)
    seen = passes(pair.pruned, monkeypatch)
    got = gradients(again, *arguments)
    assert sorted(seen) == [1, 1, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", mostly_slow(sorted(FAMILIES), "llama", "gpt2", "gemma2"))
def test_every_family_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    """Some have dropout in training mode, which must stay off."""
    model = load_hooked(save_model(FAMILIES[family](), tmp_path / family), dtype=torch.float32).model
    sequences = [TokenSequence(row, 3) for row in torch.arange(1, 25).reshape(2, 12)]
    batch, counts = pad(sequences, range(2)), Objective().counts(sequences)
    injection = disturbed(MethodSpec.parse("norms").build(Ingredients(model, None, (), ())))
    arguments = model, injection, batch, counts, Objective(), None
    expected = gradients(model, *arguments)
    got = gradients(Checkpointed(model), *arguments)
    assert any(float(gradient.abs().max()) > 0 for gradient in expected)
    size = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(got, expected, strict=True):  # some processors sum a repeated product in another order
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [False, True])
def test_training_is_the_same_bits(pair, found, question_file: Path, monkeypatch, reuse: bool) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    config = TrainConfig(batch_size=4, validate_every=3, objective=Objective(1.0, 1.0), reuse=reuse)
    results, runs = [], []
    seen = passes(pair.pruned, monkeypatch)
    for checkpointing in (False, True):
        injection = LccInjection(found.components, [Head(1, 1), Head(2, 3)])
        settings = replace(config, gradient_checkpointing=checkpointing)
        list(train(pair.pruned, injection, sequences[:24], sequences[24:32], settings, teacher=pair.dense))
        results.append(injection.constants().detach())
        runs.append(len(seen))
        seen.clear()
    assert torch.equal(*results)
    assert float(results[0].abs().max()) > 0.01
    assert runs[1] > runs[0]
