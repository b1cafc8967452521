"""Sidecars: a restoration beside the pruned weights, in plain transformers, for architectures that hold no constant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.conformance import assert_equal, logits_of, save_family
from support.restorations import TOKENS, mlp_alone, restoration_of, with_mlp
from support.tiers import mostly_slow
from support.tiny import D_MODEL, build_model, save_model

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.exporters.sidecar import BUFFER
from lcc_lens.models.hooked.fused_attention import default_attention_gap
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.pair import load_pair
from lcc_lens.restoration.injections.changes import Shift


def test_run_directory_serves_what_no_checkpoint_holds(tmp_path: Path) -> None:
    pruned = save_family("mpt", tmp_path / "pruned")
    restoration = restoration_of(pruned)
    restoration.save(tmp_path / "run")
    model = lcc.load_restored(pruned, tmp_path / "run")
    assert_equal(model, logits_of(load_pair(pruned, pruned), restoration))
    assert type(model).__name__ == "MptForCausalLM"
    assert not any(BUFFER in name for name in model.state_dict())
    out = model.generate(TOKENS[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 8)
    with pytest.raises(RequestError, match="expected a model whose weights hold everything"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changed_weights_and_constants_act_together(family: str, tmp_path: Path) -> None:
    pruned = save_family(family, tmp_path / "pruned")
    pair = load_pair(pruned, pruned)
    name = pair.output_projections[1]
    shape = pair.pruned.original_model.config.hidden_size, int(pair.pruned.cfg.n_heads) * int(pair.pruned.cfg.d_head)
    shift = Shift(0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(3)))
    restoration = dataclasses.replace(restoration_of(pruned), changes=((name, shift),))
    assert_equal(lcc.load_restored(pruned, restoration), logits_of(pair, restoration))


@pytest.mark.parametrize("family", mostly_slow(["mpt", "gpt2", "phi3", "gemma2"], "gpt2", "gemma2"))
def test_constants_at_the_mlp_pass_through_its_changed_weight(family: str, tmp_path: Path) -> None:
    pruned = save_family(family, tmp_path / "pruned")
    pair = load_pair(pruned, pruned)
    name = projection_names(pair.pruned, "mlp")[2]
    both = with_mlp(restoration_of(pruned), pruned)
    width, kernels = both.mlp.values.shape[1], "eager" if default_attention_gap(pair.pruned) else None
    shift = Shift(0.1 * torch.randn(pair.pruned.cfg.d_model, width, generator=torch.Generator().manual_seed(3)))
    for one in (mlp_alone(both), both, dataclasses.replace(both, changes=((name, shift),))):
        assert_equal(lcc.load_restored(pruned, one, attention=kernels), logits_of(pair, one))


def test_changed_weights_alone_can_be_saved_and_the_restoration_stays(tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    pair = load_pair(pruned, pruned)
    shift = Shift(0.1 * torch.randn(D_MODEL, 30, generator=torch.Generator().manual_seed(3)))
    name = "model.layers.1.self_attn.o_proj"
    changed = dataclasses.replace(mlp_alone(restoration_of(pruned)), changes=((name, shift),))
    model = lcc.load_restored(pruned, changed)
    model.save_pretrained(tmp_path / "saved")
    expected = logits_of(pair, changed)
    assert_equal(type(model).from_pretrained(tmp_path / "saved", attn_implementation="eager"), expected)
    assert_equal(lcc.load_restored(pruned, changed), expected)


def test_constants_follow_the_model_to_another_format(tmp_path: Path) -> None:
    pruned = save_model(build_model(), tmp_path / "pruned")
    model = lcc.load_restored(pruned, restoration_of(pruned), dtype=torch.bfloat16)
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(BUFFER)]
    assert [buffer.dtype for buffer in buffers] == 3 * [torch.bfloat16]
    assert {buffer.dtype for name, buffer in model.double().named_buffers() if name.endswith(BUFFER)} == {torch.float64}


def test_other_weights_are_refused(tmp_path: Path) -> None:
    first, second = (save_model(build_model(seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    with pytest.raises(RequestError, match="expected the pruned model with SHA-256"):
        lcc.load_restored(second, restoration_of(first))
