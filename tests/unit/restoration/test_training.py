"""Injections and their training: what stays fixed, what moves, and that a stopped run loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.tiers import mostly_slow
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, build_model, save_model

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import InterruptedRun, RequestError
from lcc_lens.core.heads import Head, head_indices
from lcc_lens.data.batches import batches, pad
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.models.hooked.hooks import z_readers
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.pair import load_pair
from lcc_lens.restoration.injections.constants import LccInjection, OffsetInjection, constants_by_layer
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.state import epoch_batches
from lcc_lens.restoration.training.validation import response_nll, validation_loss

FAST = TrainConfig(lr=0.1, batch_size=4, validate_every=2, checkpoint_every=2, seed=1)


@pytest.fixture(scope="module")
def sequences(pair, question_file: Path):
    return encode(load_data(str(question_file)), pair.tokenizer)


def z_of(model, tokens: torch.Tensor) -> torch.Tensor:
    layers: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=z_readers(range(N_LAYERS), lambda layer, z: layers.update({layer: z})))
    return torch.stack([layers[i] for i in range(N_LAYERS)])


def finished(injection: LccInjection, found: Scan) -> Restoration:
    from lcc_lens.restoration.record import RestorationRecord

    return Restoration.of(injection, RestorationRecord("d", "p", "", "", "lcc", "none", 0, 0))


def test_zero_injection_is_the_identity(pair, found: Scan) -> None:
    tokens = torch.arange(1, 30)[None]
    injection = LccInjection(found.components, found.select("mse", share=1.0))
    with torch.no_grad():
        before = pair.pruned(tokens)
        assert torch.equal(pair.pruned.run_with_hooks(tokens, fwd_hooks=injection.hooks()), before)
        injection.offset += 1.0
        assert float((pair.pruned.run_with_hooks(tokens, fwd_hooks=injection.hooks()) - before).abs().max()) > 0.1


def test_mean_start_is_the_lost_component(found: Scan) -> None:
    heads = found.select("mse", share=0.5)
    injection = LccInjection(found.components, heads, start="mean")
    expected = torch.stack([found.mean_difference[h] for h in heads])
    assert torch.allclose(injection.constants(), expected, atol=1e-5)
    assert float(expected.abs().max()) > 0.01


def test_injection_reaches_exactly_its_head(pair, found: Scan) -> None:
    """Layer and head cannot be swapped: L1H2 moves, L2H1 does not (but through what L1H2 feeds)."""
    tokens = torch.arange(1, 30)[None]
    injection = LccInjection(found.components, [Head(1, 2)])
    with torch.no_grad():
        injection.offset += 1.0
    before = z_of(pair.pruned, tokens)
    with finished(injection, found).applied_to(pair.pruned) as restored:
        seen: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            restored.run_with_hooks(tokens, fwd_hooks=z_readers([0, 1], lambda layer, z: seen.update({layer: z})))
    moved = (seen[1] - before[1]).abs().amax((0, 1, 3)) > 1e-6
    assert torch.equal(seen[0], before[0])
    assert moved.tolist() == [False, False, True, False, False]
    assert torch.equal(z_of(pair.pruned, tokens), before)


@pytest.mark.parametrize("head", [Head(4, 2), Head(3, 0), Head(0, 5), Head(-1, 0)])
def test_head_outside_the_model_is_refused(found: Scan, head: Head) -> None:
    with pytest.raises(RequestError, match="expected heads within 3 layers x 5 heads"):
        LccInjection(found.components, [head])


def test_constants_are_spread_by_layer_and_head() -> None:
    spread = constants_by_layer([Head(0, 4), Head(2, 1)], torch.ones(2, D_HEAD) * torch.tensor([[1.0], [2.0]]), N_HEADS)
    assert sorted(spread) == [0, 2]
    assert spread[0].sum(-1).tolist() == [0, 0, 0, 0, D_HEAD]
    assert spread[2].sum(-1).tolist() == [0, 2 * D_HEAD, 0, 0, 0]


def test_model_is_left_as_it_was_after_an_error(pair, found: Scan) -> None:
    tokens = torch.arange(1, 30)[None]
    before = pair.pruned(tokens)
    restoration = finished(LccInjection(found.components, [Head(0, 0)], start="mean"), found)
    with pytest.raises(KeyError), restoration.applied_to(pair.pruned) as restored:
        assert float((restored(tokens) - before).abs().max()) > 0
        raise KeyError
    assert torch.equal(pair.pruned(tokens), before)


def test_padding_and_micro_batches_do_not_change_the_loss(pair, sequences) -> None:
    whole = response_nll(pair.pruned, pad(sequences, range(6)))
    single = sum(response_nll(pair.pruned, pad(sequences, [i])) for i in range(6))
    assert float(whole) == pytest.approx(float(single), rel=1e-5)
    plain = [pair.pruned(s.tokens[None])[0].log_softmax(-1) for s in sequences[:6]]
    by_hand = -sum(
        float(p[i - 1, s.tokens[i]]) for p, s in zip(plain, sequences, strict=False) for i in range(s.loss_from, len(s))
    )
    assert float(whole) == pytest.approx(by_hand, rel=1e-4)


def test_micro_batches_give_the_same_training(pair, found: Scan, sequences) -> None:
    results = []
    for micro_tokens in (20, 2000):
        injection = LccInjection(found.components, found.select("mse", share=0.5))
        config = TrainConfig(lr=0.05, batch_size=6, micro_tokens=micro_tokens, validate_every=100)
        list(train(pair.pruned, injection, sequences[:18], sequences[18:24], config))
        results.append(injection.constants().detach())
    assert torch.allclose(*results, atol=1e-4)
    assert float(results[0].abs().max()) > 1e-3


def test_training_lowers_the_loss_and_keeps_the_best(pair, found: Scan, sequences) -> None:
    injection = LccInjection(found.components, found.select("mse", share=1.0))
    weights = {name: p.clone() for name, p in pair.pruned.named_parameters()}
    validation = sequences[40:]
    before = validation_loss(pair.pruned, None, validation)
    steps = list(train(pair.pruned, injection, sequences[:40], validation, FAST))
    after = validation_loss(pair.pruned, injection, validation)
    measured = [s.validation_loss for s in steps if s.validation_loss is not None]
    assert after < before - 0.1
    assert after == pytest.approx(min([before, *measured]), abs=1e-6)
    assert [s.step for s in steps] == list(range(1, 11))
    assert [s.lr for s in steps] == pytest.approx([0.1 * (1 - i / 10) for i in range(10)])
    assert all(torch.equal(p, weights[name]) for name, p in pair.pruned.named_parameters())
    assert all(p.grad is None for p in pair.pruned.parameters())


def test_diverging_run_stops_and_keeps_the_best(pair, found: Scan, sequences, caplog, monkeypatch) -> None:
    """A random model answers even absurd constants with a flat distribution, so the bar is lowered to meet it."""
    monkeypatch.setattr("lcc_lens.restoration.training.loop._DIVERGED", 0.5)
    injection = LccInjection(found.components, found.select("mse", share=1.0))
    validation = sequences[40:]
    before = validation_loss(pair.pruned, None, validation)
    config = TrainConfig(lr=1e3, batch_size=4, validate_every=1)
    steps = list(train(pair.pruned, injection, sequences[:12], validation, config))
    assert [s.step for s in steps] == [1]
    assert "stopped at step 1 of 3: training diverged, got a validation loss of" in caplog.text
    assert "lower the learning rate (1000)" in caplog.text
    assert validation_loss(pair.pruned, injection, validation) <= before


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(pair, found: Scan, sequences, caplog) -> None:
    injection = LccInjection(found.components, found.select("mse", share=1.0))
    config = TrainConfig(lr=1e-3, batch_size=4, validate_every=1)
    kept = {}
    for step in train(pair.pruned, injection, sequences[:12], sequences[40:], config):
        assert step.step == 1
        kept = {name: p.detach().clone() for name, p in injection.named_parameters()}
        with torch.no_grad():
            injection.offset += math.nan
    assert "stopped at step 2 of 3: training diverged, got a loss of nan" in caplog.text
    assert all(torch.equal(p, kept[name]) for name, p in injection.named_parameters())


def test_trained_numbers_are_float32_in_a_bfloat16_model(
    dense_dir: Path, pruned_dir: Path, found: Scan, sequences
) -> None:
    loaded = load_hooked(pruned_dir, dtype=torch.bfloat16)
    injection = LccInjection(found.components, [Head(1, 2)])
    list(train(loaded.model, injection, sequences[:8], sequences[40:], FAST))
    assert {p.dtype for p in injection.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_every_sequence_is_seen_once_an_epoch(sequences) -> None:
    grouped = epoch_batches(sequences, 5, seed=0)
    assert sorted(i for batch in grouped for i in batch) == list(range(len(sequences)))
    assert grouped != epoch_batches(sequences, 5, seed=1)
    assert grouped == epoch_batches(sequences, 5, seed=0)
    whole = batches(sequences, max_tokens=120)
    assert sorted(i for batch in whole for i in batch.index) == list(range(len(sequences)))


def run_restore(pair, found: Scan, question_file: Path, run: Path, **changes) -> Restoration:
    data = load_data(str(question_file))
    return restore(pair, found, found.select("mse", share=1.0), data, config=FAST, run=run, **changes)


def test_interrupted_run_resumes_to_the_same_result(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    unbroken = run_restore(pair, found, question_file, tmp_path / "whole")

    def stop(step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun, match=r"stopped after step 5 of 11.*--resume") as stopped:
        run_restore(pair, found, question_file, tmp_path / "broken", on_step=stop)
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "broken" / "restoration.safetensors").exists()
    resumed = run_restore(pair, found, question_file, tmp_path / "broken", resume=True)
    assert torch.equal(resumed.constants, unbroken.constants)
    assert torch.equal(resumed.magnitudes, unbroken.magnitudes)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 12))


def test_killed_run_resumes_from_its_last_checkpoint(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    unbroken = run_restore(pair, found, question_file, tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(step) -> None:
        if step.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_restore(pair, found, question_file, tmp_path / "broken", on_step=die)
    resumed = run_restore(pair, found, question_file, tmp_path / "broken", resume=True)
    assert torch.equal(resumed.constants, unbroken.constants)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 12))


def test_resuming_something_else_is_refused(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a checkpoint to resume"):
        run_restore(pair, found, question_file, tmp_path, resume=True)
    assert list(tmp_path.glob("*.json*")) == []
    run_restore(pair, found, question_file, tmp_path)
    before = {name: (tmp_path / name).read_text() for name in ("config.json", "log.jsonl", "metrics.json")}
    data = load_data(str(question_file))
    with pytest.raises(RequestError, match="another run's"):
        restore(
            pair, found, [Head(0, 0)], data, config=FAST, run=tmp_path, resume=True,
        )  # fmt: skip
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_resuming_over_another_scan_is_refused(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    """Magnitudes belong to the directions they were trained over."""
    run_restore(pair, found, question_file, tmp_path)
    other = scan(pair, load_data(str(question_file), n=12))
    assert not torch.equal(other.components.directions, found.components.directions)
    with pytest.raises(RequestError, match="another run's"):
        run_restore(pair, other, question_file, tmp_path, resume=True)


def test_run_names_its_weights_and_survives_loading(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    restoration = run_restore(pair, found, question_file, tmp_path)
    again = Restoration.load(tmp_path)
    assert again.record == restoration.record
    assert again.heads == restoration.heads
    assert torch.equal(again.constants, restoration.constants)
    for name in ("config.json", "metrics.json"):
        record = json.loads((tmp_path / name).read_text())
        assert record["dense_sha256"] == pair.dense_id.sha256
        assert record["pruned_sha256"] == pair.pruned_id.sha256
        assert record["version"]
        assert record["seed"] in (0, 1)
    losses = again.record.losses
    assert losses["restored"] < losses["pruned"]


def test_scan_of_other_weights_is_refused(found: Scan, pruned_dir: Path, question_file: Path, tmp_path: Path) -> None:
    other = save_model(build_model(seed=5), tmp_path / "other")
    with pytest.raises(RequestError, match="expected the dense model that"):
        restore(load_pair(other, pruned_dir), found, [Head(0, 0)], load_data(str(question_file)))


def test_changed_restoration_is_refused(pair, found: Scan, question_file: Path, tmp_path: Path) -> None:
    run_restore(pair, found, question_file, tmp_path)
    file = tmp_path / "restoration.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RequestError, match="got a changed file; restore again"):
        Restoration.load(tmp_path)


def test_probe_and_training_data_of_one_role_may_not_overlap(pair, found: Scan, question_file: Path) -> None:
    data = load_data(str(question_file), role="train")  # the scan fixture read every role
    with pytest.raises(RequestError, match="expected training data and the scan's data without a shared sequence"):
        restore(pair, found, [Head(0, 0)], data)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"batch_size": 0}])
def test_senseless_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="expected"):
        TrainConfig(**changes)


def test_offset_alone_has_no_magnitudes_and_may_start_at_the_mean(found: Scan) -> None:
    heads = found.select("mse", share=0.5)
    expected = torch.stack([found.mean_difference[h] for h in heads])
    assert not bool(OffsetInjection(found.components, heads).constants().any())
    injection = OffsetInjection(found.components, heads, start="mean")
    assert torch.allclose(injection.constants(), expected, atol=1e-5)
    assert injection.magnitudes.shape == (len(heads), 0)
    assert sum(p.numel() for p in injection.parameters()) == len(heads) * D_HEAD


@pytest.mark.parametrize("rank", [-1, D_HEAD + 1])
def test_rank_outside_the_head_is_refused(found: Scan, rank: int) -> None:
    with pytest.raises(RequestError, match=rf"expected a rank between 0 \(offset alone\) and d_head = {D_HEAD}"):
        LccInjection(found.components, [Head(0, 0)], rank=rank)


@pytest.mark.parametrize("method", mostly_slow(["offset", "random-basis"], "random-basis"))
def test_controls_are_trained_and_resumed_like_the_method(
    pair, found: Scan, question_file: Path, tmp_path: Path, method: str
) -> None:
    plain = run_restore(pair, found, question_file, tmp_path / "lcc")
    unbroken = run_restore(pair, found, question_file, tmp_path / "whole", method=method)
    losses = unbroken.record.losses
    assert unbroken.record.method == method
    n_directions = 0 if method == "offset" else D_HEAD
    assert unbroken.record.n_trained == len(unbroken.heads) * (n_directions + D_HEAD)
    assert losses["restored"] < losses["pruned"] - 0.1
    assert not torch.allclose(unbroken.constants, plain.constants, atol=1e-4)

    def stop(step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun):
        run_restore(pair, found, question_file, tmp_path / "broken", method=method, on_step=stop)
    with pytest.raises(RequestError, match="another run's"):
        run_restore(pair, found, question_file, tmp_path / "broken", resume=True)
    run_restore(pair, found, question_file, tmp_path / "broken", method=method, resume=True)
    assert torch.equal(Restoration.load(tmp_path / "broken").constants, unbroken.constants)


def test_mean_shift_is_the_mean_difference_and_trains_nothing(
    pair, found: Scan, question_file: Path, tmp_path: Path
) -> None:
    run_restore(pair, found, question_file, tmp_path)  # leaves a log that is not the mean shift's
    steps: list = []
    restoration = run_restore(pair, found, question_file, tmp_path, method="mean-shift", on_step=steps.append)
    expected = torch.stack([found.mean_difference[h] for h in restoration.heads])
    assert torch.allclose(restoration.constants, expected, atol=1e-5)
    assert steps == []
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert json.loads((tmp_path / "config.json").read_text())["restore"]["method"] == "mean-shift"
    assert restoration.record.n_trained == 0
    assert (restoration.record.data, restoration.record.n_examples) == (found.record.data, found.record.n_examples)
    part = run_restore(pair, found, question_file, tmp_path, method="mean-shift", rank=1)
    chosen = head_indices(part.heads)
    assert torch.allclose(part.constants, found.components.component(1)[chosen], atol=1e-5)


def test_model_that_the_export_cannot_serve_is_refused_before_training(question_file: Path, tmp_path: Path) -> None:
    """MPT has no bias at all: its restoration works under hooks and as a sidecar."""
    torch.manual_seed(0)
    model = transformers.MptForCausalLM(transformers.MptConfig(d_model=30, n_heads=5, n_layers=2, vocab_size=300))
    dense = save_model(model, tmp_path / "dense")
    with torch.no_grad():
        model.transformer.blocks[0].attn.Wqkv.weight[60:, ::2] = 0
    pair = load_pair(dense, save_model(model, tmp_path / "pruned"))
    data = load_data(str(question_file))
    lost = scan(pair, data)
    steps: list = []
    with pytest.raises(RequestError, match=r"got mpt, which has none.*; restore it for hooks alone.*--hooks-only"):
        restore(pair, lost, [Head(0, 1)], data, config=FAST, run=tmp_path / "run", on_step=steps.append)
    assert steps == []
    assert not (tmp_path / "run").exists()
    restoration = restore(pair, lost, [Head(0, 1)], data, config=FAST, exportable=False)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = pair.pruned(tokens)
        with restoration.applied_to(pair.pruned) as restored:
            assert float((restored(tokens) - before).abs().max()) > 1e-4
        assert torch.equal(pair.pruned(tokens), before)


def test_shuffled_responses_pair_every_prompt_with_anothers(question_file: Path, text_file: Path) -> None:
    data = load_data(str(question_file))
    mixed = data.with_shuffled_responses(3)
    assert [e.prompt for e in mixed.examples] == [e.prompt for e in data.examples]
    assert sorted(e.response for e in mixed.examples) == sorted(e.response for e in data.examples)
    assert mixed.groups == data.groups
    assert mixed == data.with_shuffled_responses(3) != data.with_shuffled_responses(4)
    named = Data("a", "instruction", tuple(replace(e, response=str(i)) for i, e in enumerate(data.examples)), "a")
    assert all(int(e.response) != i for i, e in enumerate(named.with_shuffled_responses().examples))
    with pytest.raises(
        RequestError, match=r"expected at least 2 prompts with responses to shuffle, got .* of kind text"
    ):
        load_data(str(text_file)).with_shuffled_responses()


def test_shuffled_training_is_measured_on_the_same_validation(pair, found: Scan, question_file: Path) -> None:
    data, heads = load_data(str(question_file)), [Head(1, 2)]
    plain = restore(pair, found, heads, data, config=FAST)
    mixed = restore(pair, found, heads, data, config=FAST, shuffle_responses=True)
    assert mixed.record.losses["pruned"] == plain.record.losses["pruned"]
    assert mixed.record.settings["shuffle_responses"]
    assert not torch.equal(mixed.constants, plain.constants)


def test_diverged_run_resumes_to_the_same_end(
    pair, found: Scan, question_file: Path, tmp_path: Path, monkeypatch
) -> None:
    """What is saved is from before the divergence, so a resumed run does not go on beyond it."""

    def diverge(model, injection, *rest) -> float:
        moved = injection is not None and bool(injection.constants().abs().max() > 0)
        step = len((tmp_path / "log.jsonl").read_text().splitlines()) if (tmp_path / "log.jsonl").exists() else 0
        return 9.0 if moved and step == 3 else 1.0

    monkeypatch.setattr(
        "lcc_lens.restoration.training.loop.validation_loss", diverge
    )  # as if the fourth step led astray
    run_restore(pair, found, question_file, tmp_path)
    first = Restoration.load(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    steps: list = []
    run_restore(pair, found, question_file, tmp_path, resume=True, on_step=steps.append)
    assert [s.step for s in steps] == [3, 4]
    again = Restoration.load(tmp_path)
    assert torch.equal(again.constants, first.constants)
    assert again.record.losses == first.record.losses


def test_mean_shift_has_no_training_to_shuffle(pair, found: Scan, question_file: Path) -> None:
    with pytest.raises(RequestError, match="expected a method that trains for shuffled responses, got mean-shift"):
        run_restore(pair, found, question_file, None, method="mean-shift", shuffle_responses=True)


def test_a_restoration_that_learned_the_task_says_so(
    pair, found: Scan, question_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_data(str(question_file))  # one-word answers, which are learned from a few examples
    losses = restore(pair, found, found.select("mse", share=1.0), data, config=FAST).record.losses
    assert losses["restored"] < losses["dense"]
    assert "training also taught the task" in caplog.text or "the task learned, not restored" in caplog.text
    caplog.clear()
    restore(pair, found, found.select("mse", share=0.2), data, method="mean-shift")  # trains nothing
    assert "task" not in caplog.text
