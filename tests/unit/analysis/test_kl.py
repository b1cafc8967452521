"""Heads by KL: against torch's own divergence, one head and question at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import D_HEAD, D_MODEL, N_HEADS, N_LAYERS
from torch import Tensor

from lcc_lens.analysis.selectors import kl
from lcc_lens.analysis.selectors.kl import score_kl
from lcc_lens.core.errors import LensError, RequestError

N_PAIRS, D_VOCAB = 11, 97


class Lens:
    """A logit lens with random weights that keeps the shapes it was asked for."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.W_O = torch.randn(N_LAYERS, N_HEADS, D_HEAD, D_MODEL, generator=generator)
        self.W_U = torch.randn(D_MODEL, D_VOCAB, generator=generator) / 3
        self.asked: list[int] = []

    def __call__(self, layer: int, z: Tensor) -> Tensor:
        self.asked.append(len(z))
        resid = torch.einsum("nhd,hdm->nhm", z, self.W_O[layer])
        return (resid / resid.square().mean(-1, keepdim=True).sqrt()) @ self.W_U


def features(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(N_LAYERS, N_PAIRS, N_HEADS, D_HEAD, generator=generator)
    return [(z, z + 0.5 * torch.randn(z.shape, generator=generator)) for z in dense]


def test_scores_are_torchs_divergence_head_by_head() -> None:
    lens, layers = Lens(), features()
    found = score_kl(layers, lens)
    assert found.selector == "kl"
    assert found.n_examples == N_PAIRS
    for layer, (dense, pruned) in enumerate(layers):
        for head in range(N_HEADS):
            each = torch.stack([
                torch.nn.functional.kl_div(
                    lens(layer, pruned[n : n + 1])[0, head].log_softmax(-1),
                    lens(layer, dense[n : n + 1])[0, head].softmax(-1),
                    reduction="sum",
                )
                for n in range(N_PAIRS)
            ])  # fmt: skip
            assert float(found.value[layer, head]) == pytest.approx(float(each.mean()), rel=1e-4)
            assert float(found.stderr[layer, head]) == pytest.approx(float(each.std() / math.sqrt(N_PAIRS)), rel=1e-4)
    assert bool((found.value > 0).all())


def test_equal_heads_score_nothing_and_loudness_does_not_count() -> None:
    assert float(score_kl([(z, z) for z, _ in features()], Lens()).value.abs().max()) < 1e-6
    assert float(score_kl([(z, 3 * z) for z, _ in features()], Lens()).value.abs().max()) < 1e-5


def test_votes_are_read_within_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_kl(features(), Lens())
    monkeypatch.setattr(kl, "_CHUNK_BYTES", 3 * N_HEADS * D_VOCAB * 4 * kl._COPIES)
    lens = Lens()
    parts = score_kl(features(), lens)
    assert torch.allclose(parts.value, whole.value, atol=1e-6)
    assert max(lens.asked) == 3
    monkeypatch.setattr(kl, "_CHUNK_BYTES", 1)
    lens = Lens()
    score_kl(features(), lens)
    assert set(lens.asked) == {1}


def test_a_draw_reads_the_same_questions_in_every_layer() -> None:
    layers = features()
    found = score_kl(iter(layers), Lens(), max_examples=4, seed=3)
    drawn = torch.randperm(N_PAIRS, generator=torch.Generator().manual_seed(3))[:4]
    wanted = score_kl([(dense[drawn], pruned[drawn]) for dense, pruned in layers], Lens())
    assert found.n_examples == 4
    assert torch.allclose(found.value, wanted.value, atol=1e-6)
    assert not torch.allclose(found.value, score_kl(layers, Lens(), max_examples=4, seed=4).value)
    assert found.settings == {"max_examples": 4, "seed": 3}


def test_votes_of_a_real_readout(pair) -> None:
    """The whole way from head outputs to votes on a hooked model; the unchanged layer's heads score zero."""
    weights = [block.attn.o.original_component.weight.T.unflatten(0, (N_HEADS, D_HEAD)) for block in pair.pruned.blocks]

    def logits(layer: int, z: Tensor) -> Tensor:
        return pair.pruned.unembed(pair.pruned.ln_final(torch.einsum("nhd,hdm->nhm", z, weights[layer])))

    layers = features()
    layers[1] = (layers[1][0], layers[1][0])
    found = score_kl(layers, logits)
    assert float(found.value[1].abs().max()) < 1e-6
    assert bool((found.value[[0, 2]] > 1e-3).all())


def test_wrong_requests_are_refused() -> None:
    layers = features()
    with pytest.raises(RequestError, match="at least one layer, got none"):
        score_kl([], Lens())
    with pytest.raises(RequestError, match="expected max_examples of at least 1, got 0"):
        score_kl(layers, Lens(), max_examples=0)
    with pytest.raises(RequestError, match="at least one question, got none"):
        score_kl([(z[:0], z[:0]) for z, _ in layers], Lens())
    layers[2][1][4, 3] = math.nan
    with pytest.raises(LensError, match="NaN or infinity in head L2H3"):
        score_kl(layers, Lens())
