"""Restoring interactively: every action is repeatable, undoable, and leaves the models as they were."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiers import mostly_slow
from support.tiny import D_HEAD, N_HEADS, N_LAYERS
from transformers import GenerationConfig

import lcc_lens as lcc
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import load_data
from lcc_lens.frontends.session.session import RestoreSession
from lcc_lens.frontends.session.stopping import Stopped
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.refit.refit import _LayerRefit
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.validation import validation_loss
from lcc_lens.restoration.training_data import training_sequences

PROMPT = "is 3 plus 2 more than"
TOKENS = torch.arange(1, 25)[None]


@pytest.fixture
def data(question_file: Path):
    return load_data(str(question_file))


@pytest.fixture
def session(pair, found: Scan, data) -> RestoreSession:
    return RestoreSession(pair, found, data, batch_size=4)


def numbers(session: RestoreSession) -> dict[str, torch.Tensor]:
    injection = session._state.injection
    return {} if injection is None else {name: value.clone() for name, value in injection.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def layers_refitted(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None]) -> list[object]:
    """The layers that are refitted from here on; ``stop`` is called after the first one."""
    layers: list[object] = []
    run = _LayerRefit.run

    def refit(layer: _LayerRefit, *inputs: object) -> object:
        weights = run(layer, *inputs)
        layers.append(layer)
        if len(layers) == 1:
            stop()
        return weights

    monkeypatch.setattr(_LayerRefit, "run", refit)
    return layers


def hooked(session: RestoreSession) -> torch.Tensor:
    with session.applied() as model, torch.no_grad():
        return model(TOKENS)


def test_choose_by_list_selector_and_share(session: RestoreSession, found: Scan) -> None:
    assert session.heads == ()
    assert session.choose([Head(2, 1), "L0H4", (2, 1)]) == (Head(0, 4), Head(2, 1))
    assert session.choose("mse", share=0.5) == tuple(found.select("mse", share=0.5))
    assert session.choose("random", share=0.3) == tuple(found.select("random", share=0.3, seed=0))
    assert session.history == (
        "session.choose([lcc.Head(0, 4), lcc.Head(2, 1)])", "session.choose('mse', share=0.5)",
        "session.choose('random', share=0.3)",
    )  # fmt: skip
    assert session.magnitudes.shape == session.constants.shape == (len(session.heads), D_HEAD)


def test_training_goes_on_and_keeps_the_best(session: RestoreSession, pair) -> None:
    before = session.loss()
    assert before["restored"] == before["pruned"] != before["dense"]
    session.choose("mse", share=1.0)
    weights = {name: number.clone() for name, number in pair.pruned.named_parameters()}
    seen: list = []
    steps = session.train(12, lr=0.05, on_step=seen.append)
    assert [step.step for step in steps] == list(range(1, 13))
    assert tuple(seen) == steps == session.steps
    after = session.loss()
    measured = [step.validation_loss for step in steps if step.validation_loss is not None]
    assert len(measured) == 3
    assert after["restored"] < before["restored"] - 0.1
    assert after["restored"] == pytest.approx(min(measured), abs=1e-5)
    first = session.constants
    session.train(12, lr=0.02)
    assert len(session.steps) == 24
    assert session.loss()["restored"] <= after["restored"] + 1e-6
    assert not torch.equal(session.constants, first)
    assert all(torch.equal(number, weights[name]) for name, number in pair.pruned.named_parameters())
    assert not any(point.fwd_hooks for point in pair.pruned.hook_dict.values())


def test_losses_are_those_of_the_models(session: RestoreSession, pair, found: Scan, data) -> None:
    session.choose("mse", share=0.5)
    session.train(4, lr=0.05)
    held_out = training_sequences(pair, found, data, None, 256, None, None)[1]
    losses = session.loss()
    assert losses["dense"] == pytest.approx(validation_loss(pair.dense, None, held_out), rel=1e-6)
    with session.applied() as model:
        assert losses["restored"] == pytest.approx(validation_loss(model, None, held_out), rel=1e-5)


def test_training_that_makes_it_worse_changes_nothing(session: RestoreSession, monkeypatch) -> None:
    session.choose([Head(1, 2)])
    steps = session.train(5, lr=0.05)
    before, constants = session.loss(), session.constants
    best = min(step.validation_loss for step in steps if step.validation_loss is not None)
    monkeypatch.setattr(
        "lcc_lens.restoration.training.loop.validation_loss", lambda *_: best + 0.01
    )  # as if every step led astray
    session.train(6, lr=0.5)
    assert torch.equal(session.constants, constants)
    assert session.loss() == before
    assert session.history[-1] == "session.train(6, lr=0.5)"


@pytest.mark.parametrize("how", ["thread", "callback", "ctrl-c"])
def test_stop_keeps_the_best_and_is_repeatable(session: RestoreSession, pair, found: Scan, data, how: str) -> None:
    session.choose("mse", share=1.0)

    def stop(step) -> None:
        if step.step == 7:
            if how == "thread":
                other = threading.Thread(target=session.stop)
                other.start()
                other.join()
            elif how == "callback":
                session.stop()
            else:
                os.kill(os.getpid(), signal.SIGINT)

    steps = session.train(40, lr=0.05, on_step=stop)
    n_steps = 7 if how != "ctrl-c" else len(steps)
    assert len(steps) == n_steps < 9
    assert session.history[-1] == f"session.train(40, lr=0.05, stop_after={n_steps})"
    measured = [step.validation_loss for step in steps if step.validation_loss is not None]
    assert session.loss()["restored"] == pytest.approx(min(measured), abs=1e-5)
    again = RestoreSession(pair, found, data, batch_size=4)
    again.choose("mse", share=1.0)
    again.train(40, lr=0.05, stop_after=n_steps)
    assert same_bits(numbers(again), numbers(session))


def test_undo_and_redo_restore_every_bit(session: RestoreSession) -> None:
    states = [(session.heads, session.rank, session.scale, session.steps, numbers(session), hooked(session))]
    for action in (
        lambda: session.choose("mse", share=0.5), lambda: session.train(6, lr=0.05), lambda: session.set_rank(2),
        lambda: session.set_scale(0.5), lambda: session.choose([Head(0, 1), Head(2, 2)]), lambda: session.train(3),
    ):  # fmt: skip
        action()
        states.append((session.heads, session.rank, session.scale, session.steps, numbers(session), hooked(session)))
    assert all(not torch.equal(one[5], other[5]) for one, other in itertools.pairwise(states[1:]))
    history = session.history

    def is_at(index: int) -> bool:
        *plain, kept, logits = states[index]
        now = [session.heads, session.rank, session.scale, session.steps]
        return now == plain and same_bits(numbers(session), kept) and torch.equal(hooked(session), logits)

    for index in reversed(range(6)):
        session.undo()
        assert is_at(index)
        assert session.history == history[:index]
    with pytest.raises(RequestError, match="expected an action to undo, got none"):
        session.undo()
    for index in range(1, 7):
        session.redo()
        assert is_at(index)
    with pytest.raises(RequestError, match="expected an undone action to redo, got none"):
        session.redo()
    session.undo()
    session.set_scale(1.0)
    with pytest.raises(RequestError, match="nothing was undone since the last action"):
        session.redo()


@pytest.mark.parametrize(
    "method", mostly_slow(["lcc", "lcc+low-rank", "offset+gain", "norms", "mean-shift"], "lcc+low-rank")
)
def test_history_is_code_that_repeats_the_session(pair, found: Scan, data, method: str) -> None:
    settings = {"method": method, "batch_size": 4, "objective": Objective(1.0, 1.0), "low_rank": 2}
    session = RestoreSession(pair, found, data, **settings)
    has_heads, has_rank = method != "norms", method not in ("norms", "offset+gain")
    if has_heads:
        session.choose("mse", share=0.6)
    if method != "mean-shift":
        session.train(6)
        session.undo()  # leaves no line, and what it computed must not matter
        session.train(5, lr=0.01, on_step=lambda step: session.stop() if step.step == 3 else None)
    if has_rank:
        session.set_rank(3)
    if has_heads:
        session.choose([Head(0, 1), Head(1, 2), *session.heads[:2]])
        session.set_scale(0.75)
    if method != "mean-shift":
        session.train(4)
    again = RestoreSession(pair, found, data, **settings)
    for line in session.history:
        exec(line, {"session": again, "lcc": lcc})
    assert again.history == session.history
    assert same_bits(numbers(again), numbers(session))
    assert torch.equal(again.constants, session.constants)
    assert torch.equal(hooked(again), hooked(session))
    assert again.loss() == session.loss()
    fresh = RestoreSession(pair, found, data, **settings)
    assert not torch.equal(hooked(fresh), hooked(session))


def test_heads_and_directions_that_stay_keep_what_they_learned(session: RestoreSession) -> None:
    session.choose([Head(0, 1), Head(1, 2)])
    session.train(6, lr=0.05)
    magnitudes, constants = session.magnitudes, session.constants
    assert float(constants.abs().amin(1).max()) > 0
    session.choose([Head(1, 2), Head(2, 3)])
    assert torch.equal(session.constants[0], constants[1])
    assert not bool(session.constants[1].any())
    session.set_rank(2)
    assert torch.equal(session.magnitudes[0], magnitudes[1][:2])
    session.set_rank(None)
    assert torch.equal(session.magnitudes[0, :2], magnitudes[1][:2])
    assert not bool(session.magnitudes[0, 2:].any())


def test_scale_multiplies_what_is_added(session: RestoreSession, pair) -> None:
    with torch.no_grad():
        bare = pair.pruned(TOKENS)
    session.choose("mse", share=0.5)
    session.train(6, lr=0.05)
    constants = session.constants
    session.set_scale(2.0)
    assert torch.allclose(session.constants, 2 * constants)
    assert torch.allclose(session.restoration().constants, 2 * constants)
    session.set_scale(0.0)
    assert torch.equal(hooked(session), bare)
    session.train(2, lr=1e-9)  # the scale stays out of training
    session.set_scale(1.0)
    assert torch.allclose(session.constants, constants, atol=1e-6)


def test_next_tokens_and_generation_of_all_three(session: RestoreSession, pair) -> None:
    session.choose("mse", share=1.0)
    before = session.generate(PROMPT, 12)
    assert before["restored"] == before["pruned"]
    session.train(12, lr=0.1)
    ids = torch.tensor([pair.tokenizer(PROMPT)["input_ids"]])
    table = session.next_tokens(PROMPT, k=3)
    texts = session.generate(PROMPT, 12)
    assert list(table.columns) == ["token", "dense", "pruned", "restored"]
    assert table["dense"].is_monotonic_decreasing
    assert texts["pruned"] != texts["restored"]
    with session.applied() as restored:
        for name, model in (("dense", pair.dense), ("restored", restored)):
            with torch.no_grad():
                expected = torch.softmax(model(ids)[0, -1], -1)
                tokens = ids
                while tokens.shape[1] < ids.shape[1] + 12 and (tokens.shape == ids.shape or int(tokens[0, -1]) != 0):
                    tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
            assert table[name].max() == pytest.approx(float(expected.max()), rel=1e-4)
            assert table["token"][table[name].idxmax()] == pair.tokenizer.decode([int(expected.argmax())])
            assert texts[name] == pair.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert session.generate(PROMPT, 12)["pruned"] == before["pruned"]


def test_generation_ends_with_the_context(session: RestoreSession, caplog: pytest.LogCaptureFixture) -> None:
    texts = session.generate("a" * 509, 8)
    assert all(len(text.encode(errors="replace")) <= 9 for text in texts.values())  # a token may be half a character
    assert "continuations end after 3 tokens: the context is 512" in caplog.text


def test_generation_is_greedy_whatever_lies_beside_the_weights(session: RestoreSession, pair, monkeypatch) -> None:
    expected = session.generate(PROMPT, 12)
    settings = GenerationConfig(repetition_penalty=8.0, num_beams=2, no_repeat_ngram_size=1, eos_token_id=0)
    session._forget_outputs()
    for model in (pair.dense, pair.pruned):
        monkeypatch.setattr(model.original_model, "generation_config", settings)
    assert session.generate(PROMPT, 12) == expected
    assert pair.dense.original_model.generation_config is settings


def test_the_dense_and_the_pruned_model_are_asked_once(session: RestoreSession, pair) -> None:
    session.choose("mse", share=1.0)
    first = session.next_tokens(PROMPT, k=3), session.generate(PROMPT, 8)
    session.train(6, lr=0.1)
    dense_passes = []
    hook = pair.dense.original_model.register_forward_pre_hook(lambda *_: dense_passes.append(1))
    table, texts = session.next_tokens(PROMPT, k=257), session.generate(PROMPT, 8)
    assert dense_passes == []
    assert texts["dense"] == first[1]["dense"]
    assert texts["restored"] != first[1]["restored"]
    assert set(first[0]["dense"]) <= set(table["dense"])
    assert session.generate(PROMPT, 9)["dense"].startswith(texts["dense"])
    assert len(dense_passes) > 0
    for n in range(20):
        session.next_tokens("a" * (n + 1))
    assert session._cache_of.cache_info().currsize == 8
    hook.remove()


def test_heads_without_training_need_no_pass_of_their_own(session: RestoreSession, pair, monkeypatch) -> None:
    from support.passes import passes

    first = session.loss(), session.generate(PROMPT, 4), session.next_tokens(PROMPT)
    seen = passes(pair.pruned, monkeypatch)
    for choose in (lambda: session.choose("mse", share=0.5), lambda: session.set_method("norms")):
        choose()
        assert (session.loss(), session.generate(PROMPT, 4)) == first[:2]
        assert session.next_tokens(PROMPT).equals(first[2])
    del seen[:]  # a method of weights tries on a few tokens whether they are reached
    session.loss()
    assert seen == []
    session.train(2, lr=0.1)
    assert session.loss()["restored"] != first[0]["restored"]
    assert seen != []


def test_another_method_begins_anew_and_is_undone(session: RestoreSession, pair, found: Scan, data) -> None:
    session.choose("mse", share=0.5)
    session.train(3, lr=0.05)
    chosen, trained = session.heads, numbers(session)
    session.set_method("gain")
    assert (session.method, session.heads, session.steps) == ("gain", chosen, ())
    session.train(3)
    session.set_method("low-rank")
    assert session.heads == ()
    session.train(2)
    again = RestoreSession(pair, found, data, batch_size=4)
    for line in session.history:
        exec(line, {"session": again, "lcc": lcc})
    assert same_bits(numbers(again), numbers(session))
    assert again.restoration().record.method == "low-rank"
    for _ in range(4):
        session.undo()
    assert session.method == "lcc"
    assert same_bits(numbers(session), trained)
    with pytest.raises(RequestError, match="expected a method for a session, got lora; run it by compare or restore"):
        session.set_method("lora")


@pytest.fixture
def best(pair, found: Scan, data, question_file: Path) -> RestoreSession:
    """A session by ``best``, which refits on a few sequences of the same questions."""
    refitting = lcc.RefitRequest(lcc.load_data(str(question_file)), n_samples=4, seq_len=32)
    return RestoreSession(pair, found, data, batch_size=4, method="best", refitting=refitting)


def test_best_refits_first_and_then_trains_towards_the_dense_model(
    best: RestoreSession, pair, found: Scan, data, tmp_path: Path
) -> None:
    assert best.n_trained == lcc.RestoreSession(pair, None, data, method="low-rank", low_rank=16).n_trained
    assert best.levels()["dense"] < best.levels()["pruned"] != best.loss()["pruned"]
    assert best.time_refit() == best.seconds_to_refit > 0
    best.refit()
    assert best.seconds_to_refit == 0
    refitted = hooked(best)
    lcc.refit(
        pair.dense_id.path, pair.pruned_id.path, tmp_path / "refit", calibration=data, n_samples=4, seq_len=32
    )  # fmt: skip
    plain = load_plain(tmp_path / "refit", dtype=torch.float32, attention="eager")
    assert torch.allclose(plain(TOKENS).logits, refitted, atol=1e-5)
    before = best.loss()["restored"]
    steps = best.train(6)
    assert steps[0].lr == 5e-3
    assert best.loss()["restored"] < before
    assert best.history == ("session.refit()", "session.train(6)")
    report = best.export(tmp_path / "out")
    assert report.logit_difference < 1e-4 < 1e-3 < report.logit_effect
    for name, weight in load_plain(pair.pruned_id.path).named_parameters():
        if "layers" in name and weight.ndim == 2:
            restored = load_plain(tmp_path / "out").get_parameter(name)
            assert torch.equal(restored == 0, weight == 0)
    best.save(tmp_path / "run")
    again = RestoreSession(pair, found, data, batch_size=4)
    again.load(tmp_path / "run")
    assert again.method == "best"
    assert same_bits(numbers(again), numbers(best))
    with pytest.raises(RequestError, match="expected a method that has yet to refit, got best"):
        again.refit()
    best.undo()
    best.undo()
    assert best.loss()["restored"] == best.loss()["pruned"]
    best.train(6)  # refits by itself, from memory
    assert best.history == ("session.refit()", "session.train(6)")
    assert same_bits(numbers(best), numbers(again))


def test_a_stopped_refit_changes_nothing_and_goes_on_later(best: RestoreSession, monkeypatch) -> None:
    layers = layers_refitted(monkeypatch, best.stop)
    with pytest.raises(Stopped, match="nothing was changed"):
        best.refit()
    assert (best.history, best.loss()["restored"]) == ((), best.loss()["pruned"])
    assert len(layers) == 1
    best.refit()
    assert best.history == ("session.refit()",)
    assert len(layers) == 3  # the first layer was finished


def test_a_saved_session_goes_on(session: RestoreSession, pair, found: Scan, data, tmp_path: Path) -> None:
    session.choose("mse", share=0.5)
    session.train(3, lr=0.05)
    session.set_scale(0.5)
    session.save(tmp_path)
    again = RestoreSession(pair, found, data, batch_size=4, method="norms")
    again.load(tmp_path)
    assert again.history == (f"session.load({str(tmp_path)!r})",)
    assert (again.method, again.heads, again.scale, again.steps) == ("lcc", session.heads, 0.5, session.steps)
    assert same_bits(numbers(again), numbers(session))
    for each in (session, again):
        each.train(2)
    assert same_bits(numbers(again), numbers(session))
    with pytest.raises(RequestError, match=r"expected a saved session in .*, got none"):
        again.load(tmp_path / "nothing")
    with pytest.raises(RequestError, match="expected a run directory, got the model in"):
        session.save(pair.pruned_id.path)
    for save in (found.save, lcc.save_lens):
        with pytest.raises(RequestError, match="expected a run directory, got the model in"):
            save(pair.pruned_id.path)
    with pytest.raises(RequestError, match="expected text, got half of a surrogate pair"):
        session.next_tokens("a \ud800")
    other = RestoreSession(load_pair(pair.dense_id.path, pair.dense_id.path), None, data, method="norms")
    with pytest.raises(RequestError, match="got one of other weights"):
        other.load(tmp_path)


def test_two_restorations_are_read_side_by_side(session: RestoreSession, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected heads to restore, got none"):
        session.pin()
    session.choose("mse", share=1.0)
    session.train(6, lr=0.1)
    session.save(tmp_path)
    first = session.loss(), session.generate(PROMPT, 6), session.next_tokens(PROMPT, 3)
    session.pin()
    session.train(4, lr=0.1)
    for _ in range(2):
        losses, texts, seen = session.loss(), session.generate(PROMPT, 6), session.compare_prompt(PROMPT)
        assert losses["pinned"] == pytest.approx(first[0]["restored"], abs=1e-5) != losses["restored"]
        assert texts["pinned"] == first[1]["restored"]
        assert seen.models == ("dense", "pruned", "restored", "pinned")
        assert seen.probabilities[3].max() == pytest.approx(first[2]["restored"].max(), rel=1e-4)
        session.pin(tmp_path)  # the same one, from disk
    session.unpin()
    assert set(session.loss()) == {"dense", "pruned", "restored"}


def test_a_step_is_timed_on_a_copy(session: RestoreSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="expected heads to restore, got none"):
        session.time_step()
    session.choose([Head(1, 2)])
    before = numbers(session)
    seconds = session.time_step()
    assert seconds > 0
    assert session.time_step() == seconds  # not measured twice
    assert same_bits(numbers(session), before)
    assert len(session.history) == 1
    steps = session.train(3)
    assert session.time_step() == sorted(step.seconds for step in steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lcc", "lcc+low-rank"])
def test_export_and_save_are_what_the_session_computes(pair, found: Scan, data, tmp_path: Path, method: str) -> None:
    session = RestoreSession(pair, found, data, batch_size=4, method=method)
    session.choose("mse", share=0.5)
    session.train(6)
    session.set_scale(1.5)
    logits = hooked(session)
    with torch.no_grad():
        assert float((pair.pruned(TOKENS) - logits).abs().max()) > 1e-2
    report = session.export(tmp_path / "out")
    assert report.logit_effect > 1e-3
    plain = load_plain(tmp_path / "out", dtype=torch.float32, attention="eager")
    assert torch.allclose(plain(TOKENS).logits, logits, atol=1e-4)
    session.save(tmp_path / "run")
    saved = Restoration.load(tmp_path / "run")
    assert torch.equal(saved.constants, session.constants)
    assert saved.record.losses == session.loss()
    assert saved.record.settings["history"] == list(session.history)
    assert saved.record.n_examples == 24
    json.dumps(saved.record.settings)


def test_weights_need_neither_scan_nor_heads(pair, data) -> None:
    session = RestoreSession(pair, None, data, method="norms", batch_size=4)
    before = session.loss()
    session.train(6)
    assert session.loss()["restored"] < before["restored"]
    assert session.magnitudes.numel() == 0
    for call, message in (
        (lambda: session.choose([Head(0, 0)]), "expected a method that restores heads, got norms"),
        (lambda: session.set_rank(2), "expected a method with directions, which a rank limits, got norms"),
        (lambda: session.set_scale(2.0), "expected a method with constants to scale, got norms"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


def test_later_training_runs_the_lower_layers_no_more(session: RestoreSession, pair, monkeypatch) -> None:
    from support.passes import passes

    session.choose([Head(2, 1)])
    session.train(12)  # once around the data
    session.loss()  # of the bare models, too
    seen = passes(pair.pruned, monkeypatch)
    session.train(12)
    session.loss()
    assert set(seen) == {2}


@pytest.mark.parametrize(("ask", "message"), [
    (lambda s: s.train(3), "expected heads to restore, got none; choose some first"),
    (lambda s: s.set_rank(3), "expected heads to restore, got none"),
    (lambda s: s.restoration(), "expected heads to restore, got none"),
    (lambda s: s.choose([]), "expected heads to restore, got none; name heads or a selector"),
    (lambda s: s.choose([Head(N_LAYERS, 0)]), "expected heads within 3 layers x 5 heads"),
    (lambda s: s.choose([Head(0, N_HEADS)]), "expected heads within 3 layers x 5 heads"),
    (lambda s: s.choose("mse", share=0.0), "expected share above 0 and at most 1, got 0"),
    (lambda s: s.choose("mse", share="0.5"), "expected share above 0 and at most 1, got '0.5'"),
    (lambda s: s.set_scale("2"), "expected scale of a finite size, got '2'"),
    (lambda s: (s.choose([Head(0, 0)]), s.set_rank(D_HEAD + 1)), "expected a rank between 0"),
    (lambda s: (s.choose([Head(0, 0)]), s.set_rank(1.5)), "expected a whole number for rank, got 1.5"),
    (lambda s: (s.choose([Head(0, 0)]), s.train(0)), "expected n_steps of at least 1, got 0"),
    (lambda s: (s.choose([Head(0, 0)]), s.train(5, stop_after=0)), "expected stop_after of at least 1, got 0"),
    (lambda s: (s.choose([Head(0, 0)]), s.train(5, lr=-1.0)), "expected lr above 0 and at most 1000, got -1"),
    (lambda s: s.set_scale(math.nan), "expected scale of a finite size, got nan"),
    (lambda s: s.next_tokens(""), "expected a prompt with at least one token"),
    (lambda s: s.next_tokens("a", k=0), "expected k of at least 1, got 0"),
    (lambda s: s.generate("a", 0), "expected max_new_tokens of at least 1, got 0"),
    (lambda s: s.generate("a" * 512), "expected a prompt of at most 511 tokens to go on from, got 512; shorten it"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(session: RestoreSession, ask, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(session)
    assert not session.is_at_work
    assert all(line.startswith("session.choose([lcc.Head(0, 0)])") for line in session.history)
    assert session.rank is None


def test_closed_forms_are_not_trained(pair, found: Scan, data) -> None:
    session = RestoreSession(pair, found, data, method="mean-shift")
    session.choose("mse", share=0.5)
    expected = torch.stack([found.mean_difference[head] for head in session.heads])
    assert torch.allclose(session.constants, expected, atol=1e-5)
    with pytest.raises(RequestError, match="expected a method that trains, got mean-shift"):
        session.train(3)
    assert session.restoration().record.data == found.record.data


def test_wrong_sessions_are_refused(pair, found: Scan, data, dense_dir: Path, pruned_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a scan of this pair for lcc, got none"):
        RestoreSession(pair, None, data)
    with pytest.raises(RequestError, match=r"expected a method \(lcc, "):
        RestoreSession(pair, found, data, method="magic")
    with pytest.raises(RequestError, match="expected the pruned model of the scan"):
        RestoreSession(load_pair(dense_dir, dense_dir), found, data)
    with pytest.raises(RequestError, match="expected both models in memory"):
        RestoreSession(load_pair(dense_dir, pruned_dir, one_at_a_time=True), found, data)


def test_a_session_at_work_is_read_and_stopped_but_not_asked(session: RestoreSession) -> None:
    session.choose([Head(1, 2)])
    heard: list[str] = []

    def look(step) -> None:
        assert session.is_at_work
        assert session.heads == (Head(1, 2),)
        assert session.steps == ()
        assert session.magnitudes.shape == (1, D_HEAD)
        for ask in (session.loss, session.undo, lambda: session.choose([Head(0, 0)]), lambda: session.generate("a")):
            with pytest.raises(RequestError, match="expected an idle session, got one that is running a call"):
                ask()
            heard.append("refused")

    session.train(2, on_step=look)
    assert len(heard) == 8
    assert not session.is_at_work
    with pytest.raises(KeyError), session.applied():
        raise KeyError
    assert not session.is_at_work
    before = numbers(session), session.history

    def fail(step) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        session.train(2, lr=0.1, on_step=fail)
    assert same_bits(numbers(session), before[0])
    assert session.history == before[1]
