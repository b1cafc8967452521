"""Probes on contrastive pairs: against scikit-learn, plain loops and refits, and by what they can and cannot see."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.probe_features import ProbeFeatures
from support.reference import probe_accuracy

from lcc_lens.analysis.components import LostComponents, extract_lost_components
from lcc_lens.analysis.probes.converged import PairActivations, correct_fraction, fit_pair_probes
from lcc_lens.analysis.probes.kernel import interaction_kernel, leave_one_out, squared_loss
from lcc_lens.analysis.probes.published import fit_linear_probes, split_pairs
from lcc_lens.analysis.selectors.interaction_probe import RIDGES, score_interaction_probe
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, linear_probe_scores
from lcc_lens.core.errors import LensError, RequestError

LAYERS, HEADS, D_HEAD = 2, 3, 6


def random_pairs(n_pairs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> PairActivations:
    """Correlated answers of unequal scales and means; the signal grows with the head."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, HEADS, n_pairs, D_HEAD, generator=generator, dtype=torch.float64)
    mix = torch.randn(HEADS, D_HEAD, D_HEAD, generator=generator, dtype=torch.float64)
    signal = torch.arange(HEADS)[:, None, None] * 0.4
    question, right, wrong = noise[0], noise[1] + noise[2] + signal, noise[1] + noise[3]
    scale = torch.logspace(-1, 1, D_HEAD, dtype=torch.float64)
    return PairActivations(*((z @ mix * scale + 3).to(dtype) for z in (question, right, wrong)))


def random_features(n_pairs: int = 40, seed: int = 0) -> ProbeFeatures:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, n_pairs, LAYERS, HEADS, D_HEAD, generator=generator)
    z[1, :, 1] += 0.7
    return ProbeFeatures(z[0], z[1], z[2], z_dense_question=z[3])


def components_of(features: ProbeFeatures) -> LostComponents:
    assert features.z_dense_question is not None
    return extract_lost_components(features.z_dense_question, features.z_pruned_question)


@pytest.mark.parametrize("n_pairs", [5, 60])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_newton_finds_what_scikit_learn_finds_head_by_head(n_pairs: int, ridge: float) -> None:
    pairs = random_pairs(n_pairs)
    probe = fit_pair_probes(pairs, ridge=ridge)
    features, labels = pairs.examples()
    for head in range(HEADS):
        x = features[head].double().numpy()
        mean, spread = x.mean(0), x.std(0)
        oracle = LogisticRegression(C=1 / (2 * n_pairs * ridge), tol=1e-12, max_iter=10_000)
        oracle.fit((x - mean) / spread, labels.numpy())
        standardised = probe.weight[head].double().numpy() * spread
        assert standardised == pytest.approx(oracle.coef_[0], abs=1e-3)
        assert math.isclose(
            float(probe.bias[head]) + probe.weight[head].double().numpy() @ mean, oracle.intercept_[0], abs_tol=1e-3
        )
        logits = features[head] @ probe.weight[head] + probe.bias[head]
        probability = oracle.predict_proba((x - mean) / spread)[:, 1]
        assert torch.sigmoid(logits).numpy() == pytest.approx(probability, abs=1e-3)
        assert abs(oracle.coef_[0]).max() > 0.1


def test_newton_reaches_a_gradient_of_zero_in_float64() -> None:
    pairs = random_pairs(50, dtype=torch.float64)
    ridge = 1e-6  # nearly separable heads want long steps, which are halved
    probe = fit_pair_probes(pairs, ridge=ridge, tol=1e-10)
    features, labels = pairs.examples()
    spread = features.std(1, unbiased=False)
    residual = torch.sigmoid(torch.einsum("hnf,hf->hn", features, probe.weight) + probe.bias[:, None]) - labels.double()
    standardised = (features - features.mean(1, keepdim=True)) / spread[:, None]
    gradient = torch.einsum("hn,hnf->hf", residual, standardised) / 100 + ridge * probe.weight * spread
    assert float(gradient.abs().max()) < 1e-9
    assert float(residual.mean(1).abs().max()) < 1e-9


def test_separable_pairs_and_features_without_spread_stay_finite() -> None:
    pairs = random_pairs(30)
    right = pairs.right + 50
    question = torch.cat([pairs.question[..., :2], torch.full_like(pairs.question[..., 2:], 1e4 / 3)], dim=-1)
    probe = fit_pair_probes(PairActivations(question, right, pairs.wrong), ridge=1e-8)
    assert bool(torch.isfinite(probe.weight).all())
    assert torch.equal(probe.weight[:, 2:D_HEAD], torch.zeros(HEADS, D_HEAD - 2))
    assert torch.equal(correct_fraction(probe, PairActivations(question, right, pairs.wrong)), torch.ones(HEADS, 30))


