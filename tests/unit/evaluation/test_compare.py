"""Comparisons: every entry by the same rule, finished cells kept, failed ones reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.small_sets import ARC
from support.tiny import build_model, save_model

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import InterruptedRun, LensError, RequestError
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.baselines import methods as baselines
from lcc_lens.evaluation.comparison import runner as module
from lcc_lens.evaluation.comparison.compare import compare, read_part, summary
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.results_file import read_comparison
from lcc_lens.evaluation.lm_eval_tasks import evaluate_task
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration import refitted as refitted_module
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.validation import validation_loss, validation_terms

SMALL = {
    "examples": 24, "validation": 4, "responses": 4, "blocks": 2, "block_length": 16, "scan_examples": 24,
    "batch_size": 8, "low_rank": 2, "lora_rank": 2, "refit_samples": 2, "max_length": 64, "speed_rounds": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(question_file: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    lines = [
        json.dumps({"prompt": f"Say number {i} twice:", "response": f" number {i}, number {i}"}) for i in range(120)
    ]
    data = tmp_path_factory.mktemp("data") / "many.jsonl"
    data.write_text("\n".join(lines))
    return CompareConfig(data=str(data), texts=(str(text_file),), **SMALL)


@pytest.mark.parametrize(("text", "expected"), [
    ("lcc", ("lcc", False, None, 0.0)), ("refit", (None, True, None, 0.0)),
    ("refit+low-rank+lcc:distillation", ("low-rank+lcc", True, None, 1.0)),
    ("lora@dense", ("lora", False, "dense", 0.0)), ("refit+perp-lora", ("perp-lora", True, None, 0.0)),
    ("lcc+mlp-lcc@shuffled", ("lcc+mlp-lcc", False, "shuffled", 0.0)),
])  # fmt: skip
def test_entries_are_read(text: str, expected: tuple) -> None:
    entry = Entry.parse(text)
    assert (entry.method, entry.on_refit, entry.control, entry.objective.distillation) == expected
    assert (entry.lr, Entry.parse(f"{text}=3e-3").lr) == (None, 0.003)
    assert [Entry.parse(text + end).tunes_lr for end in ("", "=3e-3", "=tuned")] == [False, False, True]


@pytest.mark.parametrize(("text", "message"), [
    ("magic", "expected a method"), ("lcc@nothing", "expected a control"), ("lcc:joy", "expected an objective"),
    ("refit@dense", "expected a control of a method that trains"),
    ("refit+lcc@dense", "that trains on the pruned model"),
    ("lcc=fast", "expected a learning rate or 'tuned' after =, got 'fast'"),
    ("lcc=nan", "expected lr in 'lcc=nan' above 0 and at most 1000, got nan"), ("lcc=1e308", "and at most 1000"),
    ("lcc:1e308*response+1e308*heads", "expected an objective"),
    ("norms@random-heads", "expected a method that acts on heads"), ("lora@random-heads", "that acts on heads"),
    ("mlp-lcc@random-heads", "expected a method that acts on heads"), ("flap+lcc", "expected a method"),
])  # fmt: skip
def test_wrong_entries_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Entry.parse(text)


def test_cells_are_kept_and_failures_reported(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, new = ["lcc", "lora", "low-rank", "lcc@dense", "lcc@shuffled"], []

    def broken(*args, **kwargs):
        raise LensError("no adapters today")

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "adapters", broken)
        found = compare(
            dense_dir, pruned_dir, tmp_path, entries, seeds=2, config=config, on_cell=lambda *cell: new.append(cell[0])
        )
    assert len(new) == 10
    assert found["cells"]["lora | 0"] == {"error": "no adapters today"}
    kept = read_json(tmp_path / "comparison.json")
    assert {name: value for name, value in kept.items() if name != "content_sha256"} == found
    new.clear()
    timed = dataclasses.replace(config, speed_rounds=2)
    again = compare(
        dense_dir, pruned_dir, tmp_path, entries, seeds=2, config=timed, on_cell=lambda *cell: new.append(cell[0])
    )
    assert new == ["lora | 0", "lora | 1"]
    assert again["cells"]["lcc | 1"] == found["cells"]["lcc | 1"]
    first, second = (found["cells"][f"low-rank | {seed}"] for seed in (0, 1))
    assert first["response_loss"] != second["response_loss"]
    assert first["n_trained"] > 0
    assert again["bare"]["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    rows = {row["entry"]: row for row in summary(again)}
    assert list(rows) == entries
    assert rows["lcc"]["perplexity"] == pytest.approx(
        sum(found["cells"][f"lcc | {seed}"]["perplexity"] for seed in (0, 1)) / 2
    )
    assert rows["lcc@dense"]["recovered"] is None
    low, high = rows["low-rank"]["recovered_interval"]
    assert low - 1e-9 <= rows["low-rank"]["recovered"] <= high + 1e-9  # few blocks: an end may be the share
    assert (rows["low-rank"]["n_added"], rows["low-rank"]["zeros_kept"]) == (0, 1.0)
    assert rows["lora"]["n_added"] == rows["lora"]["n_trained"] > 0
    assert rows["lora"]["zeros_kept"] < 1
    assert set(again["inference"]) == {"pruned", "biases", "lora"}
    assert rows["low-rank"]["inference"]["decode_ratio"]["median"] == 1.0
    assert rows["lora"]["inference"] == again["inference"]["lora"] != again["inference"]["biases"]
    blocks = again["bare"]["pruned"]["texts"][Path(config.texts[0]).stem]["losses"]
    assert len(blocks) == config.blocks
    assert again["bare"]["pruned"]["log_perplexity"] == pytest.approx(sum(blocks) / len(blocks))
    assert summary(found)[1]["failed"] == 2
    with pytest.raises(RequestError, match="expected a comparison of the same models and settings"):
        compare(dense_dir, dense_dir, tmp_path, entries, config=config)


@pytest.fixture
def scored(config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareConfig:
    """The same with a zero-shot task."""
    folder = tmp_path / "sets" / "arc_easy"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ARC))
    monkeypatch.setenv("LCC_LENS_DATA", str(folder.parent))
    return dataclasses.replace(config, tasks=("arc_easy",), limit=5)


def test_tasks_are_scored_under_the_injection(
    dense_dir: Path, pruned_dir: Path, scored: CompareConfig, tmp_path: Path
) -> None:
    """Zero-shot accuracies come with every item, and with a paired interval against the pruned model."""
    found = compare(dense_dir, pruned_dir, tmp_path, ["masked=1e-1", "lofit"], seeds=1, config=scored)
    row = summary(found)[0]["tasks"]["arc_easy"]
    items = [
        model["tasks"]["arc_easy"]["items"] for model in (found["bare"]["pruned"], found["cells"]["masked=1e-1 | 0"])
    ]
    assert len(items[0]) == len(items[1]) == 5
    assert items[0] != items[1]
    plain = load_plain(pruned_dir)
    assert evaluate_task(plain, load_tokenizer(pruned_dir), "arc_easy", with_items=True)["items"] == items[0]
    gain = (items[1].count("1") - items[0].count("1")) / 5
    assert row["acc"] == pytest.approx(items[1].count("1") / 5)
    assert row["gain_interval"][0] <= gain <= row["gain_interval"][1]
    assert found["cells"]["lofit | 0"]["n_trained"] == 3 * 6  # a fifth of the 15 heads, an offset of d_head each


@pytest.mark.slow
def test_lofit_chooses_its_heads_once(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, scored: CompareConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its first stage is shared by all rates of the second, and nothing of either is trained again."""
    first = compare(dense_dir, pruned_dir, tmp_path, ["lofit"], seeds=1, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "lofit_heads", None)
        compare(dense_dir, pruned_dir, tmp_path, ["lofit=1e-1"], seeds=1, config=config)
        patch.setattr(module, "train", None)
        grown = compare(dense_dir, pruned_dir, tmp_path, ["lofit"], seeds=1, config=scored)
    assert {**grown["cells"]["lofit | 0"], "tasks": {}} == first["cells"]["lofit | 0"]
    heads = json.loads((tmp_path / "trained" / "lofit_0.json").read_text())
    assert len(heads["heads"]) == 3
    assert 0 < heads["seconds"] <= first["cells"]["lofit | 0"]["training_seconds"] + 0.1
    for number, damaged in enumerate(("{", "[1]", json.dumps({**heads, "request": "another training's"}))):
        (tmp_path / "trained" / "lofit_0.json").write_text(damaged)
        compare(dense_dir, pruned_dir, tmp_path, [f"lofit={number + 2}e-2"], seeds=1, config=config)
        assert json.loads((tmp_path / "trained" / "lofit_0.json").read_text())["heads"] == heads["heads"]


