"""Gradient selectors: against TransformerLens' attribution patching, finite differences, and plain sums over pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.pairs import FAMILIES, encoded
from support.tiny import D_HEAD, N_HEADS, N_LAYERS
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.selectors.attribution_patching import score_attribution_patching
from lcc_lens.analysis.selectors.backward import ResponseGradients, response_gradients
from lcc_lens.analysis.selectors.gradient import score_gradient
from lcc_lens.analysis.selectors.patched_run import PatchedRuns
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import HeadMap
from lcc_lens.data.batches import pad
from lcc_lens.models.hooked.hooks import logits_at, z_adders, z_name
from lcc_lens.models.hooked.losses import response_log_likelihood
from lcc_lens.models.pair import Pair


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_that_of_transformer_lens(families, family: str) -> None:
    """Its sweep takes one model and two prompts; its cache of activations and gradients serves two models as well."""
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    pair = families(family)
    sequences = encoded(pair, 3)
    found = response_gradients(pair, sequences)
    names = [z_name(layer) for layer in range(N_LAYERS)]
    points = ["hook_embed", *names]  # its hooks fire above a point that it asks the gradient of
    constants = []
    for example, sequence in enumerate(sequences):
        tokens, start = sequence.tokens, sequence.loss_from

        def metric(logits: Tensor, tokens: Tensor = tokens, start: int = start) -> Tensor:
            return logits[0, start - 1 : -1].log_softmax(-1).gather(-1, tokens[start:, None]).mean()

        clean = cache_activation_and_gradient(pair.dense, tokens[None], metric, points, compute_gradient=False)
        pair.pruned.requires_grad_(True)  # its tape starts at the weights
        try:
            corrupt = cache_activation_and_gradient(pair.pruned, tokens[None], metric, points)
        finally:
            pair.pruned.requires_grad_(False)
        gradients = []
        for layer, name in enumerate(names):
            gradient = corrupt.gradients[name]
            assert gradient is not None
            effect = (gradient * (clean.activations[name] - corrupt.activations[name])).sum((0, 1, 3))
            assert torch.allclose(found.attribution[example, layer], effect, atol=1e-5, rtol=1e-4)
            gradients.append(gradient.sum((0, 1)))
        constants.append(torch.stack(gradients))
    constant_gradient = found.group_gradient.sum(0) / found.n_examples
    assert torch.allclose(constant_gradient, torch.stack(constants).mean(0), atol=1e-5, rtol=1e-4)
    squares = torch.stack(constants).square().sum((0, -1))
    assert torch.allclose(found.group_square.sum(0), squares, atol=1e-5, rtol=1e-4)
    assert float(found.attribution.abs().max()) > 1e-2


def test_attribution_is_the_exact_effect_to_first_order(pair: Pair) -> None:
    """Patching z_pruned + e (z_dense - z_pruned) gives e times the attribution as e goes to zero."""
    sequences = encoded(pair, 2)
    batch = pad(sequences, range(2))
    wanted = response_gradients(pair, sequences).attribution
    runs = PatchedRuns.prepare(pair, batch, "all", may_start=True, divergence=False)
    with torch.inference_mode():
        _, cache = pair.pruned.run_with_cache(batch.tokens)
    z_pruned = [cache[z_name(layer)] for layer in range(N_LAYERS)]

    def slope(step: float, layer: int, head: int) -> Tensor:
        def effect(e: float) -> Tensor:
            mixed = [p + e * (d - p) for p, d in zip(z_pruned, runs.z_dense, strict=True)]
            outcome = replace(runs, z_dense=mixed).run(layer, torch.arange(2), torch.full((2,), head))
            return outcome.log_likelihood.double() - runs.unpatched.log_likelihood.double()

        return (effect(step) - effect(-step)) / (2 * step)

    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            near, far = ((slope(step, layer, head) - wanted[:, layer, head]).abs().max() for step in (0.02, 1.0))
            assert float(near) < 1e-3
            assert float(near) <= float(far) + 1e-4


def test_attributions_of_a_layers_heads_add_up_to_the_layers(pair: Pair) -> None:
    sequences = encoded(pair, 2)
    batch = pad(sequences, range(2))
    wanted = response_gradients(pair, sequences).attribution.sum(-1)
    with torch.inference_mode():
        z = [model.run_with_cache(batch.tokens)[1] for model in (pair.dense, pair.pruned)]

    def likelihood(layer: int, step: float) -> Tensor:
        moved = [(z_name(layer), lambda own, hook: own + step * (z[0][z_name(layer)] - z[1][z_name(layer)]))]
        narrow = logits_at(pair.pruned, batch.is_target())
        with torch.inference_mode():
            return response_log_likelihood(
                pair.pruned.run_with_hooks(batch.tokens, fwd_hooks=[*moved, *narrow])[0], batch
            )

    for layer in range(N_LAYERS):
        slope = (likelihood(layer, 0.01) - likelihood(layer, -0.01)) / 0.02
        assert torch.allclose(slope, wanted[:, layer], atol=2e-3)


def test_the_constants_gradient_is_the_slope_along_a_constant(pair: Pair) -> None:
    sequences = encoded(pair, 2)
    batch = pad(sequences, range(2))
    gradients = response_gradients(pair, sequences)
    gradient = gradients.group_gradient.sum(0) / gradients.n_examples
    direction = torch.randn(N_HEADS, D_HEAD, generator=torch.Generator().manual_seed(0))
    for layer in range(N_LAYERS):

        def likelihood(step: float, layer: int = layer) -> float:
            hooks = [*z_adders({layer: step * direction}), *logits_at(pair.pruned, batch.is_target())]
            with torch.inference_mode():
                logits = pair.pruned.run_with_hooks(batch.tokens, fwd_hooks=hooks)
                return float(response_log_likelihood(logits[0], batch).mean())

        slope = (likelihood(0.01) - likelihood(-0.01)) / 0.02
        assert slope == pytest.approx(float((gradient[layer] * direction).sum()), abs=2e-3)
        assert abs(slope) > 1e-2


def test_batches_and_groups_do_not_change_the_sums_and_no_weight_takes_a_gradient(pair: Pair) -> None:
    sequences = encoded(pair, 7)
    small = response_gradients(pair, sequences, batch_tokens=90, n_groups=3)
    large = response_gradients(pair, sequences, batch_tokens=4096)
    assert small.group_size.tolist() == [3, 2, 2]
    assert large.group_size.tolist() == [1] * 7
    assert torch.allclose(small.attribution, large.attribution, atol=1e-5)
    assert torch.allclose(small.group_gradient[1], large.group_gradient[1] + large.group_gradient[4], atol=1e-5)
    assert torch.allclose(small.group_square[0], large.group_square[[0, 3, 6]].sum(0), atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in pair.pruned.parameters())


def test_attribution_follows_the_head_map(pair: Pair) -> None:
    order = (4, 3, 2, 1, 0)
    turned = replace(pair, head_map=HeadMap((order,) * N_LAYERS, ((),) * N_LAYERS))
    sequences = encoded(pair, 2)
    wrong, right = response_gradients(turned, sequences), response_gradients(pair, sequences)
    assert torch.equal(wrong.group_gradient, right.group_gradient)
    assert not torch.allclose(wrong.attribution[:, :, 0], right.attribution[:, :, 0], atol=1e-3)
    assert torch.allclose(wrong.attribution[:, :, 2], right.attribution[:, :, 2], atol=1e-6)


def test_attribution_scores_are_means_with_their_errors(pair: Pair) -> None:
    gradients = response_gradients(pair, encoded(pair, 4))
    scores = score_attribution_patching(gradients)
    assert scores.selector == "attribution"
    assert torch.allclose(scores.value, gradients.attribution.mean(0), atol=1e-6)
    assert torch.allclose(scores.stderr, gradients.attribution.std(0) / 2, atol=1e-6)


def given(gradients: Tensor, n_groups: int = 10) -> ResponseGradients:
    """What a pass would hand out for these per-example gradients ``[example layer head d_head]``."""
    group = torch.arange(len(gradients)) % n_groups
    total = torch.zeros(n_groups, *gradients.shape[1:]).index_add(0, group, gradients)
    square = torch.zeros(n_groups, *gradients.shape[1:3]).index_add(0, group, gradients.square().sum(-1))
    return ResponseGradients(torch.zeros(gradients.shape[:3]), total, square, torch.bincount(group))


def components(unit: Tensor, d_head: int) -> LostComponents:
    """Lost components of a given root mean square."""
    shape = *unit.shape, d_head
    values = unit[..., None].expand(shape).contiguous()
    return LostComponents(torch.eye(d_head).expand(*shape, d_head).contiguous(), values, torch.zeros(shape), 1)


def test_gradient_score_is_the_mean_product_of_different_examples() -> None:
    gradients = torch.randn(7, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    unit = torch.rand(2, 3) + 0.5
    found = score_gradient(given(gradients, 7), components(unit, 4))

    def by_hand(chosen: Tensor) -> float:
        products = [float(a @ b) for i, a in enumerate(chosen) for j, b in enumerate(chosen) if i != j]
        mean = sum(products) / len(products)
        return math.copysign(math.sqrt(abs(mean)), mean)

    for layer in range(2):
        for head in range(3):
            own, scale = gradients[:, layer, head].double(), float(unit[layer, head])
            assert float(found.value[layer, head]) == pytest.approx(scale * by_hand(own), rel=1e-5)
            left_out = torch.tensor([by_hand(own[torch.arange(7) != k]) for k in range(7)])
            error = scale * math.sqrt(6 / 7 * float((left_out - left_out.mean()).square().sum()))
            assert float(found.stderr[layer, head]) == pytest.approx(error, rel=1e-4)


def test_noise_alone_scores_around_zero_and_a_signal_its_length() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40, 1, 400, 16, generator=generator)
    unit = torch.ones(1, 400)
    scores = score_gradient(given(noise), components(unit, 16))
    norm_of_mean = noise.mean(0).norm(dim=-1)
    assert float(norm_of_mean.mean()) > 0.5  # what the plain norm would make of nothing
    assert abs(float((scores.value.sign() * scores.value.square()).mean())) < 0.02
    assert 0.3 < float((scores.value > 0).float().mean()) < 0.7

    signal = score_gradient(given(noise + 0.5), components(unit, 16))
    assert float(signal.value.mean()) == pytest.approx(2.0, abs=0.05)  # 0.5 in each of 16 coordinates
    assert float(signal.stderr.mean()) == pytest.approx(float(signal.value.std()), rel=0.2)


def test_gradient_scores_of_a_scan(pair: Pair, found) -> None:
    scores = score_gradient(response_gradients(pair, encoded(pair, 6)), found.components)
    assert scores.selector == "gradient"
    assert scores.value.shape == scores.stderr.shape == (N_LAYERS, N_HEADS)
    assert bool(scores.stderr.isfinite().all())
    assert scores.n_examples == 6


def test_two_examples_give_a_score_without_an_error() -> None:
    scores = score_gradient(given(torch.ones(2, 1, 3, 4), 2), components(torch.ones(1, 3), 4))
    assert torch.allclose(scores.value, torch.full((1, 3), 2.0))
    assert bool(scores.stderr.isnan().all())


def test_wrong_requests_are_refused(pair: Pair) -> None:
    with pytest.raises(RequestError, match="at least 2 examples for gradients, got 1"):
        response_gradients(pair, encoded(pair, 1))


def test_gradient_that_is_not_finite_is_named(pair: Pair, tmp_path: Path) -> None:
    scale = torch.ones(1, 1, N_HEADS, 1)
    scale[0, 0, 3] = math.nan

    def spoil(z: Tensor, hook) -> Tensor:
        z = z.clone()
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient * scale)
        return z

    with pair.pruned.hooks(fwd_hooks=[(z_name(1), spoil)]), pytest.raises(LensError, match="NaN or infinity at head L"):
        response_gradients(pair, encoded(pair, 2))
