"""Batches hold every sequence once, and have few shapes, however many sequences there are and however long they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcc_lens.analysis.scan.passes import ScanPlan
from lcc_lens.analysis.scan.scan import scan
from lcc_lens.data.batches import Batch, TokenSequence, batches, rounded_length
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.models.hooked import activations
from lcc_lens.models.hooked.activations import sampled_positions
from lcc_lens.restoration.injections.adapters import adapters
from lcc_lens.restoration.training import objectives
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train

LONGEST = 100
#: All shapes of batches of up to 1,024 tokens in rows of up to LONGEST.
SHAPES = {
    (1 << power, length)
    for power in range(6)
    for length in {min(rounded_length(n), LONGEST) for n in range(1, LONGEST + 1)}
    if (1 << power) * length <= 1024
}


def sequences(lengths: list[int]) -> list[TokenSequence]:
    return [TokenSequence(torch.arange(1, n + 1), max(1, n // 2)) for n in lengths]


@given(
    st.lists(st.integers(1, LONGEST), max_size=60), st.sampled_from([7, 70, 1024]), st.sampled_from([1, 5, 32]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_sequence_is_in_one_batch_that_is_not_too_large(
    lengths: list[int], max_tokens: int, max_batch: int, has_longest: bool
) -> None:
    given_sequences = sequences(lengths)
    grouped = batches(
        given_sequences, max_tokens=max_tokens, max_batch=max_batch, longest=LONGEST if has_longest else None
    )  # fmt: skip
    assert sorted(i for batch in grouped for i in batch.index) == [*range(len(lengths))]
    most = LONGEST if has_longest else max(lengths, default=0)
    for batch in grouped:
        n, width = batch.tokens.shape
        assert n <= max_batch
        assert n == 1 or n * width <= max_tokens
        assert batch.lengths.tolist() == [lengths[i] for i in batch.index]
        assert batch.lengths.max() <= width <= min(most, 9 / 8 * int(batch.lengths.max()))
        for row, i in zip(batch.tokens, batch.index, strict=True):
            assert torch.equal(row[: lengths[i]], given_sequences[i].tokens)
            assert not row[lengths[i] :].any()


@given(st.lists(st.lists(st.integers(1, LONGEST), min_size=1, max_size=80), max_size=5))
@settings(max_examples=60, deadline=None)
def test_shapes_are_those_of_a_fixed_set_however_many_lists_there_are(lists: list[list[int]]) -> None:
    found = {tuple(b.tokens.shape) for lengths in lists for b in batches(sequences(lengths), longest=LONGEST)}
    assert found <= SHAPES
    assert len({n * width for n, width in SHAPES}) < 70  # rows of the matrices that linear layers multiply


@given(st.integers(1, 10**6))
def test_lengths_are_rounded_up_by_at_most_an_eighth_and_stay(n: int) -> None:
    assert n <= rounded_length(n) <= 9 / 8 * n
    assert rounded_length(rounded_length(n)) == rounded_length(n)
    assert rounded_length(2 * n) <= 2 * rounded_length(n)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """The shapes of tokens that models read under hooks."""
    seen: set[tuple[int, ...]] = set()
    run = activations.run_without_logits

    def note(model: Any, tokens: Any, *rest: Any, **options: Any) -> None:
        seen.add(tuple(tokens.shape))
        run(model, tokens, *rest, **options)

    monkeypatch.setattr(activations, "run_without_logits", note)
    return seen


def made_up(n: int) -> Data:
    """Questions of all lengths, of at most ``LONGEST`` tokens with their answers."""
    drawn = torch.randint(1, LONGEST - 43, (n, 3), generator=torch.Generator().manual_seed(0)).tolist()
    drawn[0] = [LONGEST - 43, 40, 40]
    examples = (
        Example(f"{i:03}" + "q" * a, "r" * min(b, 40), str(i), "w" * min(c, 40)) for i, (a, b, c) in enumerate(drawn)
    )
    return Data("made up", "contrastive", tuple(examples), "this file")


@pytest.mark.parametrize("positions", ["all", "last", "response"])
def test_the_shapes_of_a_scan_do_not_depend_on_how_many_examples_there_are(
    pair, shapes: set[tuple[int, ...]], positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.analysis.scan.passes.SHARD", 16)  # each shard makes batches of its own
    data = made_up(70)
    scan(pair, data, positions=positions, selectors=["probe"], display=0)
    assert len(shapes) > 5
    assert shapes <= SHAPES


def test_a_shard_reads_no_more_positions_than_a_batch_has() -> None:
    right = tuple(sequences([*range(2, 62)]))
    for positions, most in (("response", 64), ("last", 64), ((0, 1, 2), 64), ("response", 1)):
        shards = ScanPlan(right, None, positions, ("z",), most).shards()
        assert sorted(i for shard in shards for i in shard) == [*range(60)]
        read = [sum(len(sampled_positions(right[i], positions)) for i in shard) for shard in shards]
        assert all(n <= most or len(shard) == 1 for n, shard in zip(read, shards, strict=True))
        assert len(shards) <= 2 * sum(read) / most + 1


def test_the_shapes_of_a_training_are_few(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    run = objectives.run_model

    def note(model: Any, batch: Batch, *rest: Any, **options: Any) -> Any:
        seen.add(tuple(batch.tokens.shape))
        return run(model, batch, *rest, **options)

    monkeypatch.setattr(objectives, "run_model", note)
    lengths = torch.randint(2, LONGEST + 1, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    training = sequences([*lengths, LONGEST])
    config = TrainConfig(batch_size=4, reuse=False, validate_every=100)
    for _ in train(pair.pruned, adapters(pair.pruned, rank=1), training, training[:3], config):
        pass
    assert len(seen) > 5
    assert seen <= SHAPES
