"""What a run measures before its first step is measured once, also over a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.baselines.lofit import SparseGains
from lcc_lens.restoration import restore as recipe
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.run_folder import RUN_BEGINNING, Beginning
from lcc_lens.restoration.training import loop as training
from lcc_lens.restoration.training import lr_range
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import optimise
from lcc_lens.restoration.training.lr_range import RangeTest, range_test
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.state import TrainingState


def counted(monkeypatch: pytest.MonkeyPatch, module, name: str) -> list[int]:
    calls: list[int] = []
    whole = getattr(module, name)

    def run(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, run)
    return calls


def test_rates_share_one_validation_of_their_start(pair, question_file: Path, monkeypatch) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    injection = MethodSpec.parse("norms").build(Ingredients(pair.pruned, None, (), pair.output_projections))
    config = TrainConfig(batch_size=2, objective=Objective(0.0, 1.0))
    expected = training.validation_loss(pair.pruned, injection, sequences, 1024, config.objective, pair.dense)
    starts, ends = counted(monkeypatch, lr_range, "validation_loss"), counted(monkeypatch, training, "validation_loss")
    found = range_test(
        pair.pruned, injection, sequences, sequences, config, teacher=pair.dense, factors=(0.1, 1.0, 3.0), n_steps=2
    )  # fmt: skip
    assert (len(starts), len(ends)) == (1, 3)
    assert found.start_loss == pytest.approx(expected, rel=1e-5)
    assert len(set(found.losses)) == 3


@pytest.mark.slow
def test_resumed_run_takes_its_beginning_from_the_folder(
    pair, question_file: Path, tmp_path: Path, monkeypatch
) -> None:
    data = load_data(str(question_file))
    config = TrainConfig(batch_size=4, validate_every=2, checkpoint_every=2)
    arguments = {"method": "norms", "config": config, "tune_lr": True, "run": tmp_path}
    whole = restore(pair, None, (), data, **arguments)
    bare, tested = counted(monkeypatch, recipe, "validation_loss"), counted(monkeypatch, recipe, "range_test")
    again = restore(pair, None, (), data, **arguments, resume=True)
    assert (len(bare), len(tested)) == (1, 0)  # the restored model alone
    assert again.record.losses == whole.record.losses
    assert again.record.settings == whole.record.settings
    assert all(torch.equal(tensor, again._tensors()[name]) for name, tensor in whole._tensors().items())
    restore(pair, None, (), data, **arguments)  # from the start: everything is measured anew
    assert (len(bare), len(tested)) == (4, 1)


def test_diverged_rates_are_kept_and_other_requests_are_not_answered(tmp_path: Path) -> None:
    tested = RangeTest((0.1, 1.0), (2.5, math.inf), 10, 3.0)
    assert tested.by_rate == {"0.1": 2.5, "1.0": None}
    beginning = Beginning("this request", {"dense": 1.0, "pruned": 2.0}, tested)
    from lcc_lens.core.files import write_json

    write_json(tmp_path / RUN_BEGINNING, beginning.values())
    assert Beginning.read(tmp_path, "this request") == beginning
    assert Beginning.read(tmp_path, "another") == Beginning("another")
    assert Beginning.read(tmp_path / "elsewhere", "this request") == Beginning("this request")


@pytest.mark.parametrize("objective", [Objective(), Objective(1.0, 1.0, heads=1.0, text=1.0)])
def test_accumulated_gradients_are_the_unsplit_batchs(pair, found, question_file: Path, objective) -> None:
    """Examples differ in length, so a mean of the parts' means would be another gradient; the penalty counts once."""
    sequences = encode(load_data(str(question_file)), pair.tokenizer)[:7]
    gradients = []
    for micro_tokens in (20, 100_000):
        given = Ingredients(pair.pruned, found.components, found.select("mse", share=1.0), pair.output_projections)
        injection = SparseGains(MethodSpec.parse("gain").build(given).changes(), l1=1e-2)
        with torch.no_grad():
            for number in injection.parameters():
                number += 0.05
        config = TrainConfig(batch_size=7, micro_tokens=micro_tokens, objective=objective)
        state = TrainingState(injection, config, n_sequences=7, identity="")
        loss, _ = optimise(pair.pruned, injection, state, sequences, pair.dense)
        gradients.append((loss, [number.grad for number in injection.parameters()]))
    (split_loss, split), (loss, whole) = gradients
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(split, whole, strict=True))
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in whole)
