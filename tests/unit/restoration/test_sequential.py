"""Sequential mean shift: what one walk through the layers finds is what the whole model, run anew per layer, shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.tiers import mostly_slow
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, save_model

from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head, all_heads
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.hooked import layer_walk
from lcc_lens.models.hooked.hooks import mlp_name, z_name
from lcc_lens.models.hooked.layer_walk import LayerWalk, can_run_layers_alone
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.sequential import sequential_means
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.restore import restore

HEADS = [Head(0, 1), Head(0, 4), Head(2, 0), Head(2, 3)]


@pytest.fixture(scope="module")
def sequences(pair, question_file: Path, text_file: Path):
    """Of different lengths, so that batches are padded."""
    short = encode(load_data(str(question_file), n=5), pair.tokenizer)
    return [replace(one, tokens=one.tokens[: 12 + 4 * i]) for i, one in enumerate(short)] + encode(
        load_data(str(text_file)), pair.tokenizer, max_length=40, limit=4
    )


@torch.no_grad()
def mean_of(model, sequences, name: str, constants: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of one activation over all tokens, sequence by sequence, the whole model under constants."""
    kept: list[torch.Tensor] = []
    hooks = [(at, lambda a, hook, c=c: a + c) for at, c in constants.items()]
    for one in sequences:
        look = (name, lambda a, hook: kept.append(a[0].double()))
        model.run_with_hooks(one.tokens[None], fwd_hooks=[*hooks, look])
    return torch.cat(kept).mean(0)


