"""Reused passes: equal to whole ones, and the lower layers really do not run."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.passes import passes
from support.tiers import mostly_slow
from support.tiny import save_model

from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.reuse import (
    CachedTeacher,
    StartedLater,
    StateCache,
    _can_unembed,
    can_start_at_layers,
    first_layer,
    reused,
)
from lcc_lens.restoration.training.validation import validation_loss


@torch.no_grad()
@pytest.mark.parametrize("family", mostly_slow(sorted(FAMILIES), "llama", "gpt2", "gemma3", "phi"))
def test_every_family_starts_later_or_runs_as_a_whole(family: str, tmp_path: Path) -> None:
    model = load_hooked(save_model(FAMILIES[family](), tmp_path / family), dtype=torch.float32).model
    tokens = torch.arange(1, 25).reshape(2, 12)

    sequences = [TokenSequence(row, 3) for row in tokens]
    sequences.append(TokenSequence(torch.arange(40, 47), 2))
    batch = next(iter(batches(sequences, max_tokens=999)))
    whole, started = Objective(1.0, 1.0), StartedLater(model, 1)
    expected = whole.terms(model, batch, (), model)
    for _ in range(2):  # computed, then taken from what was kept
        terms = whole.terms(started, batch, (), CachedTeacher(model))
        assert torch.allclose(terms["response"], expected["response"], rtol=1e-5)
        assert abs(float(terms["distillation"])) < 1e-4
    assert can_start_at_layers(model)
    if family in ("llama", "gpt2"):
        assert _can_unembed(model)


def test_lower_layers_run_once_per_sequence(pair, found, question_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    injection = LccInjection(found.components, [Head(2, 1), Head(1, 3)])
    assert first_layer(injection) == 1
    source = reused(pair.pruned, injection)
    assert isinstance(source, StartedLater)
    with torch.no_grad():
        injection.offset += torch.randn(injection.offset.shape)
    whole = validation_loss(pair.pruned, injection, sequences)
    assert whole != pytest.approx(validation_loss(pair.pruned, None, sequences), rel=1e-3)
    assert validation_loss(source, injection, sequences) == pytest.approx(whole, rel=1e-5)
    seen = passes(pair.pruned, monkeypatch)
    assert validation_loss(source, injection, sequences) == pytest.approx(whole, rel=1e-5)
    assert set(seen) == {1, 2}
    low_rank = MethodSpec.parse("low-rank").build(Ingredients(pair.pruned, None, (), pair.output_projections))
    assert first_layer(low_rank) == 0
    assert reused(pair.pruned, low_rank) is pair.pruned


def test_training_with_reuse_equals_training_without(pair, found, question_file: Path) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:16]
    config = TrainConfig(batch_size=4, epochs=2, validate_every=3, objective=Objective(1.0, 1.0))
    results = []
    for reuse in (False, True):
        injection = LccInjection(found.components, [Head(2, 1), Head(1, 3)])
        steps = list(
            train(
                pair.pruned, injection, sequences, sequences, replace(config, reuse=reuse), teacher=pair.dense
            )
        )  # fmt: skip
        results.append((steps, injection.constants().detach()))
    (plain, constants), (reused_steps, same) = results
    assert [step.loss for step in reused_steps] == pytest.approx([step.loss for step in plain], rel=1e-4)
    assert constants.abs().max() > 0.01
    assert torch.allclose(same, constants, atol=1e-3 * float(constants.abs().max()))


def test_what_does_not_fit_goes_to_disk_or_is_computed_again(pair, question_file: Path, tmp_path, monkeypatch) -> None:
    """Memory, disk and computing again give the same bits, and nothing stays on disk."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:16]
    distillation = Objective(0.0, 1.0)
    expected = validation_loss(pair.pruned, None, sequences, 1024, distillation, pair.dense)
    whole = (
        int(pair.dense.cfg.d_model) * 4 * sum(len(tokens) for tokens in {tuple(s.tokens.tolist()) for s in sequences})
    )
    results = set()
    for memory, disk in ((whole, 0), (0, whole), (whole // 3, whole // 3), (0, None), (0, 0)):
        kept = StateCache(max_bytes=memory, max_disk_bytes=disk)
        teacher = CachedTeacher(pair.dense, kept)
        for _ in range(2):
            results.add(validation_loss(pair.pruned, None, sequences, 1024, distillation, teacher))
        assert kept.n_bytes <= memory
        assert (kept.n_bytes + kept.n_disk_bytes == whole) == (whole in (memory, disk) or disk is None)
        assert (kept.n_disk_bytes > 0) == (disk != 0)
        assert list(tmp_path.iterdir()) == []
    assert len(results) == 1
    assert results.pop() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_read_from_disk_bit_for_bit(dtype: torch.dtype) -> None:
    batch = next(iter(batches([TokenSequence(torch.arange(5), 1), TokenSequence(torch.arange(9), 1)], max_tokens=99)))
    computed: list[int] = []

    def compute(tokens):
        computed.append(tokens.shape[1])
        return torch.randn(1, tokens.shape[1], 7, generator=torch.Generator().manual_seed(len(computed))).to(dtype)

    kept = StateCache(max_bytes=0)
    with torch.inference_mode():
        first = kept.get(batch, torch.device("cpu"), compute)
    again = kept.get(batch, torch.device("cpu"), compute)
    assert torch.equal(again, first)
    assert again.dtype == dtype
    assert computed == [9, 5]
    assert not bool(again[1, 5:].any())
    assert not again.is_inference()
    (again * torch.ones(7, dtype=dtype, requires_grad=True)).sum().backward()  # it may enter a backward pass


def test_full_disk_is_no_failure(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def full(tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lcc_lens.restoration.training.reuse._mapped", full)
    batch = next(iter(batches([TokenSequence(torch.arange(5), 1)], max_tokens=99)))
    kept = StateCache(max_bytes=0)
    for _ in range(2):
        assert torch.equal(
            kept.get(batch, torch.device("cpu"), lambda t: t[..., None].float())[0, :, 0], batch.tokens[0]
        )
    assert kept.n_disk_bytes == 0
    assert caplog.text.count("no more activations are cached on disk (No space left on device)") == 1


@pytest.mark.slow
def test_resumed_training_with_reuse_gives_the_same_bits(pair, found, question_file: Path, tmp_path: Path) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    config = TrainConfig(batch_size=4, epochs=2, validate_every=3, checkpoint_every=1, reuse=True)
    results = []
    for stop in (None, 15):  # in the second epoch, in which the sequences come in other batches
        injection = LccInjection(found.components, [Head(2, 1), Head(1, 3)])
        run = tmp_path / str(stop)
        running = train(pair.pruned, injection, sequences, sequences[:6], config, run=run)
        for step in running:
            if step.step == stop:
                break
        running.close()
        if stop is not None:
            injection = LccInjection(found.components, [Head(2, 1), Head(1, 3)])
            done = list(train(pair.pruned, injection, sequences, sequences[:6], config, run=run, resume=True))
            assert done[0].step == stop
        results.append(injection.constants().detach())
    assert torch.equal(*results)
    assert float(results[0].abs().max()) > 0.01
