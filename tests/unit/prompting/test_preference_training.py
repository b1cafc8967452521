"""Direct preference optimisation: its laws in float32, trl as an oracle, and resuming with the same bits."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lcc_lens.core.errors import InterruptedRun, LensError, RequestError
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.prompting.rewriting.fitting import fit_rewriter
from lcc_lens.prompting.rewriting.preference_files import Preference
from lcc_lens.prompting.rewriting.preference_training import PreferenceObjective, preference_sequences, reward_margins
from lcc_lens.prompting.rewriting.preferences import Preferences
from lcc_lens.prompting.rewriting.rewriter import Rewriter, new_adapter, trained_parameters
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.prompting.rewriting.writing import INSTRUCTION, request_tokens
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import optimise
from lcc_lens.restoration.training.state import TrainingState

SHORT = "S_P:"  # MePO's instruction takes most of the tiny model's context, byte by byte
PAIRS = [Preference(f"river {i}", f"List {i} rivers" + "." * (i % 3), f"rivers {i}" + "!" * (i % 2)) for i in range(12)]
SETTINGS = RewriterSettings(lr=0.05, epochs=2, batch_size=3, beta=0.1)


@pytest.fixture(autouse=True)
def short_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", SHORT)


def sequences(pair: Pair, n: int = 4) -> Any:
    return preference_sequences(pair.dense, pair.tokenizer, PAIRS[:n], 200)


def loss_of(pair: Pair, pairs: Any, adapter: Any, objective: PreferenceObjective) -> torch.Tensor:
    (batch,) = objective.batches(pairs, 10_000)
    with adapter.attached(pair.dense):
        return objective.loss(pair.dense, batch, objective.counts(pairs), adapter.hooks())


def test_a_fresh_adapter_has_loss_ln_2_and_a_gradient(pair: Pair) -> None:
    pairs, adapter = sequences(pair), new_adapter(pair.dense, SETTINGS)
    loss = loss_of(pair, pairs, adapter, PreferenceObjective(beta=0.01))
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in trained_parameters(adapter).items()}
    assert all(g is not None and g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name)
    assert len(gradients) == 2 * 2 * pair.n_layers  # A and B beside q and v


def test_swapping_chosen_and_rejected_negates_the_margin(pair: Pair) -> None:
    pairs, adapter, objective = sequences(pair), new_adapter(pair.dense, SETTINGS), PreferenceObjective(beta=0.3)
    with torch.no_grad():
        for name, parameter in trained_parameters(adapter).items():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    margins = reward_margins(pair.dense, adapter, pairs, objective)
    swapped = reward_margins(pair.dense, adapter, [p.swapped() for p in pairs], objective)
    torch.testing.assert_close(swapped, -margins, rtol=1e-4, atol=1e-5)
    assert margins.abs().min() > 1e-3
    torch.testing.assert_close(reward_margins(pair.dense, adapter, pairs, objective, max_tokens=1), margins)


def test_a_detached_adapter_leaves_the_reference_bit_for_bit(pair: Pair) -> None:
    tokens = torch.arange(20)[None]
    before = pair.dense.run_with_hooks(tokens, fwd_hooks=[])
    state = {name: p.clone() for name, p in plain_model(pair.dense).named_parameters()}
    rewriter = fit_rewriter(pair, Preferences(tuple(PAIRS)), settings=SETTINGS)
    assert torch.equal(pair.dense.run_with_hooks(tokens, fwd_hooks=[]), before)
    assert all(torch.equal(p, state[name]) for name, p in plain_model(pair.dense).named_parameters())
    with rewriter.adapter(pair.dense).attached(pair.dense):
        assert not torch.equal(pair.dense.run_with_hooks(tokens, fwd_hooks=[]), before)
    again = sequences(pair)
    assert [p.reference for p in again] == [p.reference for p in sequences(pair)]


def test_training_lowers_the_held_out_loss_from_ln_2(pair: Pair, tmp_path: Path) -> None:
    rewriter = fit_rewriter(pair, Preferences(tuple(PAIRS)), settings=SETTINGS, run=tmp_path)
    record = rewriter.record
    assert record.first_loss == pytest.approx(math.log(2), abs=1e-6)
    assert record.best_loss < record.first_loss - 0.01
    assert record.accuracy == 1
    assert record.steps == 2 * math.ceil(10 / 3)
    loaded = Rewriter.load(tmp_path)
    assert loaded.record == record
    assert all(torch.equal(value, rewriter.tensors[name]) for name, value in loaded.tensors.items())


def test_steps_replace_epochs(pair: Pair) -> None:
    settings = RewriterSettings(steps=5, batch_size=4, lr=1e-3)
    assert fit_rewriter(pair, Preferences(tuple(PAIRS[:4])), settings=settings).record.steps == 5


def test_dropout_is_drawn_in_training_alone_and_from_the_parameters(pair: Pair) -> None:
    settings = RewriterSettings(dropout=0.5)
    adapter, pairs, objective = new_adapter(pair.dense, settings), sequences(pair), PreferenceObjective(beta=1.0)
    with torch.no_grad():
        for parameter in trained_parameters(adapter).values():
            parameter.fill_(0.1)
    first, again = (float(loss_of(pair, pairs, adapter, objective).detach()) for _ in range(2))
    assert first == again
    with torch.no_grad():
        quiet = float(loss_of(pair, pairs, adapter, objective))
        next(iter(trained_parameters(adapter).values())).add_(1e-7)
    assert first != quiet
    assert float(loss_of(pair, pairs, adapter, objective).detach()) != first  # other parameters draw other masks


def test_loss_and_gradient_equal_trl_s(dense_dir: Path, tmp_path: Path) -> None:
    """trl's own trainer on the same batch, with peft's model and no dropout."""
    trl = pytest.importorskip("trl")
    import warnings

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_hooked(dense_dir)
    pairs = preference_sequences(loaded.model, loaded.tokenizer, PAIRS[:4], 200)
    settings = RewriterSettings(dropout=0.0, beta=0.1)
    adapter = new_adapter(loaded.model, settings)
    with torch.no_grad():
        for i, parameter in enumerate(trained_parameters(adapter).values()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    objective = PreferenceObjective(beta=settings.beta)
    (batch,) = objective.batches(pairs, 10_000)
    with adapter.attached(loaded.model):
        loss = objective.loss(loaded.model, batch, objective.counts(pairs))
        loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=settings.beta, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=4,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
        trainer = trl.DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(dense_dir),
            peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip
        own = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for theirs, ours in zip(own.values(), trained_parameters(adapter).values(), strict=True):
                theirs.copy_(ours)
        is_answer = (torch.arange(batch.tokens.shape[1]) >= batch.loss_from[:, None]) & batch.is_valid()
        inputs = {
            "input_ids": batch.tokens, "attention_mask": batch.is_valid().long(), "completion_mask": is_answer.long()
        }  # fmt: skip
        expected = trainer.compute_loss(trainer.model, inputs)
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - math.log(2)) > 1e-3
    for theirs, ours in zip(own.values(), trained_parameters(adapter).values(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_an_interrupted_training_ends_with_the_same_bits(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferences = Preferences(tuple(PAIRS))
    whole = fit_rewriter(pair, preferences, settings=SETTINGS, run=tmp_path / "whole")
    seen: list[int] = []

    def interrupt(adapter: Any, step: Any) -> None:
        seen.append(step.step)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("lcc_lens.prompting.rewriting.fitting._require_gradients", interrupt)
    with pytest.raises(InterruptedRun, match="stopped after step 3 of 8"):
        fit_rewriter(pair, preferences, settings=SETTINGS, run=tmp_path / "run")
    resumed = fit_rewriter(pair, preferences, settings=SETTINGS, run=tmp_path / "run", resume=True)
    assert seen == list(range(1, 9))
    assert resumed.record == whole.record
    assert all(torch.equal(value, whole.tensors[name]) for name, value in resumed.tensors.items())
    with pytest.raises(RequestError, match="expected a checkpoint of the same models, data, heads and settings"):
        other = RewriterSettings(lr=0.04, epochs=2, batch_size=3, beta=0.1)
        fit_rewriter(pair, preferences, settings=other, run=tmp_path / "run", resume=True)


KILLED = """
import sys
from pathlib import Path
import lcc_lens.prompting.rewriting.fitting as fitting, lcc_lens.prompting.rewriting.writing as writing
import dataclasses
from lcc_lens.models.pair import load_pair
from lcc_lens.prompting.rewriting.preferences import Preferences
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.restoration.training import config