def test_pairs_that_teach_nothing_get_a_probe_that_knows_nothing() -> None:
    pairs = random_pairs(30)
    probe = fit_pair_probes(PairActivations(pairs.question, pairs.right, pairs.right))
    assert float(probe.weight.abs().max()) < 1e-4
    assert torch.equal(correct_fraction(probe, pairs._replace(wrong=pairs.right)), torch.full((HEADS, 30), 0.5))


def test_heads_in_chunks_are_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(40)
    together = fit_pair_probes(pairs)
    monkeypatch.setattr("lcc_lens.analysis.probes.converged._CHUNK", 3 * 40 * D_HEAD)
    alone = fit_pair_probes(pairs)
    assert torch.allclose(together.weight, alone.weight, atol=1e-5)
    assert torch.allclose(together.bias, alone.bias, atol=1e-4)
    assert float(together.weight.abs().max()) > 0.05


def test_what_float32_cannot_solve_is_solved_in_float64() -> None:
    pairs = random_pairs(200)
    double = PairActivations(*(z.double() for z in pairs))
    probe = fit_pair_probes(pairs, tol=1e-9)  # below what float32 can show
    assert probe.weight.dtype == torch.float32
    assert torch.equal(probe.weight, fit_pair_probes(double, tol=1e-9).weight.float())


def test_a_probe_that_cannot_be_found_is_refused() -> None:
    with pytest.raises(RequestError, match=r"expected a ridge above 0, got 0\.0"):
        fit_pair_probes(random_pairs(20), ridge=0.0)
    with pytest.raises(LensError, match="expected probes that converge within 1 steps, got 3 of 3 heads"):
        fit_pair_probes(random_pairs(20), max_steps=1)


def test_published_scores_equal_a_plain_loop_over_heads() -> None:
    features = random_features()
    components = components_of(features)
    scores = linear_probe_scores(features.layers(), components, rank=2, solver="published", seed=4)
    train, test = split_pairs(40, 0.3, seed=4)
    generator = torch.Generator().manual_seed(4)
    for layer in range(LAYERS):
        start = fit_linear_probes(torch.zeros(HEADS, 1, 2 * D_HEAD), torch.tensor([True]), epochs=0, seed=generator)
        for head in range(HEADS):
            at = (slice(None), layer, head)
            edited = features.z_pruned_question[at] + components.component(2)[layer, head]
            rows = [torch.cat([edited, z[at]], dim=-1) for z in (features.z_dense_right, features.z_dense_wrong)]
            data = [
                (torch.cat([z[part] for z in rows]), torch.arange(2 * len(part)) < len(part)) for part in (train, test)
            ]
            expected, _ = probe_accuracy(data[0], data[1], start.weight[head], start.bias[head], epochs=200)
            assert float(scores.value[layer, head]) == pytest.approx(expected)
    assert float(scores.value.max() - scores.value.min()) > 0.1


def test_standard_error_counts_pairs_not_halves() -> None:
    features = random_features(60)
    components = components_of(features)
    scores = linear_probe_scores(features.layers(), components, seed=2)
    train, test = split_pairs(60, 0.3, seed=2)
    assert (scores.selector, scores.n_examples) == ("probe", len(test))
    layer, head = 1, 2
    pairs = PairActivations(*(
        z[:, layer, head : head + 1].transpose(0, 1)
        for z in (features.z_pruned_question, features.z_dense_right, features.z_dense_wrong)
    ))  # fmt: skip
    share = correct_fraction(fit_pair_probes(pairs.take(train)), pairs.take(test))[0]
    assert float(scores.value[layer, head]) == pytest.approx(float(share.mean()))
    assert float(scores.stderr[layer, head]) == pytest.approx(float(share.std()) / math.sqrt(len(test)), rel=1e-5)
    assert scores.settings == {
        "rank": 1, "solver": "newton", "folds": None, "seed": 2, "held_out_share": 0.3, "ridge": 0.01
    }  # fmt: skip


def test_every_pair_is_held_out_once_with_folds() -> None:
    features = random_features(43)
    components = components_of(features)
    scores = linear_probe_scores(features.layers(), components, folds=5, seed=1)
    assert scores.n_examples == 43
    single = linear_probe_scores(features.layers(), components, seed=1)
    assert float(scores.stderr.mean()) < float(single.stderr.mean())
    halves = scores.value.double() * 86
    assert torch.allclose(halves, halves.round(), atol=1e-4)
    assert float(scores.value[1].min()) > float(scores.value[0].max())
    assert "held_out_share" not in scores.settings


