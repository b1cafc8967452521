"""Activation patching: many heads in one run, started in the middle, against one plain run per head and example."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.pairs import FAMILIES, encoded
from support.tiers import mostly_slow
from support.tiny import N_HEADS, N_LAYERS
from torch import Tensor

from lcc_lens.analysis.selectors import patched_run
from lcc_lens.analysis.selectors.activation_patching import patching_effects, score_activation_patching
from lcc_lens.analysis.selectors.patched_run import PatchedRuns
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import HeadMap
from lcc_lens.data.batches import TokenSequence, batches, pad
from lcc_lens.models.hooked import layer_skipping
from lcc_lens.models.hooked.hooks import logits_at, z_name
from lcc_lens.models.hooked.layer_walk import can_start_at_layers, run_from_layer
from lcc_lens.models.hooked.losses import measure, response_log_likelihood
from lcc_lens.models.pair import Pair, load_pair


def plain_outcome(
    pair: Pair, sequence: TokenSequence, z_hook: tuple | None, dense_log_p: Tensor
) -> tuple[float, float]:
    """One whole run of one example: mean response log-likelihood, mean KL from the dense model."""
    hooks = [z_hook] if z_hook else []
    with torch.inference_mode():
        logits = pair.pruned.run_with_hooks(sequence.tokens[None], fwd_hooks=hooks)[0]
    log_p = logits.log_softmax(-1)
    likelihoods, divergences = [], []
    for position in range(sequence.loss_from, len(sequence)):
        likelihoods.append(float(log_p[position - 1, sequence.tokens[position]]))
        divergences.append(float((dense_log_p.exp() * (dense_log_p - log_p))[position - 1].sum()))
    return sum(likelihoods) / len(likelihoods), sum(divergences) / len(divergences)


def plain_effect(pair: Pair, sequence: TokenSequence, layer: int, head: int, positions: str) -> tuple[float, float]:
    """Patch one head in one example by hand."""
    with torch.inference_mode():
        logits, cache = pair.dense.run_with_cache(sequence.tokens[None])
    dense_log_p = logits[0].log_softmax(-1)
    z_dense = cache[z_name(layer)]

    def patch(z: Tensor, hook) -> Tensor:
        z = z.clone()
        start = sequence.loss_from - 1 if positions == "response" else 0
        z[:, start:, head] = z_dense[:, start:, pair.head_map.dense_heads[layer][head]]
        return z

    after = plain_outcome(pair, sequence, (z_name(layer), patch), dense_log_p)
    before = plain_outcome(pair, sequence, None, dense_log_p)
    return after[0] - before[0], before[1] - after[1]


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "gpt2", "gemma2"))
def test_patching_is_one_plain_run_per_head_and_example(families, family: str, positions: str) -> None:
    pair = families(family)
    sequences = encoded(pair, 3)
    found = patching_effects(pair, sequences, positions=positions, batch_tokens=120)
    assert can_start_at_layers(pair.pruned)
    assert found.divergence is not None
    for example, sequence in enumerate(sequences):
        for layer in range(pair.n_layers):
            for head in range(pair.n_heads):
                wanted = plain_effect(pair, sequence, layer, head, positions)
                assert float(found.log_likelihood[example, layer, head]) == pytest.approx(wanted[0], abs=1e-5)
                assert float(found.divergence[example, layer, head]) == pytest.approx(wanted[1], abs=1e-5)
    assert bool((found.log_likelihood.abs().amax((0, 2)) > 1e-3).all())  # the effects are there, in every layer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_the_middle_gives_the_logits_of_a_whole_run(families, family: str) -> None:
    pair = families(family)
    model, batch = pair.pruned, pad(encoded(pair, 3), range(3))
    resid: list[Tensor] = []
    readers = patched_run.resid_readers(pair.n_layers, resid)
    shift = [(z_name(2), lambda z, hook: z * 1.5)]
    with torch.inference_mode():
        whole = model.run_with_hooks(batch.tokens, fwd_hooks=[*readers, *shift])
        for layer in (1, 2):
            part = run_from_layer(model, layer, resid[layer], batch.tokens, shift)
            assert torch.allclose(part[batch.is_valid()], whole[batch.is_valid()], atol=1e-5)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_blocks_below_the_patched_layer_do_not_run(pair: Pair) -> None:
    runs = PatchedRuns.prepare(pair, pad(encoded(pair, 2), range(2)), "all", may_start=True, divergence=False)
    ran: list[int] = []
    handles = [
        block.original_component.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(pair.pruned.blocks)
    ]
    runs.run(2, torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3]))
    replace(runs, resid=[]).run(2, torch.tensor([0]), torch.tensor([4]))
    for handle in handles:
        handle.remove()
    assert ran == [2, 0, 1, 2]


def test_where_the_middle_is_no_start_runs_are_whole(
    pair: Pair, dense_dir: Path, pruned_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = encoded(pair, 2)
    wanted = patching_effects(pair, sequences)

    def fails(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        raise ValueError("this block always runs")

    monkeypatch.setattr(layer_skipping, "_pass_on", fails)
    pair = load_pair(dense_dir, pruned_dir)
    assert not can_start_at_layers(pair.pruned)
    assert not any("forward" in vars(block) for block in pair.pruned.blocks)
    found = patching_effects(pair, sequences)
    assert torch.allclose(found.log_likelihood, wanted.log_likelihood, atol=1e-5)


def test_a_model_with_a_side_channel_between_layers_is_noticed(pair: Pair) -> None:
    """Layer 2 reads what layer 0 saw: from the middle on it would read nothing."""
    seen: list[Tensor] = []
    blocks = pair.pruned.blocks
    write = blocks[0].original_component.register_forward_hook(lambda m, args, out: seen.append(out))
    read = blocks[2].original_component.register_forward_hook(lambda m, args, out: out + (seen.pop() if seen else 0))
    try:
        assert not can_start_at_layers.__wrapped__(pair.pruned)
    finally:
        write.remove()
        read.remove()
    assert can_start_at_layers.__wrapped__(pair.pruned)


def test_a_models_own_outputs_change_nothing(pruned_dir: Path) -> None:
    same = load_pair(pruned_dir, pruned_dir)
    found = patching_effects(same, encoded(same, 3))
    assert found.divergence is not None
    assert float(found.log_likelihood.abs().max()) < 1e-5
    assert float(found.divergence.abs().max()) < 1e-5


def test_effects_do_not_depend_on_how_rows_are_grouped(pair: Pair) -> None:
    sequences = encoded(pair, 7)
    assert len(batches(sequences, max_tokens=90)) > 2
    small, large = (patching_effects(pair, sequences, batch_tokens=n) for n in (90, 4096))
    assert torch.allclose(small.log_likelihood, large.log_likelihood, atol=1e-5)
    assert small.divergence is not None
    assert large.divergence is not None
    assert torch.allclose(small.divergence, large.divergence, atol=1e-5)


def test_dense_heads_are_found_by_the_head_map(pair: Pair) -> None:
    turned = replace(pair, head_map=HeadMap(((4, 3, 2, 1, 0), (0, 1, 2, 3, 4), (2, 0, 1, 4, 3)), ((), (), ())))
    sequences = encoded(pair, 1)
    found = patching_effects(turned, sequences)
    for layer, head in [(0, 1), (1, 1), (2, 3)]:
        wanted, _ = plain_effect(turned, sequences[0], layer, head, "all")
        assert float(found.log_likelihood[0, layer, head]) == pytest.approx(wanted, abs=1e-5)


def test_only_the_chosen_heads_are_patched_and_removed_ones_bring_nothing(pair: Pair) -> None:
    gone = replace(pair, head_map=HeadMap.identity(N_LAYERS, N_HEADS, [(), (3,), ()]))
    sequences = encoded(pair, 3)
    chosen = [(1, 3), (2, 4), (0, 0)]
    found = score_activation_patching(gone, sequences, heads=chosen)
    every = patching_effects(pair, sequences)
    assert {tuple(i) for i in found.value.isfinite().nonzero().tolist()} == set(chosen)
    assert float(found.value[1, 3]) == 0
    for layer, head in [(2, 4), (0, 0)]:
        effects = every.log_likelihood[:, layer, head]
        assert float(found.value[layer, head]) == pytest.approx(float(effects.mean()), abs=1e-5)
        assert float(found.stderr[layer, head]) == pytest.approx(float(effects.std() / math.sqrt(3)), abs=1e-5)
    assert found.selector == "patching"
    assert found.settings == {"outcome": "response", "positions": "all"}


def test_the_kl_outcome_is_the_fall_of_the_divergence(pair: Pair) -> None:
    sequences = encoded(pair, 2)
    effects = patching_effects(pair, sequences)
    found = score_activation_patching(pair, sequences, outcome="kl")
    assert effects.divergence is not None
    assert torch.allclose(found.value, effects.divergence.mean(0), atol=1e-6)
    assert found.settings["outcome"] == "kl"


def test_the_effects_so_far_are_handed_out_batch_by_batch(pair: Pair) -> None:
    sequences = encoded(pair, 5)
    finished: list[int] = []
    patching_effects(
        pair, sequences, heads=[(1, 2)], batch_tokens=90,
        on_done=lambda effects: finished.append(int(effects.log_likelihood[:, 1, 2].isfinite().sum())),
    )  # fmt: skip
    sizes = [len(batch.index) for batch in batches(sequences, max_tokens=90)]
    assert finished == [sum(sizes[: i + 1]) for i in range(len(sizes))]


def test_outcomes_are_means_over_each_examples_response(pair: Pair) -> None:
    batch = pad(encoded(pair, 3), [2, 0, 1])
    with torch.inference_mode():
        narrow, dense = (
            model.run_with_hooks(batch.tokens, fwd_hooks=logits_at(model, batch.is_target()))[0]
            for model in (pair.pruned, pair.dense)
        )
        both = measure(narrow, batch, dense)
        assert torch.allclose(response_log_likelihood(narrow, batch), both.log_likelihood, atol=1e-6)
        assert measure(narrow, batch).divergence is None
        own = measure(dense, batch, dense).divergence
    assert own is not None
    assert float(own.abs().max()) < 1e-6
    for row, i in enumerate(batch.index):
        sequence = encoded(pair, 3)[i]
        dense_log_p = pair.dense(sequence.tokens[None])[0].log_softmax(-1)
        wanted = plain_outcome(pair, sequence, None, dense_log_p)
        assert float(both.log_likelihood[row]) == pytest.approx(wanted[0], abs=1e-5)
        assert both.divergence is not None
        assert float(both.divergence[row]) == pytest.approx(wanted[1], abs=1e-5)


def test_a_patch_that_breaks_the_run_names_its_head(pair: Pair) -> None:
    batch = pad(encoded(pair, 2), range(2))
    runs = PatchedRuns.prepare(pair, batch, "all", may_start=True, divergence=False)
    with torch.inference_mode():
        runs.z_dense[1][:, :, 3] = math.inf

    class Broken(PatchedRuns):
        @classmethod
        def prepare(cls, *args, **kwargs) -> PatchedRuns:
            return replace(runs, batch=args[1])

    from lcc_lens.analysis.selectors import activation_patching

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_patching, "PatchedRuns", Broken)
        with pytest.raises(LensError, match="NaN or infinity after patching L1H3"):
            patching_effects(pair, encoded(pair, 2))


def test_wrong_requests_are_refused(pair: Pair) -> None:
    sequences = encoded(pair, 1)
    with pytest.raises(RequestError, match="at least one example to patch"):
        patching_effects(pair, [])
    with pytest.raises(RequestError, match=r"expected heads within 3 layers x 5 heads, got L3H0"):
        patching_effects(pair, sequences, heads=[(3, 0)])
    without = patching_effects(pair, sequences, heads=[(0, 0)], divergence=False)
    with pytest.raises(RequestError, match="measure them with divergence=True"):
        without.scores("kl")