@torch.no_grad()
def mlp_samples(model, tokens: list[torch.Tensor], layer: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    for one in tokens:
        model.run_with_hooks(one[None], fwd_hooks=[(mlp_name(layer), lambda a, hook: kept.append(a[0].double()))])
    return torch.cat(kept)


def plain(pair, sequences, heads: list[Head], *, mlp: bool) -> dict[str, torch.Tensor]:
    """The definition: layer by layer, both models whole, with the constants found so far."""
    constants: dict[str, torch.Tensor] = {}
    for layer in range(N_LAYERS):
        name, chosen = z_name(layer), [h.head for h in heads if h.layer == layer]
        difference = mean_of(pair.dense, sequences, name, {}) - mean_of(pair.pruned, sequences, name, constants)
        found = torch.zeros(N_HEADS, D_HEAD)
        found[chosen] = difference[chosen].float()
        constants[name] = found
        if mlp:
            name = mlp_name(layer)
            difference = mean_of(pair.dense, sequences, name, {}) - mean_of(pair.pruned, sequences, name, constants)
            constants[name] = difference.float()
    return constants


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
def test_one_walk_equals_the_whole_model_run_anew(
    pair, sequences, mlp: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_run_layers_alone(pair.pruned)
    monkeypatch.setattr(layer_walk, "can_run_layers_alone", lambda model: alone)
    found = sequential_means(pair, sequences, HEADS, mlp=mlp, max_tokens=90)
    expected = plain(pair, sequences, HEADS, mlp=mlp)
    assert found.keys() == ({"z", "mlp"} if mlp else {"z"})
    for layer in range(N_LAYERS):
        assert torch.allclose(found["z"][layer], expected[z_name(layer)], atol=1e-4)
        if mlp:
            assert torch.allclose(found["mlp"][layer, 0], expected[mlp_name(layer)], atol=1e-4)
    assert float(found["z"][2, 0].abs().max()) > 0.01
    assert not bool(found["z"][1].any())
    assert not bool(found["z"][0, 2].any())


def test_mending_below_changes_what_is_measured_above(pair, sequences) -> None:
    """The first layer's means are the plain ones; the others' are not."""
    heads = all_heads(N_LAYERS, N_HEADS)
    mended, alone = (sequential_means(pair, sequences, chosen)["z"] for chosen in (heads, [Head(2, 0)]))
    assert float((mended[2, 0] - alone[2, 0]).abs().max()) > 1e-3
    first = sequential_means(pair, sequences, [Head(0, 1)])["z"]
    assert torch.allclose(mended[0, 1], first[0, 1], atol=1e-6)


def test_afterwards_every_mended_mean_is_the_dense_one(pair, sequences) -> None:
    """What a plain mean shift does not reach: with all constants in place, no chosen mean differs any more."""
    given = Ingredients(
        pair.pruned, None, all_heads(N_LAYERS, N_HEADS), pair.output_projections, pair=pair, sequences=sequences
    )
    before = pair.pruned(torch.arange(12)[None])
    with MethodSpec.parse("mean-shift-sequential-mlp").build(given).applied_to(pair.pruned) as model:
        for layer in range(N_LAYERS):
            for name in (z_name(layer), mlp_name(layer)):
                wanted, got = (mean_of(one, sequences, name, {}) for one in (pair.dense, model))
                assert torch.allclose(got, wanted, atol=1e-4)
    assert torch.equal(pair.pruned(torch.arange(12)[None]), before)
    untouched = mean_of(pair.pruned, sequences, mlp_name(2), {}) - mean_of(pair.dense, sequences, mlp_name(2), {})
    assert float(untouched.abs().max()) > 0.05


@pytest.mark.parametrize("family", mostly_slow(["gpt2", "gemma2", "opt", "mistral", "gpt_neox"], "gemma2"))
def test_families_walk(family: str, tmp_path: Path) -> None:
    """Layers alone give what a whole pass gives, also where layers have masks of different kinds."""
    dense = save_model(FAMILIES[family](), tmp_path / "dense")
    prune(dense, tmp_path / "pruned", method="magnitude")
    pair = load_pair(dense, tmp_path / "pruned", dtype=torch.float32)
    assert can_run_layers_alone(pair.dense)
    tokens = [torch.arange(1, 61).reshape(2, 30), torch.arange(5, 45)[None]]
    walks = [LayerWalk(pair.dense, tokens, alone=alone) for alone in (True, False)]
    for _ in range(N_LAYERS):
        for batch in range(2):
            whole, alone = (walk.run(batch, []) for walk in walks)
            assert torch.allclose(whole, alone, atol=1e-4)
        for walk in walks:
            walk.advance([])
    sequences = encode(load_data_lines(tmp_path), pair.tokenizer, max_length=100)
    found = sequential_means(pair, sequences, all_heads(N_LAYERS, pair.n_heads), mlp=True)
    assert float(found["mlp"].abs().max()) > 0.01


def load_data_lines(folder: Path):
    (folder / "text.txt").write_text(" ".join(f"Line {i} of a text." for i in range(80)))
    return load_data(str(folder / "text.txt"))


def test_a_model_that_cannot_walk_runs_whole(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_walk, "_output_alone", lambda *_: torch.zeros(1, 1, 1))
    assert not can_run_layers_alone.__wrapped__(pair.pruned)


@pytest.mark.parametrize(
    "method", mostly_slow(["mean-shift-sequential", "mean-shift-sequential-mlp"], "mean-shift-sequential-mlp")
)
def test_restore_and_export(
    pair, found: Scan, question_file: Path, pruned_dir: Path, tmp_path: Path, method: str
) -> None:
    data, heads, steps = load_data(str(question_file)), found.select("mse", share=0.5), []
    restoration = restore(pair, found, heads, data, method=method, run=tmp_path / "run", on_step=steps.append)
    assert steps == []
    assert (restoration.record.n_trained, restoration.record.data) == (0, data.name)
    assert (restoration.mlp is not None) == method.endswith("mlp")
    report = export(restoration, pruned_dir, tmp_path / "out")
    assert report.logit_effect > 1e-3
    assert restore(pair, None, heads, data, method=method).heads == tuple(heads)  # no scan is needed
    with pytest.raises(RequestError, match="expected a method that trains for shuffled responses, got mean-shift-seq"):
        restore(pair, found, heads, data, method=method, shuffle_responses=True)


def test_what_cannot_be_measured_is_refused(
    pair, sequences, dense_dir: Path, pruned_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="expected sequences to measure a mean shift on, got none"):
        sequential_means(pair, [], HEADS)
    with pytest.raises(RequestError, match="expected heads within 3 layers x 5 heads, got L3H0"):
        sequential_means(pair, sequences, [Head(3, 0)])
    with pytest.raises(RequestError, match="expected MLPs of the same width in both models"):
        sequential_means(replace(pair, sites=("z",)), sequences, HEADS, mlp=True)
    with pytest.raises(RequestError, match="expected both models in memory for a sequential mean shift"):
        sequential_means(load_pair(dense_dir, pruned_dir, one_at_a_time=True), sequences, HEADS)
    with pytest.raises(RequestError, match="expected both models, got the pruned one"):
        MethodSpec.parse("mean-shift-sequential").build(Ingredients(pair.pruned, None, HEADS, pair.output_projections))
    weight = dict(pair.pruned.original_model.named_parameters())
    name = next(name for name in weight if "v_proj" in name)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(weight[name], "data", torch.full_like(weight[name], torch.nan))
        with pytest.raises(LensError, match="expected finite activations, got NaN or infinity at z of layer 0"):
            sequential_means(pair, sequences, HEADS)


def test_the_share_that_is_constant_is_what_a_mean_shift_mends(pair, question_file: Path) -> None:
    """Taking the mean away leaves exactly the rest of the squared difference."""
    data = load_data(str(question_file), n=9)
    found, sequences = scan(pair, data, display=0), encode(data, pair.tokenizer)
    dense, pruned = (
        [mlp_samples(model, [one.tokens for one in sequences], layer) for layer in range(N_LAYERS)]
        for model in (pair.dense, pair.pruned)
    )
    left = total = 0.0
    for lost in (a - b for a, b in zip(dense, pruned, strict=True)):
        total += float(lost.square().sum())
        left += float((lost - lost.mean(0)).square().sum())
    assert 0.01 < found.mendable_share("mlp") < 0.99
    assert found.mendable_share("mlp") == pytest.approx(1 - left / total, rel=1e-3)
    every, few = found.mendable_share(), found.mendable_share("z", HEADS)
    assert 0 < few < every < 1
    others = [head for head in all_heads(N_LAYERS, N_HEADS) if head not in HEADS]
    assert few + found.mendable_share("z", others) == pytest.approx(every, rel=1e-5)
    with pytest.raises(RequestError, match="expected a scan with the site mlp, got one without"):
        replace(found, others={}).mendable_share("mlp")