def test_leave_one_pair_out_equals_refitting_without_it() -> None:
    features = random_features(12)
    scores = linear_probe_scores(features.layers(), components_of(features), folds=12)
    pairs = PairActivations(*(
        z[:, 1].transpose(0, 1)
        for z in (features.z_pruned_question, features.z_dense_right, features.z_dense_wrong)
    ))  # fmt: skip
    shares = [
        correct_fraction(
            fit_pair_probes(pairs.take(torch.tensor([j for j in range(12) if j != i]))), pairs.take(torch.tensor([i]))
        )
        for i in range(12)
    ]
    assert torch.allclose(scores.value[1], torch.cat(shares, dim=1).mean(1))


def test_a_constant_edit_cannot_matter_to_a_converged_linear_probe() -> None:
    features = random_features()
    components = components_of(features)
    first, full = (linear_probe_scores(features.layers(), components, rank=rank) for rank in (1, D_HEAD))
    assert torch.equal(first.value, full.value)
    assert float((components.component(1) - components.component()).abs().max()) > 0.1


@pytest.mark.parametrize("score", [linear_probe_scores, score_interaction_probe])
def test_unfit_requests_are_refused(score) -> None:
    features = random_features()
    components = components_of(features)
    layers = list(features.layers())
    with pytest.raises(RequestError, match="expected at least 4 contrastive pairs, got 3"):
        score([LayerFeatures(*(z[:3] for z in layer)) for layer in layers], components)
    for rank in (0, D_HEAD + 1):
        with pytest.raises(RequestError, match=f"expected a rank between 1 and d_head = 6, got {rank}"):
            score(layers, components, rank=rank)
    with pytest.raises(RequestError, match="expected 2 layers of activations as in the components, got 1; take both"):
        score(layers[:1], components)
    with pytest.raises(RequestError, match=r"expected 2 layers of activations \(40, 3, 6\).* got another at layer 2"):
        score([*layers, layers[0]], components)
    with pytest.raises(RequestError, match=r"expected 2 layers .* got \(40, 2, 6\) at layer 0"):
        score([LayerFeatures(*(z[:, :2] for z in layer)) for layer in layers], components)
    broken = layers[1]._replace(z_dense_right=layers[1].z_dense_right / 0)
    with pytest.raises(LensError, match="expected finite activations, got NaN or infinity in layer 1"):
        score([layers[0], broken], components)


@pytest.mark.parametrize("folds", [1, 41])
def test_folds_outside_two_to_the_number_of_pairs_are_refused(folds: int) -> None:
    features = random_features()
    with pytest.raises(RequestError, match=f"expected between 2 and 40 folds .* got {folds}"):
        linear_probe_scores(features.layers(), components_of(features), folds=folds)


def interaction_law(depends: bool, n_pairs: int = 400, turned_by: int = 2) -> ProbeFeatures:
    """Pruning removes coordinate 2 of the question; the answers' difference may turn with a coordinate's sign.

    Without the dependence the difference turns with a coin of its own, so that no probe can tell the halves apart.
    """
    generator = torch.Generator().manual_seed(7)
    z_dense, base, noise = torch.randn(3, n_pairs, LAYERS, HEADS, D_HEAD, generator=generator)
    z_pruned = z_dense.clone()
    z_pruned[..., 2] = 0.1 * torch.randn(n_pairs, LAYERS, HEADS, generator=generator)
    coin = torch.randn(n_pairs, LAYERS, HEADS, generator=generator)
    turn = (z_dense[..., turned_by] if depends else coin).sign()
    half = 0.6 * noise
    half[..., 4] += turn
    return ProbeFeatures(z_pruned, base + half, base - half, z_dense_question=z_dense)


def test_interaction_with_what_pruning_removed_is_seen_and_nothing_else() -> None:
    real, none = interaction_law(True), interaction_law(False)
    seen = score_interaction_probe(real.layers(), components_of(real), rank=1, max_pairs=400)
    unseen = score_interaction_probe(none.layers(), components_of(none), rank=1, max_pairs=400)
    assert float((seen.value / seen.stderr).min()) > 3
    assert float((unseen.value / unseen.stderr).abs().max()) < 3
    assert float(seen.value.min()) > 4 * float(unseen.value.abs().max())
    accuracy = {key: torch.tensor(seen.settings[f"accuracy_{key}"]) for key in ("pruned", "restored")}
    assert float(accuracy["restored"].min()) > 0.75
    assert float(accuracy["pruned"].max()) < 0.65
    assert seen.settings["ridge"][0][0] in RIDGES
    assert (seen.selector, seen.n_examples) == ("interaction", 400)


