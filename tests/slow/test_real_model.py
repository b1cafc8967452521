"""The embedded model from end to end: the figures that the README states, within their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.places import ROOT

from lcc_lens.analysis.scan.scan import scan
from lcc_lens.core.config import compute_dtype
from lcc_lens.core.files import sha256_file
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.demo import DemoConfig, DemoResult, run_demo, texts
from lcc_lens.models.architecture.zeros import compare_zeros, zero_pattern
from lcc_lens.models.hooked.losses import sequence_loss
from lcc_lens.models.loading.gguf import EMBEDDED_SHA256, embedded_model
from lcc_lens.models.loading.hooked import load_hooked, load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune, reconstruct, refit
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.validation import validation_loss

pytestmark = pytest.mark.slow

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, model_cache: Path) -> None:
    monkeypatch.setenv("LCC_LENS_CACHE", str(model_cache))
    monkeypatch.delenv("LCC_LENS_DTYPE", raising=False)


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_demo_restores_a_third_and_its_export_keeps_the_zero_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test: two would each run the demo, in two workers."""
    monkeypatch.delenv("LCC_LENS_DATA", raising=False)
    demo = run_demo(DemoConfig(folder=tmp_path))
    _restores_a_third(demo)
    _export_is_plain(demo)


def _restores_a_third(demo: DemoResult) -> None:
    tasks = {name: model["tasks"] for name, model in demo.results["models"].items()}
    for kind in ("held-out text", "held-out responses"):
        dense, pruned, restored = (tasks[name][kind]["loss"] for name in ("dense", "pruned", "restored"))
        assert dense < restored < pruned
    assert demo.results["share_recovered"]["held-out responses"] >= 0.35
    assert all(tasks[name][task]["n"] >= 40 for name in tasks for task in ("boolq", "arc_easy"))
    assert 500_000 < demo.page.stat().st_size < 15 * 2**20  # all heads and their tokens, in one file


def _export_is_plain(demo: DemoResult) -> None:
    pruned, restored = load_plain(demo.pruned), load_plain(demo.restored)
    after = dict(restored.named_parameters())
    changed = [name for name, weight in pruned.named_parameters() if not torch.equal(weight, after[name])]
    assert changed == []
    linears = [weight for name, weight in pruned.named_parameters() if "_proj.weight" in name]
    assert sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears) == pytest.approx(0.5, abs=1e-3)
    assert sum(name.endswith("o_proj.bias") and bool(weight.any()) for name, weight in after.items()) == 30
    export_report = demo.results["export"]
    assert export_report["logit_effect"] > 0.1
    assert export_report["logit_difference"] < 1e-3


def test_embedded_model_is_converted_once_and_checked(model_cache: Path) -> None:
    first = embedded_model()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    record = read_json(first / "converted.json")
    assert record["gguf_sha256"] == EMBEDDED_SHA256
    assert record["safetensors_sha256"] == sha256_file(first / "model.safetensors")
    assert embedded_model() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    loaded = load_hooked("smollm2")
    assert (loaded.model.cfg.n_layers, loaded.model.cfg.n_heads, loaded.model.cfg.d_head) == (30, 9, 64)
    assert loaded.model.cfg.dtype == compute_dtype(torch.device("cpu"))


