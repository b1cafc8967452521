"""Architectures whose shapes or arithmetic are unusual: served as they compute, or refused when they are loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.conformance import save_family
from support.restorations import restoration_of
from support.tiny import build_model, save_model

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.doctor import examine
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.anatomy import find_anatomies
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.hooked.activations import site_widths
from lcc_lens.models.hooked.direct_path import Unembedding
from lcc_lens.models.hooked.fused_attention import default_attention_gap
from lcc_lens.models.loading.hooked import load_hooked


def test_mixtures_have_no_mlp_site_whatever_their_width(tmp_path: Path) -> None:
    model = load_hooked(save_family("olmoe", tmp_path / "olmoe")).model
    assert set(site_widths(model)) == {"z", "resid"}
    assert "mlp" in site_widths(load_hooked(save_family("qwen3", tmp_path / "qwen3")).model)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4 (text), two sizes of heads"])
def test_heads_of_other_sizes_are_refused_at_once_and_doctor_says_so(family: str, tmp_path: Path) -> None:
    directory = save_family(family, tmp_path / "model")
    with pytest.raises(LensError, match="this architecture is not supported"):
        load_hooked(directory)
    found = {finding.name: finding for finding in examine(directory).model}
    assert found["loads under hooks"].verdict == "failed"
    assert "scan" not in found


def test_a_model_that_transformers_cannot_run_is_said_to_be_one(tmp_path: Path) -> None:
    config = hf.PersimmonConfig(
        vocab_size=257, hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
    )  # its rotary part would be five wide
    directory = save_model(hf.PersimmonForCausalLM(config), tmp_path / "model")
    with pytest.raises(LensError, match="to run in plain transformers, got an error"):
        load_hooked(directory)
    assert not examine(directory).is_sound


def test_norms_of_single_heads_let_heads_go_however_few_they_are(tmp_path: Path) -> None:
    directory = save_family("qwen3, one key-value head", tmp_path / "one")
    anatomies = find_anatomies(directory, find_matrices(Checkpoint(directory)))
    assert [anatomy.attention.n_groups for anatomy in anatomies] == [1, 1, 1]
    assert anatomies[0].mlp.n_groups == 44


def test_zero_row_of_padding_is_no_probe(tmp_path: Path) -> None:
    model = build_model(pad_token_id=1)
    model.model.embed_tokens.weight.data[::3] = 0  # padding, and tokens that nobody trained
    unembedding = Unembedding.of(load_hooked(save_model(model, tmp_path / "model")).model)
    assert torch.equal(unembedding.weight.cpu().float(), model.lm_head.weight)


def test_attention_that_differs_from_the_default_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save_family("falcon, ALiBi", tmp_path / "falcon")
    with caplog.at_level(logging.WARNING, "lcc_lens"):
        model = load_hooked(directory).model
    gap = default_attention_gap(model)
    assert gap > 1e-3
    assert any("transformers' default attention gives" in message for message in caplog.messages)
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        default, stepwise = (
            hf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name)(tokens).logits
            for name in (None, "eager")
        )
    assert float((default - stepwise).abs().max()) > 1e-3
    said = {finding.name: finding.found for finding in examine(directory).model}["attention under hooks"]
    assert "default attention gives other logits" in said
    assert default_attention_gap(load_hooked(save_family("qwen3", tmp_path / "qwen3")).model) == 0.0


def test_rounding_of_half_precision_is_no_other_attention(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        for (
            layer
        ) in model.model.layers:  # as in trained models, where a change of one rounding grows from layer to layer
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.o_proj.weight *= 8
    hooked = load_hooked(save_model(model, tmp_path / "model"), dtype=torch.bfloat16).model
    assert default_attention_gap(hooked) == 0.0
    different = load_hooked(save_family("falcon, ALiBi", tmp_path / "falcon"), dtype=torch.bfloat16).model
    assert default_attention_gap(different) > 1e-3


def test_retyped_export_keeps_the_entries_that_older_versions_read(tmp_path: Path) -> None:
    directory = save_family("mistral", tmp_path / "mistral")
    config = read_json(directory / "config.json")
    rope = config.pop("rope_parameters")
    write_json(directory / "config.json", {**config, "rope_theta": 500.0, "torch_dtype": "float32"})
    assert rope["rope_theta"] != 500.0
    export(restoration_of(directory), directory, tmp_path / "out")
    written = read_json(tmp_path / "out" / "config.json")
    assert written["model_type"] == "llama"
    assert (written["rope_theta"], written["rope_parameters"]["rope_theta"]) == (500.0, 500.0)
    assert written["torch_dtype"] == "float32"


def test_a_configuration_does_not_choose_the_kind_of_output(tmp_path: Path) -> None:
    path = save_model(build_model(), tmp_path / "model")
    write_json(path / "config.json", {**read_json(path / "config.json"), "return_dict": False})
    assert examine(path).is_sound


def test_doctor_reads_every_site_that_a_scan_reads(dense_dir: Path) -> None:
    found = {finding.name: finding for finding in examine(dense_dir).model}
    assert found["scan"].found == "z (6 wide), mlp (44 wide), resid (40 wide)"
