"""Baselines: peft's adapters train under hooks and leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcc_lens.baselines import adapters
from lcc_lens.data import encode, load_data
from lcc_lens.errors import RequestError
from lcc_lens.training import TrainConfig, train, validation_loss

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


def test_targets_that_are_not_there(pair) -> None:
    with pytest.raises(RequestError, match="wanted linear maps named nothing, got none"):
        adapters(pair.pruned, targets=("nothing",))