def test_damaged_cache_is_converted_again(model_cache: Path) -> None:
    weights = embedded_model() / "model.safetensors"
    good = sha256_file(weights)
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged")
    assert sha256_file(weights) != good
    assert sha256_file(embedded_model() / "model.safetensors") == good


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """Half of the embedded model's weights removed, calibrated on C4."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs a folder of data sets for LCC_LENS_DATA")
    path = tmp_path_factory.mktemp("wanda") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCC_LENS_DATA", str(SHARED_DATA))
        patch.setenv("LCC_LENS_CACHE", str(model_cache))
        prune("smollm2", path, calibration="c4", n_samples=24, seq_len=256)
    return path


def test_alpaca_recovers_lost_response_likelihood(wanda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(SHARED_DATA))
    pair = load_pair("smollm2", wanda)
    found = scan(pair, load_data("alpaca", 32, role="probe"), max_length=256)
    restoration = restore(
        pair, found, found.select("mse", share=1.0), load_data("alpaca", 192, role="train"),
        validation=load_data("alpaca", 32, role="held-out"), config=TrainConfig(batch_size=4, micro_tokens=768),
        max_length=192, run=tmp_path / "run",
    )  # fmt: skip
    losses = restoration.record.losses
    assert losses["dense"] < losses["restored"] < losses["pruned"]
    assert (losses["pruned"] - losses["restored"]) / (losses["pruned"] - losses["dense"]) >= 0.35
    report = export(restoration, wanda, tmp_path / "restored")
    held_out = encode(load_data("alpaca", 32, role="held-out"), load_tokenizer(report.path), max_length=192)
    assert sequence_loss(load_plain(report.path), held_out)["loss"] == pytest.approx(losses["restored"], abs=0.02)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 45


def test_refit_reconstruction_and_masked_low_rank_come_closer_to_the_dense_model(
    wanda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step lowers the divergence from the dense model; the plain export computes the same, zero for zero."""
    monkeypatch.setenv("LCC_LENS_DATA", str(SHARED_DATA))
    refit("smollm2", wanda, tmp_path / "refit", n_samples=6)
    closer = reconstruct("smollm2", tmp_path / "refit", tmp_path / "closer", n_samples=33, seq_len=128, window=10)
    assert all(window["is_kept"] for window in closer["windows"])
    pair = load_pair("smollm2", tmp_path / "closer")
    distilled, following = TrainConfig(objective=Objective.parse("distillation")), Objective.parse("distillation")
    responses = encode(load_data("alpaca", 40, role="held-out"), pair.tokenizer, max_length=192)[16:]
    restoration = restore(
        pair, None, (), load_data("alpaca", 48, role="train"), method="low-rank", config=distilled, max_length=192,
        validation=load_data("alpaca", 16, role="held-out"),
    )  # fmt: skip
    report = export(restoration, tmp_path / "closer", tmp_path / "restored")
    assert compare_zeros(wanda, report.path).is_equal
    assert report.logit_effect > 0.1
    kl = [
        validation_loss(load_hooked(path).model, None, responses, 1024, following, pair.dense)
        for path in (wanda, tmp_path / "refit", tmp_path / "closer", report.path)
    ]
    assert kl[0] > kl[1] > kl[2] > kl[3]


@pytest.fixture(scope="module")
def pruned_by(tmp_path_factory: pytest.TempPathFactory, model_cache: Path):
    """The embedded model under several pruners, with little calibration data from the embedded wheel."""
    root = tmp_path_factory.mktemp("pruned_by")
    requests = {
        "wanda": {"method": "wanda", "pattern": "2:4"},
        "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
        "sliced": {"method": "slimgpt", "sparsity": 0.2, "sliced": True},
        "random": {"method": "slimgpt", "sparsity": 0.2, "sliced": True, "choice": "random"},
    }

    def folder(name: str) -> Path:
        if not (root / name).exists():
            prune("smollm2", root / name, calibration="boolq", n_samples=16, seq_len=256, **requests[name])
        return root / name

    return folder


def loss_of(path: Path) -> float:
    text = encode(texts("held-out"), load_tokenizer(path), max_length=256, limit=16)
    return sequence_loss(load_plain(path), text)["loss"]


def test_compensation_is_worth_what_the_papers_say(pruned_by) -> None:
    dense, wanda, sparsegpt = loss_of(embedded_model()), loss_of(pruned_by("wanda")), loss_of(pruned_by("sparsegpt"))
    assert dense < sparsegpt < wanda
    assert math.exp(sparsegpt - wanda) <= 0.75
    for name in ("wanda", "sparsegpt"):
        zeros = zero_pattern(pruned_by(name))
        assert (zeros.pattern, round(zeros.sparsity, 3)) == ("2:4", 0.5)


def test_a_sliced_model_is_smaller_and_far_better_than_chance(pruned_by) -> None:
    sliced, chance = load_plain(pruned_by("sliced")), load_plain(pruned_by("random"))
    dense = load_plain(embedded_model())
    n_dense, n_sliced, n_chance = (sum(p.numel() for p in model.parameters()) for model in (dense, sliced, chance))
    assert n_sliced < 0.85 * n_dense
    assert n_chance == pytest.approx(n_sliced, rel=0.01)
    assert loss_of(embedded_model()) < loss_of(pruned_by("sliced")) < loss_of(pruned_by("random")) - 1
    assert not any(bool((weight == 0).all(dim=0).any()) for name, weight in sliced.named_parameters() if "proj" in name)