def test_interaction_with_what_pruning_kept_is_no_credit_to_the_restoration() -> None:
    features = interaction_law(True, turned_by=3)
    scores = score_interaction_probe(features.layers(), components_of(features), rank=1)
    assert float((scores.value / scores.stderr).abs().max()) < 3
    assert torch.tensor(scores.settings["accuracy_pruned"]).min() > 0.75


@pytest.mark.parametrize("solver", ["newton", "published"])
def test_a_linear_probe_cannot_see_an_interaction(solver) -> None:
    for depends in (True, False):
        features = interaction_law(depends)
        scores = linear_probe_scores(features.layers(), components_of(features), solver=solver, rank=1)
        assert float(((scores.value - 0.5) / scores.stderr).abs().max()) < 3.5


def test_nothing_lost_scores_exactly_zero() -> None:
    features = random_features()
    same = ProbeFeatures(
        features.z_pruned_question, features.z_dense_right, features.z_dense_wrong, features.z_pruned_question
    )
    scores = score_interaction_probe(same.layers(), components_of(features), rank=2)
    assert torch.equal(scores.value, torch.zeros(LAYERS, HEADS))
    assert torch.equal(scores.stderr, torch.zeros(LAYERS, HEADS))
    moved = score_interaction_probe(features.layers(), components_of(features), rank=2)
    assert float(moved.value.abs().min()) > 0


def test_left_out_predictions_equal_refitting_on_both_orders_of_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    a, d = torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64)
    kernel = interaction_kernel(a, d)
    found = leave_one_out(kernel, (0.5, 5.0))
    for k, ridge in enumerate((0.5, 5.0)):
        for head in range(2):
            for out in range(9):
                kept = [i for i in range(9) if i != out]
                # Every pair twice, as it is and exchanged; twice the data balance twice the ridge
                sign = torch.cat([torch.ones(8), -torch.ones(8)]).double()
                inner = kernel[head][kept + kept][:, kept + kept] * sign[:, None] * sign
                weights = torch.linalg.solve(inner + 2 * ridge * torch.eye(16), sign)
                expected = (kernel[head, out, kept + kept] * sign) @ weights
                assert float(found[k, head, out]) == pytest.approx(float(expected), abs=1e-10)
    assert float(found.std()) > 0.05


def test_interaction_kernel_is_that_of_a_bilinear_model() -> None:
    generator = torch.Generator().manual_seed(3)
    a, d = torch.randn(2, 1, 9, 4, generator=generator, dtype=torch.float64)
    x = (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True, unbiased=False)
    y = d / d.square().mean(1, keepdim=True).sqrt()
    rows = torch.stack([torch.cat([y[0, i] / 2, torch.outer(x[0, i], y[0, i]).flatten() / 4]) for i in range(9)])
    assert torch.allclose(interaction_kernel(a, d)[0], rows @ rows.T)
    assert torch.allclose(interaction_kernel(3 * a + 5, d), interaction_kernel(a, d))
    assert torch.allclose(interaction_kernel(a, -d), interaction_kernel(a, d))


def test_the_loss_is_bounded_by_that_of_the_opposite_answer() -> None:
    assert squared_loss(torch.tensor([1.0, 0.0, -1.0, -9.0, 2.0])).tolist() == [1 - 1, 1, 4, 4, 1]


def test_interaction_ridge_is_the_best_for_both_models_and_pairs_are_limited() -> None:
    features = interaction_law(True, n_pairs=50)
    components = components_of(features)
    scores = score_interaction_probe(features.layers(), components, max_pairs=30, seed=1)
    assert scores.n_examples == 30
    fixed = [score_interaction_probe(features.layers(), components, max_pairs=30, seed=1, ridges=(r,)) for r in RIDGES]
    ridge = torch.tensor(scores.settings["ridge"])
    chosen = torch.stack([s.value for s in fixed]).gather(0, (ridge.log10().round().long())[None])[0]
    assert torch.equal(scores.value, chosen)
    assert not torch.equal(scores.value, score_interaction_probe(features.layers(), components, max_pairs=30).value)


def test_interaction_probe_refuses_what_it_cannot_use() -> None:
    features = random_features()
    components = components_of(features)
    bare = ProbeFeatures(features.z_pruned_question, features.z_dense_right, features.z_dense_wrong)
    with pytest.raises(RequestError, match="expected the dense model's questions beside the pruned model's, got none"):
        score_interaction_probe(bare.layers(), components)
    with pytest.raises(RequestError, match=r"expected ridges above 0, got \(0\.0,\)"):
        score_interaction_probe(features.layers(), components, ridges=(0.0,))
    with pytest.raises(RequestError, match="expected max_pairs of at least 4, got 3"):
        score_interaction_probe(features.layers(), components, max_pairs=3)
