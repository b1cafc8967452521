"""The demonstration on a large model runs at a small size, and the tables of docs/scale.md follow from shapes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.places import ROOT

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.scan.sums import running_sums
from lcc_lens.analysis.statistics import RunningDifferences
from lcc_lens.models.hooked.activations import SITES
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec


def benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:  # they import each other
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return benchmark("memory_table")


@pytest.fixture(scope="module")
def demonstration() -> ModuleType:
    return benchmark("seven_billion")


def tiny(table: ModuleType, model) -> object:
    cfg = model.cfg
    return table.Shape(cfg.n_layers, cfg.d_model, 176, cfg.n_heads, cfg.n_heads, cfg.d_vocab)


def test_made_model_is_a_sharded_llama(demonstration: ModuleType, tmp_path: Path) -> None:
    demonstration.main([str(tmp_path), "--shape", "tiny", "--make"])
    assert len(list((tmp_path / "dense").glob("model-*-of-00004.safetensors"))) == 4
    model = load_plain(tmp_path / "dense", dtype=torch.bfloat16)
    shape = demonstration.SHAPES["tiny"]
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == shape.layer
    assert float(model(torch.arange(1, 20)[None]).logits.std()) > 0.1
    demonstration.write_data(tmp_path)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len({q["question"] for q in questions}) == len(questions) > 400


def test_parameters_are_those_of_the_published_models(table: ModuleType, demonstration: ModuleType) -> None:
    counts = {name: shape.parameters for name, shape in table.MODELS.items()}
    assert counts["SmolLM2 135M"] == 134_515_008
    assert counts["Llama 3.2 1B"] == 1_235_814_400
    assert counts["Llama 7B"] == 6_738_415_616
    assert counts["Llama 3.1 8B"] == 8_030_261_248
    assert counts["Llama 2 13B"] == 13_015_864_320
    assert counts["Llama 3.1 70B"] == 70_553_706_496
    assert counts["Llama 3.1 405B"] == 405_853_388_800
    seven, shown = table.MODELS["Llama 7B"], demonstration.SHAPES["7b"]
    assert all(getattr(seven, name) == size for name, size in vars(shown).items())


def test_sums_take_what_the_table_says(table: ModuleType, demonstration: ModuleType, tmp_path: Path) -> None:
    demonstration.make_model(tmp_path / "dense", demonstration.SHAPES["tiny"])
    model = load_hooked(tmp_path / "dense", dtype=torch.float32).model
    sums = running_sums(model, SITES, ("z",))
    held = sum(t.nbytes for site in sums.values() for t in site.sums.values())
    assert table.statistics_bytes(tiny(table, model)) == held
    wide = RunningDifferences(3, 1, 700, torch.device("cpu"))
    assert table.wide_spectrum_bytes(tiny(table, model), 700) == wide.sums["moment"].nbytes


@pytest.mark.parametrize("method", ["lcc", "low-rank", "all-weights"])
def test_trained_numbers_are_those_of_the_methods(table: ModuleType, pair: Pair, found: Scan, method: str) -> None:
    cfg = pair.pruned.cfg
    heads = found.select("mse", share=0.25)
    given = Ingredients(pair.pruned, found.components, heads, pair.output_projections, low_rank=table.LOW_RANK)
    n_trained = MethodSpec.parse(method).build(given).n_trained
    if method == "lcc":
        shape = table.Shape(cfg.n_layers, cfg.n_heads * cfg.d_head, 44, cfg.n_heads, 1, cfg.d_vocab)
        assert n_trained == table.trained_by_lcc(shape) == len(heads) * 2 * cfg.d_head
    else:
        maps = [m for n, m in pair.pruned.original_model.named_modules() if isinstance(m, torch.nn.Linear)]
        shapes = [m.weight.shape for m in maps if m.weight.shape[0] != cfg.d_vocab]
        norms = 2 * cfg.n_layers * cfg.d_model
        numbers = {
            "low-rank": table.LOW_RANK * sum(map(sum, shapes)),
            "all-weights": sum(map(math.prod, shapes)) + norms,
        }
        assert n_trained == numbers[method]
    smollm2 = table.MODELS["SmolLM2 135M"]  # as trained in the studies
    assert (table.trained_by_low_rank(smollm2), table.trained_by_best(smollm2)) == (4_884_480, 106_202_880)


def test_numbers_are_written_short(table: ModuleType) -> None:
    assert [table.size(n) for n in (13.5e9, 811.7e9, 1.2e12, 996e6, 4.1e6, 9e3)] == [
        "13.5 GB", "812 GB", "1.2 TB", "0.996 GB", "4.1 MB", "9 kB",
    ]  # fmt: skip
    assert [table.duration(s) for s in (0.26, 80, 5400, 6000)] == ["0.26 s", "80 s", "1.5 h", "1.7 h"]


def test_page_holds_the_tables(table: ModuleType) -> None:
    assert table.tables() in table.PAGE.read_text()


@pytest.mark.slow
def test_demonstration_runs_at_the_smallest_size(demonstration: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    demonstration.main([str(tmp_path / "work"), "--shape", "tiny", "--out", str(out)])
    run = json.loads(out.read_text())["runs"]["tiny"]
    assert list(run["steps"]) == ["make", "prune", "scan", "restore", "reconstruct", "export"]
    assert all(0 < step["peak_anonymous_gib"] < step["peak_gib"] < 4 for step in run["steps"].values())
    assert (run["found"]["pattern"], run["found"]["scanned_examples"]) == ("2:4", 32)
    assert run["found"]["losses"]["restored"] != run["found"]["losses"]["pruned"]
    assert load_plain(tmp_path / "work" / "restored").config.attention_bias