@pytest.mark.slow
def test_tasks_asked_later_are_measured_of_what_was_trained(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, scored: CompareConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    entries = ["masked=1e-1", "mean-shift"]
    whole = compare(dense_dir, pruned_dir, tmp_path / "whole", entries, seeds=1, config=scored)
    first = compare(dense_dir, pruned_dir, tmp_path / "run", entries, seeds=2, config=config)
    assert first["bare"]["dense"]["tasks"] == {}
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", None)  # nothing trains again
        grown = compare(dense_dir, pruned_dir, tmp_path / "run", entries, seeds=1, config=scored)
    for name in ("masked=1e-1 | 0", "mean-shift | 0"):
        assert grown["cells"][name]["tasks"] == whole["cells"][name]["tasks"]
        assert {**grown["cells"][name], "tasks": {}} == first["cells"][name]
    assert grown["bare"]["pruned"]["tasks"] == whole["bare"]["pruned"]["tasks"]
    assert summary(grown)[0]["tasks"] == summary(whole)[0]["tasks"]
    again = compare(dense_dir, pruned_dir, tmp_path / "run", entries, seeds=2, config=config)
    assert again["cells"] == grown["cells"]
    other = dataclasses.replace(scored, limit=4)
    with pytest.raises(RequestError, match="expected a comparison of the same models and settings"):
        compare(dense_dir, pruned_dir, tmp_path / "run", entries, config=other)


@pytest.mark.slow
def test_tasks_asked_of_new_lines_are_measured_of_the_bare_models_too(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, scored: CompareConfig, tmp_path: Path
) -> None:
    compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=config)
    found = compare(dense_dir, pruned_dir, tmp_path, ["gain"], seeds=1, config=scored)
    old, new = summary(found)
    assert (old["tasks"], old["entry"]) == ({}, "norms")
    assert new["tasks"]["arc_easy"]["n"] == len(found["bare"]["dense"]["tasks"]["arc_easy"]["items"]) == 5


