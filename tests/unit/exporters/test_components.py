"""Steering vectors: other tools that add them get what the restoration's own hooks give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.restorations import TOKENS, restoration_of, with_mlp
from support.tiny import build_model, save_model
from transformers import AutoModelForCausalLM

import lcc_lens as lcc
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.restoration.injections.changes import Shift

HEADS = [Head(0, 1), Head(2, 0), Head(2, 3)]  # not the last one: the vectors still have a row for every head


def _saved(source, folder: Path, model, **settings) -> tuple[dict[str, torch.Tensor], dict]:
    file = lcc.save_components(source, folder, model, **settings)
    return load_file(file), json.loads((folder / "components.json").read_text())


def test_transformer_lens_alone_gives_the_same_logits(pruned_dir: Path, tmp_path: Path) -> None:
    restoration, pruned = with_mlp(restoration_of(pruned_dir, HEADS), pruned_dir), load_hooked(pruned_dir).model
    vectors, described = _saved(restoration, tmp_path, pruned)
    hooks = [(place["name"], lambda z, hook, v=vectors[place["name"]]: z + v) for place in described["hooks"]]
    with torch.no_grad():
        before = pruned(TOKENS)
        added = pruned.run_with_hooks(TOKENS, fwd_hooks=hooks)
        with restoration.applied_to(pruned) as restored:
            expected = restored(TOKENS)
    assert torch.equal(added, expected)
    assert float((expected - before).abs().max()) > 0.1
    assert [(place["layer"], place.get("heads")) for place in described["hooks"]] == [
        (0, [1]),
        (2, [0, 3]),
        (0, None),
        (2, None),
    ]
    assert described["pruned_sha256"] == restoration.record.pruned_sha256
    assert vectors.keys() == {place["name"] for kind in ("hooks", "modules") for place in described[kind]}


def _by_forward_hooks(model, vectors: dict[str, torch.Tensor], modules: list[dict]) -> torch.Tensor:
    """The logits with every vector added to the output of its module."""
    handles = [
        model.get_submodule(place["name"]).register_forward_hook(lambda m, i, out, v=vectors[place["name"]]: out + v)
        for place in modules
    ]
    with torch.no_grad():
        logits = model(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


def test_transformers_modules_give_the_same_logits(pruned_dir: Path, tmp_path: Path) -> None:
    restoration, pruned = with_mlp(restoration_of(pruned_dir, HEADS), pruned_dir), load_hooked(pruned_dir).model
    vectors, described = _saved(restoration, tmp_path, pruned)
    plain = AutoModelForCausalLM.from_pretrained(pruned_dir, attn_implementation="eager")
    got = _by_forward_hooks(plain, vectors, described["modules"])
    with torch.no_grad(), restoration.applied_to(pruned) as restored:
        expected = restored(TOKENS)
    assert torch.allclose(got, expected, atol=1e-4)
    assert {(place["layer_type"], place["template"]) for place in described["modules"]} == {
        ("self_attn", "model.layers.{num}.self_attn.o_proj"),
        ("mlp", "model.layers.{num}.mlp.down_proj"),
    }


def test_steering_vectors_adds_them(pruned_dir: Path, tmp_path: Path) -> None:
    steering = pytest.importorskip("steering_vectors")
    restoration, pruned = restoration_of(pruned_dir, HEADS), load_hooked(pruned_dir).model
    vectors, described = _saved(restoration, tmp_path, pruned)
    plain = AutoModelForCausalLM.from_pretrained(pruned_dir, attn_implementation="eager")
    vector = steering.SteeringVector(
        {place["layer"]: vectors[place["name"]] for place in described["modules"]}, "self_attn"
    )
    config = {"self_attn": described["modules"][0]["template"]}
    with torch.no_grad(), vector.apply(plain, layer_config=config):
        got = plain(TOKENS).logits
    with torch.no_grad(), restoration.applied_to(pruned) as restored:
        assert torch.allclose(got, restored(TOKENS), atol=1e-4)


def test_a_scan_s_lost_components(pair, found: Scan, tmp_path: Path) -> None:
    vectors, described = _saved(found, tmp_path, pair.pruned, heads=HEADS, rank=2)
    expected = found.components.component(2)
    assert torch.equal(vectors["blocks.2.attn.hook_z"][3], expected[2, 3])
    assert float(vectors["blocks.2.attn.hook_z"][1].abs().max()) == 0
    assert (described["what"], described["rank"], described["n_examples"]) == (
        "lost components",
        2,
        found.record.n_examples,
    )
    every, _ = _saved(found, tmp_path, pair.pruned)  # its own files are replaced
    assert torch.allclose(every["blocks.0.attn.hook_z"], found.mean_difference[0], atol=1e-6)


def test_what_no_vector_holds_is_refused(pruned_dir: Path, tmp_path: Path) -> None:
    restoration, pruned = restoration_of(pruned_dir), load_hooked(pruned_dir).model
    shift = Shift(torch.zeros(30, 30))
    changed = dataclasses.replace(restoration, changes=(("model.layers.1.self_attn.o_proj", shift),))
    with pytest.raises(RequestError, match="expected a restoration of constants alone, got lcc"):
        lcc.save_components(changed, tmp_path / "out", pruned)
    with pytest.raises(RequestError, match="expected heads and rank of a scan alone"):
        lcc.save_components(restoration, tmp_path / "out", pruned, rank=2)
    other = load_hooked(save_model(build_model(seed=4), tmp_path / "other")).model
    with pytest.raises(RequestError, match=r"expected the pruned model with SHA-256 .*, got .*other"):
        lcc.save_components(restoration, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
