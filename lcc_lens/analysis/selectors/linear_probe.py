"""The paper's selector: how well a linear probe on the restored activation tells right from wrong answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.probes.converged import RIDGE, PairActivations, correct_fraction, fit_pair_probes
from lcc_lens.analysis.probes.published import fit_linear_probes, split_pairs
from lcc_lens.core.errors import LensError, RequestError

MIN_PAIRS = 4
Solver = Literal["newton", "published"]
_SOLVERS: tuple[Solver, ...] = get_args(Solver)
_Splits = list[tuple[Int[Tensor, " train"], Int[Tensor, " test"]]]


class LayerFeatures(NamedTuple):
    """Head outputs of contrastive pairs in one layer, at the last tokens of the question and of both answers."""

    z_pruned_question: Float[Tensor, "pair head d_head"]
    z_dense_question: Float[Tensor, "pair head d_head"] | None
    z_dense_right: Float[Tensor, "pair head d_head"]
    z_dense_wrong: Float[Tensor, "pair head d_head"]


def linear_probe_scores(
    layers: Iterable[LayerFeatures],
    components: LostComponents,
    *,
    rank: int = 1,
    solver: Solver = "newton",
    folds: int | None = None,
    held_out_share: float = 0.3,
    ridge: float = RIDGE,
    seed: int = 0,
) -> HeadScores:
    r"""Held-out accuracy of one linear probe per head on $[z_c^q ; z_{dense}^{q+r}]$, with its standard error.

    The edited activation is $z_c^q = z_{pruned}^q + c$ with the head's lost component of the given rank; pairs with
    the right answer are labelled 1, with the wrong one 0; pairs stay together. The standard error is taken over
    held-out pairs, each with the mean of its halves. It leaves out the variation between splits, and is slightly too
    small with folds, whose probes share training pairs.

    $c$ is the same for all pairs and only shifts the probe's bias: with ``newton`` the rank changes no score.

    Args:
        layers: activations of the pairs, layer by layer (any iterable).
        rank: K, the number of directions in the edit (the paper's text says 1, its code 10).
        solver: ``newton`` finds the minimum of the penalised loss (:func:`fit_pair_probes`); ``published`` takes the
            paper's 200 steps of Adam and depends on its random start.
        folds: number of cross-validation folds; one split if not given.
        held_out_share: fraction of the pairs held out in a single split.
        ridge: the penalty of ``newton``.
        seed: of the split and of the published start.

    Returns:
        Scores "probe" between 0 and 1.

    Raises:
        RequestError: an unknown solver, fewer than 4 pairs, a rank outside 1 and d_head, folds outside 2 and the number
            of pairs, or layers that do not fit the components.
        LensError: an activation is not finite.

    Reference: RestoreLCC (arXiv 2510.21834), Eq. 7 and section 4.1.
    """
    check_solver(solver)
    component = components.component(rank)
    generator = torch.Generator().manual_seed(seed)  # shared by all layers, so that every head starts differently
    splits: _Splits = []
    correct = []
    for layer, features in enumerate(checked_layers(layers, components)):
        splits = splits or _splits(len(features.z_dense_right), folds, held_out_share, seed)
        pairs = _edited_pairs(features, component[layer])
        parts = []
        for train, test in splits:
            if solver == "newton":
                probe = fit_pair_probes(pairs.take(train), ridge=ridge)
            else:
                probe = fit_linear_probes(*pairs.take(train).examples(), seed=generator)
            parts.append(correct_fraction(probe, pairs.take(test)).T.cpu())
        correct.append(torch.cat(parts))
    settings: dict[str, Any] = {"rank": rank, "solver": solver, "folds": folds, "seed": seed}
    settings |= {"held_out_share": held_out_share} if folds is None else {}
    settings |= {"ridge": ridge} if solver == "newton" else {}
    return HeadScores.from_examples("probe", torch.stack(correct, dim=1), settings)


def check_solver(solver: str) -> None:
    """Refuse a solver that there is not."""
    if solver not in _SOLVERS:
        raise RequestError(f"expected a probe solver ({', '.join(_SOLVERS)}), got {solver!r}; choose one")


def checked_layers(layers: Iterable[LayerFeatures], components: LostComponents) -> Iterator[LayerFeatures]:
    """The same layers, after a check that each fits the components and is finite."""
    n_layers, n_heads, _, d_head = components.directions.shape
    count, n_pairs = 0, None
    for features in layers:
        present = [z for z in features if z is not None]
        n_pairs = present[0].shape[0] if n_pairs is None else n_pairs
        if n_pairs < MIN_PAIRS:
            raise RequestError(f"expected at least {MIN_PAIRS} contrastive pairs, got {n_pairs}; scan more examples")
        shape = (n_pairs, n_heads, d_head)
        wrong = next((tuple(z.shape) for z in present if z.shape != shape), None)
        if wrong is not None or count == n_layers:
            raise RequestError(
                f"expected {n_layers} layers of activations {shape} as in the components, got {wrong or 'another'} at "
                f"layer {count}; take both from the same scan"
            )
        if not all(bool(torch.isfinite(z.sum())) for z in present):
            raise LensError(f"expected finite activations, got NaN or infinity in layer {count}; check the weights")
        yield features
        count += 1
    if count < n_layers:
        raise RequestError(
            f"expected {n_layers} layers of activations as in the components, got {count}; take both from the same scan"
        )


def by_head(z: Float[Tensor, "pair head d_head"]) -> Float[Tensor, "head pair d_head"]:
    """Move heads to the first axis, in float32 or higher; half precision is only for storage."""
    return z.to(torch.promote_types(z.dtype, torch.float32)).transpose(0, 1)


def _edited_pairs(features: LayerFeatures, component: Float[Tensor, "head d_head"]) -> PairActivations:
    question = by_head(features.z_pruned_question)
    edited = question + component[:, None].to(question)
    return PairActivations(edited, by_head(features.z_dense_right), by_head(features.z_dense_wrong))


def _splits(n_pairs: int, folds: int | None, held_out_share: float, seed: int) -> _Splits:
    """Training and held-out pairs of one split or of every fold."""
    if folds is None:
        return [split_pairs(n_pairs, held_out_share, seed)]
    if not 2 <= folds <= n_pairs:
        raise RequestError(f"expected between 2 and {n_pairs} folds (the number of pairs), got {folds}")
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(folds)
    return [(torch.cat([*parts[:fold], *parts[fold + 1 :]]), parts[fold]) for fold in range(folds)]
