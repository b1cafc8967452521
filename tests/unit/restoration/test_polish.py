"""Polish: all remaining weights and norm gains follow the dense model after a refit; zeros stay, teachers run once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.data import panel
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.restoration import jobs
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.jobs import restore_models
from lcc_lens.restoration.record import RefitOrigin
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.settings import RefitRequest, RestoreSettings, with_preset
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training_data import training_sequences

WHOLE_PANEL = panel.PANEL
SETTINGS = RestoreSettings(max_length=32, limit=24)


@pytest.fixture
def pool(text_file: Path, tmp_path: Path) -> Data:
    (tmp_path / "other.txt").write_text("\n\n".join(f"Verse {i}: {'la ' * (i % 7)}and {i} more." for i in range(80)))
    return load_data(f"{text_file}+{tmp_path / 'other.txt'}", role="train")


@pytest.fixture
def other(text_file: Path) -> Data:
    return load_data(str(text_file), role="held-out")


def polish(dense: Path, pruned: Path, run: Path, pool: Data, text: Path, **options):
    request = RefitRequest([load_data(str(text), role="calibration")], 4, 16)
    return restore_models(
        dense, pruned, run, pool, method="polish", settings=SETTINGS, refitting=request, **options
    )  # fmt: skip


def test_zeros_stay_bit_for_bit_and_only_the_layers_change(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, pool: Data, other: Data
) -> None:
    config = TrainConfig(batch_size=4, lr=3e-3, validate_every=3, objective=Objective.parse("3*distillation+lm"))
    run = tmp_path / "run"
    restoration, _ = polish(dense_dir, pruned_dir, run, pool, text_file, config=config, validation=other)
    losses = restoration.record.losses
    assert losses["restored"] < losses["refitted"]
    record, pruned = restoration.record, Checkpoint(pruned_dir).sha256
    assert (record.method, record.preset) == ("all-weights", "polish")
    assert record.refit == RefitOrigin(str(pruned_dir), pruned, str(text_file), 4)
    assert Restoration.load(run).record == record
    export(restoration, run / "refit", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("# pruned, restored", "| polish (all-weights) |", "refitted on 4 sequences of", pruned,
                 record.pruned_sha256, "bit-identical to the refitted model"):  # fmt: skip
        assert said in card
    assert compare_zeros(pruned_dir, tmp_path / "out").is_equal
    before, after = (dict(load_plain(path).named_parameters()) for path in (run / "refit", tmp_path / "out"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if ".layers." in name}  # embeddings, head and last norm are as they were
    for name in changed:
        assert torch.equal(before[name] == 0, after[name] == 0), name


def test_masters_are_float32_and_a_preset_brings_its_settings(pair) -> None:
    injection = MethodSpec.parse("all-weights").build(Ingredients(pair.pruned, None, (), pair.output_projections))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    once, twice = (with_preset(TrainConfig(epochs=n, objective=Objective.parse("distillation")),
                               MethodSpec.parse("polish")) for n in (1, 2))  # fmt: skip
    assert (once.lr, once.patience, once.reuse, twice.reuse) == (3e-4, 3, False, True)
    assert (once.examples_per_step, once.steps_per_validation, once.n_steps(9)) == (2, 80, 5)
    assert once.steps_per_checkpoint == 80
    given = TrainConfig(batch_size=5, validate_every=7, checkpoint_every=3, epochs=2)
    named = with_preset(given, MethodSpec.parse("polish"))
    assert (named.examples_per_step, named.steps_per_validation, named.n_steps(11)) == (5, 7, 6)
    assert named.steps_per_checkpoint == 3
    assert with_preset(None, MethodSpec.parse("low-rank")).examples_per_step == 8
    objective = with_preset(None, MethodSpec.parse("polish")).objective
    assert objective.distillation == pytest.approx(3 * objective.text)
    assert objective.response == 0


def test_over_several_epochs_the_dense_model_reads_a_sequence_once(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, pool: Data, other: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    read: list[int] = []
    real = jobs.restore

    def counting(pair, *arguments, **options):
        handle = pair.dense.original_model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(len(kwargs.get("input_ids", args[0] if args else ()))),
            with_kwargs=True,
        )
        restoration = real(pair, *arguments, **options)
        handle.remove()
        return restoration

    monkeypatch.setattr(jobs, "restore", counting)
    counts = []
    for epochs in (2, 3):
        read.clear()
        config = TrainConfig(epochs=epochs, batch_size=4, objective=Objective.parse("3*distillation+lm"), patience=99)
        run = tmp_path / str(epochs)
        polish(dense_dir, pruned_dir, run, pool, text_file, config=config, validation=other)
        counts.append(sum(read))
    assert counts[0] == counts[1] > 24


def test_a_pool_is_validated_on_domains_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "PANEL", WHOLE_PANEL)
    monkeypatch.setattr(panel, "local_splits", lambda name: [] if name == "c4" else ["train"])
    assert panel.available_panel() == ("wikitext", "wikipedia", "howto", "science", "alpaca", "python")
    assert panel.other_domains("mix") == ("science", "alpaca")
    assert panel.other_domains("python+wikipedia") == ("howto", "science", "alpaca")
    assert panel.other_domains("+".join(panel.PANEL)) == panel.available_panel()


def test_without_validation_every_part_gives_some(pair, pool: Data) -> None:
    training, held_out = training_sequences(pair, None, pool, None, 32, 20, None)
    texts = [[pair.tokenizer.decode(s.tokens) for s in part] for part in (training, held_out)]
    for part in texts:
        assert any("Paragraph" in text for text in part)
        assert any("Verse" in text for text in part)


def test_a_pool_leaves_out_what_chooses_the_parameters(pair, pool: Data) -> None:
    verses = replace(pool.parts[1], role="held-out")
    training, _ = training_sequences(pair, None, pool, verses, 32, None, None)
    text = " ".join(pair.tokenizer.decode(sequence.tokens) for sequence in training)
    assert "Paragraph" in text
    assert "Verse" not in text
    with pytest.raises(RequestError, match="expected training data and validation data without a shared sequence"):
        training_sequences(pair, None, pool.parts[1], verses, 32, None, None)


def test_the_refit_of_a_pool_reads_the_mix_unless_other_data_are_named() -> None:
    requests = {name: RefitRequest().completed(MethodSpec.parse(name)) for name in ("polish", "best")}
    assert {name: request.calibration for name, request in requests.items()} == {"polish": "mix", "best": "mix"}
    assert RefitRequest("c4").completed(MethodSpec.parse("polish")).calibration == "c4"


def test_polish_is_not_joined(dense_dir: Path, pruned_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a method that can be joined by \\+, got polish"):
        MethodSpec.parse("polish+lcc")