writing.INSTRUCTION = "S_P:"
fitting.TrainConfig = lambda **settings: config.TrainConfig(**settings, checkpoint_every=2, validate_every=2)
dense, pruned, preferences, run, kill_at, resume = sys.argv[1:]
def kill(adapter, step):
    if step.step == int(kill_at):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
fitting._require_gradients = kill
settings = RewriterSettings(lr=0.05, epochs=2, batch_size=3, beta=0.1)
fitting.fit_rewriter(
    load_pair(dense, pruned), Preferences.load(preferences), settings=settings, run=Path(run), resume=resume == "resume"
)
"""


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bits(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    Preferences(tuple(PAIRS)).save(tmp_path / "preferences.json")

    def start(run: str, kill_at: int, resume: str = "") -> int:
        command = [dense_dir, pruned_dir, tmp_path / "preferences.json", tmp_path / run, kill_at, resume]
        return subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], check=False).returncode

    assert start("whole", 0) == 0
    assert start("run", 5) == -signal.SIGKILL
    assert not (tmp_path / "run" / "rewriter.safetensors").exists()
    assert start("run", 0, "resume") == 0
    whole, resumed = (Rewriter.load(tmp_path / name) for name in ("whole", "run"))
    assert resumed.record == whole.record
    assert all(torch.equal(value, whole.tensors[name]) for name, value in resumed.tensors.items())


def test_a_training_without_gradients_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lcc_lens.prompting.rewriting.fitting.PreferenceObjective", lambda beta: PreferenceObjective(beta=0.0)
    )
    with pytest.raises(LensError, match="expected gradients in the rewriter's adapter, got none at step 1"):
        fit_rewriter(pair, Preferences(tuple(PAIRS)), settings=SETTINGS)


def test_an_end_token_that_the_model_does_not_know_is_left_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = sequences(pair, 1)
    monkeypatch.setattr(pair.dense.cfg, "d_vocab", pair.tokenizer.eos_token_id)
    (bare,) = sequences(pair, 1)
    assert bare.tokens.tolist() == whole.tokens.tolist()[:-1]


def test_micro_batches_keep_pairs_whole(pair: Pair) -> None:
    pairs, objective = sequences(pair, 8), PreferenceObjective(beta=0.1)
    adapter = new_adapter(pair.dense, RewriterSettings(dropout=0.0))
    results = []
    for micro_tokens in (None, 64):
        state = TrainingState(
            adapter, TrainConfig(objective=objective, micro_tokens=micro_tokens, lr=1e-9), n_sequences=8, identity=""
        )
        loss, _ = optimise(pair.dense, adapter, state, pairs, None)
        gradients = [p.grad.clone() for p in trained_parameters(adapter).values() if p.grad is not None]
        results.append((loss, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_refusals(pair: Pair, families: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected preferences of at least 2 prompts"):
        fit_rewriter(pair, Preferences(tuple(PAIRS[:1])))
    with pytest.raises(RequestError, match="expected preferences of up to 5 tokens, got none in"):
        fit_rewriter(pair, Preferences(tuple(PAIRS)), settings=RewriterSettings(max_length=5))
    with pytest.raises(RequestError, match="expected a checkpoint to resume in"):
        fit_rewriter(pair, Preferences(tuple(PAIRS)), run=tmp_path, resume=True)
    with pytest.raises(RequestError, match="expected beta above 0, got 0"):
        RewriterSettings(beta=0.0)
    with pytest.raises(RequestError, match="expected linear layers named q_proj, v_proj, got none"):
        fit_rewriter(families("gpt2"), Preferences(tuple(PAIRS)))


def test_the_request_is_mepo_s(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", INSTRUCTION)
    text = pair.tokenizer.decode(request_tokens(pair.tokenizer, "list rivers"))
    assert text.startswith(
        "You are an expert of prompt optimization.\n\nSliver Prompt:\n'list rivers'\n\n\nThe optional"
    )
    assert text.endswith("\n\nGolden Prompt:\n")


def test_a_chat_template_with_a_system_turn(dense_dir: Path, pruned_dir: Path) -> None:
    pair = load_pair(dense_dir, pruned_dir)
    pair.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}[sys]Be kind.{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (encoded,) = preference_sequences(pair.dense, pair.tokenizer, PAIRS[:1], 200)
    text = pair.tokenizer.decode(encoded.tokens)
    assert text == "[sys]Be kind.[user]river 0:[assistant]List 0 rivers<end>"
    assert pair.tokenizer.decode(encoded.tokens[encoded.loss_from :]) == "List 0 rivers<end>"
    pair.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(RequestError, match="expected a chat template that takes a user's message, got no system turn"):
        request_tokens(pair.tokenizer, "river")
