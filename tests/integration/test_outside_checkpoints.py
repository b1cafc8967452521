"""Pruned models that this package did not make: sharded, bfloat16, tied embeddings, patterns found in the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import build_model, save_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lcc_lens.analysis.scan.scan import scan
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.frontends.cli.main import run as main_of
from lcc_lens.models.pair import load_pair
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model, and a copy that someone else pruned to 2:4 by hand, in bfloat16, in shards, embeddings tied."""
    root = tmp_path_factory.mktemp("outside")
    dense = save_model(build_model(tie_word_embeddings=True, head_dim=8), root / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                groups = parameter.reshape(-1, 4)
                groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
    model.to(torch.bfloat16).save_pretrained(root / "pruned", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(root / "pruned")
    return dense, root / "pruned"


def test_it_is_what_it_claims(outside: tuple[Path, Path]) -> None:
    _, pruned = outside
    assert len(list(pruned.glob("*.safetensors"))) > 2
    assert not (pruned / "pruning.json").exists()


def test_scan_restore_and_export_take_it(outside: tuple[Path, Path], question_file: Path, tmp_path: Path) -> None:
    dense, pruned = outside
    pair = load_pair(dense, pruned)
    data = load_data(str(question_file))
    found = scan(pair, data)
    assert (found.record.pattern, found.record.sparsity) == ("2:4", 0.5)
    assert (found.record.dense_heads, found.record.removed_heads) == ((), ())
    heads = found.select("mse", share=0.5)
    restoration = restore(pair, found, heads, data, config=TrainConfig(batch_size=16), run=tmp_path / "run")
    report = export(restoration, pruned, tmp_path / "out")
    assert report.logit_effect > 0.05
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (pruned, tmp_path / "out"))
    assert after["model.layers.0.self_attn.o_proj.bias"].dtype == torch.bfloat16
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_report_finds_its_pattern(outside: tuple[Path, Path], tmp_path: Path) -> None:
    _, pruned = outside
    assert main_of(["report", str(pruned), "--no-latency", "--out", str(tmp_path / "report.json"), "--quiet"]) == 0
    entry = read_json(tmp_path / "report.json")["models"]["pruned"]
    assert (entry["pattern"], entry["sparsity"]) == ("2:4", 0.5)


def test_heads_that_someone_else_removed_are_found_in_the_weights(question_file: Path, tmp_path: Path) -> None:
    dense = save_model(build_model(), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * 6 : 3 * 6] = 0
        model.model.layers[2].self_attn.o_proj.weight[:, :6] = 0
    pruned = save_model(model, tmp_path / "pruned")
    found = scan(load_pair(dense, pruned), load_data(str(question_file)))
    assert found.record.removed_heads == ((), (2,), (0,))
    assert len(found.select("mse", share=1.0)) == 13
    assert found.table().query("is_removed")[["layer", "head"]].to_numpy().tolist() == [[1, 2], [2, 0]]