@pytest.mark.slow
def test_a_lost_training_is_measured_whole_again(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, scored: CompareConfig, tmp_path: Path
) -> None:
    """Accuracies of one training never stand beside the losses of another."""
    compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=config)
    path = tmp_path / "comparison.json"
    found = read_json(path)
    found["cells"]["norms | 0"]["kl"] = 123.0
    del found["content_sha256"]
    path.write_text(json.dumps(found))
    (tmp_path / "trained" / "norms_0.safetensors").unlink()
    again = compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=scored)["cells"]["norms | 0"]
    assert again["kl"] < 100
    assert again["tasks"]["arc_easy"]["n"] == 5


def test_a_task_that_is_trained_on_cannot_be_added(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path
) -> None:
    compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=config)
    trained_on = dataclasses.replace(config, tasks=(config.data,))
    with pytest.raises(RequestError, match="expected a comparison of the same models and settings"):
        compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=trained_on)


@pytest.mark.slow
def test_numbers_of_another_training_are_not_taken(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is lost or of other settings costs a training, not a wrong figure."""
    first = compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=config)
    longer = dataclasses.replace(config, epochs=2)
    other = compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=longer, out=tmp_path / "other.json")
    assert other["cells"]["norms | 0"]["steps"] == 2 * first["cells"]["norms | 0"]["steps"]
    assert other["cells"]["norms | 0"]["kl"] != first["cells"]["norms | 0"]["kl"]
    kept = tmp_path / "trained" / "norms_0.safetensors"
    kept.write_bytes(kept.read_bytes()[:-100])
    again = compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=longer, out=tmp_path / "again.json")
    assert again["cells"]["norms | 0"]["kl"] == other["cells"]["norms | 0"]["kl"]
    monkeypatch.setattr(module, "learning_rates", lambda injection, lr: [0.5])  # the method's own rate has changed
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=longer, out=tmp_path / "last.json")


@pytest.mark.slow
def test_a_tuned_rate_is_the_range_test_s_best_and_kept(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = compare(dense_dir, pruned_dir, tmp_path, ["norms", "norms=tuned"], seeds=1, config=config)["cells"]
    found, rate = cells["norms=tuned | 0"], cells["norms | 0"]["learning_rates"][0]
    by_rate = {float(tried): loss for tried, loss in found["lr_range"].items()}
    assert sorted(by_rate) == pytest.approx([rate * factor for factor in (0.1, 0.3, 1.0, 3.0, 10.0)])
    assert found["learning_rates"] == [min(by_rate, key=by_rate.__getitem__)]
    assert found["learning_rates"] != [rate]  # what is trained here is so small that another rate is better
    assert found["kl"] != cells["norms | 0"]["kl"]
    assert found["steps"] == cells["norms | 0"]["steps"]
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("trained"))
    again = compare(dense_dir, pruned_dir, tmp_path, ["norms=tuned"], seeds=1, config=config, out=tmp_path / "b.json")
    assert again["cells"]["norms=tuned | 0"] == found


@pytest.mark.slow
def test_closed_forms_and_cheap_baselines(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path
) -> None:
    """Each is built, measured and costed; the scan is made anew once more of it is needed."""
    config = dataclasses.replace(config, low_rank=5, speed_rounds=2)
    entries = ["mean-shift", "perp", "flap", "perp-lora", "mlp-lcc", "mean-shift-sequential-mlp", "eora"]
    found = compare(dense_dir, pruned_dir, tmp_path, entries, seeds=1, config=config)
    cells = {name.removesuffix(" | 0"): cell for name, cell in found["cells"].items()}
    assert not [cell["error"] for cell in cells.values() if "error" in cell]
    scanned = Scan.load(tmp_path / "scan")
    assert cells["mean-shift"]["mendable_share"] == pytest.approx(scanned.mendable_share())
    assert 0 < cells["mean-shift"]["mendable_share"] < 1
    assert scanned.others["mlp"].singular_values is not None
    d_model, d_mlp, n_layers, width, n_in = 40, 44, 3, 5 * 6, 6
    norms = (2 * n_layers + 1) * d_model
    assert cells["perp"]["n_trained"] == norms + n_layers * (width + d_mlp)
    maps = [(d_model, width), (d_model, n_in), (d_model, n_in), (width, d_model), *[(d_model, d_mlp)] * 3]
    assert cells["perp-lora"]["n_trained"] == n_layers * sum(2 * (a + b) for a, b in maps)  # LoRA's rank, 2
    o_biases, mlp_biases = n_layers * (d_model + width + 2 * n_in), n_layers * (d_model + 2 * d_mlp)
    for name, added in {
        "mean-shift": o_biases, "mlp-lcc": mlp_biases, "perp-lora": 0, "perp": o_biases + mlp_biases,
        "flap": o_biases + mlp_biases, "mean-shift-sequential-mlp": o_biases + mlp_biases,
    }.items():  # fmt: skip
        assert (cells[name]["n_added"], cells[name]["zeros_kept"]) == (added, 1.0)
        assert cells[name]["kl"] != found["bare"]["pruned"]["kl"]
    assert cells["flap"]["n_trained"] == cells["mean-shift-sequential-mlp"]["n_trained"] == 0
    assert cells["flap"]["steps"] == 0
    assert set(found["inference"]) == {"pruned", "biases", "mlp biases", "all biases", "eora"}


@pytest.mark.slow
def test_refit_and_what_is_trained_upon_it(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, refit_data=config.texts)
    real = refitted_module.refit

    def with_short_sequences(*args, **kwargs):
        return real(*args, **{**kwargs, "seq_len": 16})

    monkeypatch.setattr(refitted_module, "refit", with_short_sequences)
    found = compare(
        dense_dir, pruned_dir, tmp_path, ["refit", "refit+low-rank:distillation"], seeds=1, config=config
    )  # fmt: skip
    bare, refitted, both = found["bare"]["pruned"], *found["cells"].values()
    assert refitted["kl"] != bare["kl"]
    assert both["kl"] < refitted["kl"]
    assert "n_trained" not in refitted


def test_an_interruption_ends_the_comparison_and_keeps_cells(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is not a failed cell."""
    cells = {}
    real = module.train

    def interrupted(model, injection, *args, **kwargs):
        if cells:
            raise InterruptedRun("stopped after step 1 of 3")
        yield from real(model, injection, *args, **kwargs)

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(InterruptedRun, match=r"stopped in norms \| 0; finished runs are in .*comparison\.json"):
        compare(
            dense_dir, pruned_dir, tmp_path, ["low-rank", "norms", "gain"], seeds=1, config=config,
            on_cell=cells.__setitem__,
        )  # fmt: skip
    kept = read_json(tmp_path / "comparison.json")
    assert list(cells) == list(kept["cells"]) == ["low-rank | 0"]
    assert [(row["entry"], row["seeds"]) for row in kept["summary"]] == [("low-rank", 1)]


@pytest.mark.slow
def test_a_folder_of_another_pair_is_refused(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path
) -> None:
    (tmp_path / "refit").mkdir()
    (tmp_path / "refit" / "refit.json").write_text(json.dumps({"dense_sha256": "a", "pruned_sha256": "b"}))
    with pytest.raises(RequestError, match=r"expected a refit of this pair in .*refit, got another's"):
        compare(dense_dir, pruned_dir, tmp_path, ["norms"], config=config)
    other = compare(dense_dir, dense_dir, tmp_path / "other", ["lcc"], seeds=1, config=config)
    assert "perplexity" in other["cells"]["lcc | 0"]
    found = compare(
        dense_dir, pruned_dir, tmp_path / "other", ["lcc"], seeds=1, config=config, out=tmp_path / "file.json"
    )
    assert found["cells"]["lcc | 0"]["error"].startswith("expected the pruned model of the scan")


def test_measures_agree_with_the_losses_one_by_one(pair, question_file: Path) -> None:
    sequences = encode(load_data(str(question_file)), pair.tokenizer)
    both = validation_terms(pair.pruned, None, sequences, 1024, Objective(1.0, 1.0), pair.dense)
    assert both["response"] == pytest.approx(validation_loss(pair.pruned, None, sequences))
    kl = validation_loss(pair.pruned, None, sequences, 1024, Objective(0.0, 1.0), pair.dense)
    assert both["distillation"] == pytest.approx(kl)
    weighted = validation_loss(pair.pruned, None, sequences, 1024, Objective(0.25, 0.5), pair.dense)
    assert weighted == pytest.approx(0.25 * both["response"] + 0.5 * kl)


@pytest.mark.slow
def test_dense_control_of_a_sliced_model_is_reported(text_file: Path, config: CompareConfig, tmp_path: Path) -> None:
    dense_dir = save_model(build_model(num_key_value_heads=5), tmp_path / "dense")
    prune(dense_dir, tmp_path / "sliced", method="slimgpt", sparsity=0.5, sliced=True, calibration=str(text_file),
          n_samples=4, seq_len=32)  # fmt: skip
    found = compare(dense_dir, tmp_path / "sliced", tmp_path / "run", ["lcc@dense"], seeds=1, config=config)
    assert "expected models with the same heads for lcc@dense" in found["cells"]["lcc@dense | 0"]["error"]


@pytest.mark.slow
def test_random_heads_are_others_and_want_a_choice(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="expected a share of heads below 1 for random heads, got 1; lower it"):
        compare(dense_dir, pruned_dir, tmp_path, ["lcc@random-heads"], config=config)
    chosen, real = [], MethodSpec.build

    def noting(spec, inputs):
        chosen.append(inputs.heads)
        return real(spec, inputs)

    monkeypatch.setattr(MethodSpec, "build", noting)
    few = dataclasses.replace(config, heads=0.2)
    compare(dense_dir, pruned_dir, tmp_path, ["lcc", "lcc@random-heads"], seeds=2, config=few)
    first, random_0, again, random_1 = chosen
    assert first == again
    assert random_0 != random_1
    assert first not in (random_0, random_1)


@pytest.mark.slow
def test_processes_share_a_comparison(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, done = ["norms", "refit"], []
    config = dataclasses.replace(config, refit_data=config.texts, examples=8, speed_rounds=1)
    measure, refit = module.Runner.measure_baselines, refitted_module.refit

    def noted(*args):
        done.append("bare")
        return measure(*args)

    def short(*args, **kwargs):
        done.append("refit")
        return refit(*args, **{**kwargs, "seq_len": 16})

    def timed(self, entries, found):
        done.append(f"timed behind {len(found['cells'])}")

    monkeypatch.setattr(module.Runner, "measure_baselines", noted)
    monkeypatch.setattr(module.Runner, "time", timed)
    monkeypatch.setattr(refitted_module, "refit", short)
    monkeypatch.setattr(refitted_module, "calibration_length", lambda model, seq_len: 16)
    settings = {"seeds": 2, "config": config}
    whole = compare(dense_dir, pruned_dir, tmp_path / "whole", entries, **settings)
    names: dict[int, list[str]] = {0: [], 1: []}

    def second(name: str, cell: dict) -> None:
        """Another process computes its whole part while the first is at work."""
        names[0].append(name)
        if len(names[0]) == 1:
            compare(
                dense_dir, pruned_dir, tmp_path / "shared", entries, part=(1, 2), **settings,
                on_cell=lambda name, cell: names[1].append(name),
            )  # fmt: skip

    found = compare(dense_dir, pruned_dir, tmp_path / "shared", entries, part=(0, 2), on_cell=second, **settings)
    assert names == {0: ["norms | 0", "norms | 1"], 1: ["refit | 0", "refit | 1"]}
    assert list(found["cells"]) == list(whole["cells"]) == [f"{entry} | {seed}" for seed in (0, 1) for entry in entries]
    for name, cell in whole["cells"].items():
        assert {key: found["cells"][name][key] for key in ("perplexity", "kl", "response_loss", "texts")} == {
            key: cell[key] for key in ("perplexity", "kl", "response_loss", "texts")
        }
    assert found["summary"][0]["seeds"] == 2
    assert found["bare"] == whole["bare"]
    assert sorted(done) == 2 * ["bare"] + 2 * ["refit"] + 2 * ["timed behind 4"]  # once for each folder
    assert read_comparison(tmp_path / "shared" / "comparison.json") == found
    assert "refit_seconds" in found


@pytest.mark.parametrize(("text", "expected"), [("1/1", (0, 1)), ("3/8", (2, 8)), ("8/8", (7, 8))])
def test_parts_are_read(text: str, expected: tuple[int, int]) -> None:
    assert read_part(text) == expected


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/", "-1/2", f"1/{'9' * 5000}"])
def test_wrong_parts_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=f"expected a part i/n with i of 1 to n, got '{text}'"):
        read_part(text)


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_parts_that_are_not_there_are_refused(dense_dir: Path, pruned_dir: Path, tmp_path: Path, part: tuple) -> None:
    with pytest.raises(RequestError, match=r"expected a part \(i, n\) with i of 0 to n - 1, got"):
        compare(dense_dir, pruned_dir, tmp_path, ["lcc"], part=part)


@pytest.mark.slow
def test_a_control_on_the_dense_model_is_held_to_the_dense_model_as_it_was(
    dense_dir: Path, pruned_dir: Path, config: CompareConfig, tmp_path: Path
) -> None:
    """What changes the dense model's weights changes no teacher: the divergence counts, and distillation is at rest."""
    compare(dense_dir, pruned_dir, tmp_path, ["norms"], seeds=1, config=config)  # the bare models, by a process before
    entries = ["lora@dense=1e-2", "low-rank@dense=1e-2", "low-rank@dense:distillation=1e-2"]
    found = compare(dense_dir, pruned_dir, tmp_path, entries, seeds=1, config=config)
    bare = found["bare"]["dense"]
    for entry in entries[:2]:
        cell = found["cells"][f"{entry} | 0"]
        assert cell["response_loss"] < bare["response_loss"] - 0.01
        assert cell["kl"] > 0.01
    resting = found["cells"][f"{entries[2]} | 0"]
    assert resting["kl"] == pytest.approx(0, abs=1e-6)
    assert resting["perplexity"] == pytest.approx(bare["perplexity"], rel=1e-5)
