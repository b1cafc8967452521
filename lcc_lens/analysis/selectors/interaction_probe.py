"""Interaction probe: how much the restored activation helps to tell right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.probes.kernel import interaction_kernel, leave_one_out, squared_loss
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, by_head, checked_layers
from lcc_lens.core.errors import RequestError

#: Values of the ridge to choose from; the kernel's diagonal is about 2.
RIDGES = (1.0, 10.0, 100.0, 1000.0)
#: Maximum number of elements in the kernels of one chunk.
_CHUNK = 1 << 23


def score_interaction_probe(
    layers: Iterable[LayerFeatures],
    components: LostComponents,
    *,
    rank: int = 1,
    ridges: tuple[float, ...] = RIDGES,
    max_pairs: int = 256,
    seed: int = 0,
) -> HeadScores:
    r"""How much better the restored activation predicts a pair's right answer than the pruned one does.

    A linear probe with a bias cannot use an activation that both halves of a pair share. Here it sets the weights on
    the answers' difference $d = z_{dense}^{q+r^+} - z_{dense}^{q+r^-}$:

    $$P(\text{right}) \text{ rises with } f(a, d) = (w + B a) \cdot d, \qquad
      a = z_{pruned}^q \text{ or } a = z_{pruned}^q + P_K (z_{dense}^q - z_{pruned}^q)$$

    with $P_K$ the projection on the head's first $K$ lost directions, question by question: the mean edit is constant
    over pairs, and $w$ absorbs $B$ times a constant. $f$ is fitted to the target 1 by kernel ridge regression
    (:func:`interaction_kernel`), every pair is predicted by the fit on all others (:func:`leave_one_out`), and the
    score is the mean over pairs of the squared error (at most 4) with the pruned activation minus that with the
    restored one. Both use the same ridge: the one with the smallest summed error. The standard error is taken over
    pairs; the fits share them, so it is approximate. Time grows with the cube of the number of pairs.

    Args:
        layers: activations of the pairs, layer by layer, with the dense model's questions.
        ridges: values of the ridge to choose from, head by head.
        max_pairs: maximum number of pairs; of more, a sample drawn with ``seed``.

    Returns:
        Scores "interaction", around or slightly below 0 where the edit adds nothing. The settings have, by layer and
        head, the chosen ``ridge`` and the fraction of pairs ordered correctly: ``accuracy_pruned`` and
        ``accuracy_restored``.

    Raises:
        RequestError: fewer than 4 pairs, a rank outside 1 and d_head, a ridge not above 0, or layers without the
            dense model's questions or of other shapes than the components.
        LensError: an activation is not finite.
    """
    components.component(rank)  # refuses a rank outside 1 and d_head
    if not ridges or min(ridges) <= 0:
        raise RequestError(f"expected ridges above 0, got {ridges}; omit them for {RIDGES}")
    if max_pairs < 4:
        raise RequestError(f"expected max_pairs of at least 4, got {max_pairs}; raise it")
    improvement: list[Tensor] = []
    report: dict[str, list[list[float]]] = {"ridge": [], "accuracy_pruned": [], "accuracy_restored": []}
    for layer, features in enumerate(checked_layers(layers, components)):
        order = torch.randperm(len(features.z_dense_right), generator=torch.Generator().manual_seed(seed))
        chosen = order[:max_pairs].sort().values  # the same pairs in every layer
        pruned, restored, difference = _inputs(features, components.directions[layer, :, :rank], chosen)
        predicted, ridge = _predict(pruned, restored, difference, ridges)
        loss_pruned, loss_restored = squared_loss(predicted)
        improvement.append((loss_pruned - loss_restored).T.cpu())
        accuracy = ((predicted > 0).double() + (predicted == 0).double() / 2).mean(-1)  # a tie counts half
        for values, value in zip(report.values(), (ridge, *accuracy.tolist()), strict=True):
            values.append(value)
    settings = {"rank": rank, "max_pairs": max_pairs, "seed": seed, "ridges": list(ridges), **report}
    return HeadScores.from_examples("interaction", torch.stack(improvement, dim=1), settings)


def _inputs(
    features: LayerFeatures, directions: Float[Tensor, "head rank d_head"], chosen: Int[Tensor, " chosen"]
) -> tuple[Float[Tensor, "head pair d_head"], Float[Tensor, "head pair d_head"], Float[Tensor, "head pair d_head"]]:
    """The pruned and the restored question and the difference of the answers."""
    if features.z_dense_question is None:
        raise RequestError("expected the dense model's questions beside the pruned model's, got none; scan again")
    index = chosen.to(features.z_dense_right.device)
    pruned, dense, right, wrong = (by_head(z[index]) for z in features if z is not None)
    v = directions.to(pruned)
    return pruned, pruned + (dense - pruned) @ v.mT @ v, right - wrong


def _predict(
    pruned: Float[Tensor, "head pair d_head"],
    restored: Float[Tensor, "head pair d_head"],
    difference: Float[Tensor, "head pair d_head"],
    ridges: tuple[float, ...],
) -> tuple[Float[Tensor, "model head pair"], list[float]]:
    """Left-out predictions with the pruned and the restored question, and each head's ridge."""
    n_heads, n_pairs, _ = pruned.shape
    size = max(1, _CHUNK // n_pairs**2)
    predictions, chosen = [], []
    for part in (slice(first, first + size) for first in range(0, n_heads, size)):
        both = torch.stack(
            [leave_one_out(interaction_kernel(a[part], difference[part]), ridges) for a in (pruned, restored)]
        )
        best = squared_loss(both).mean(-1).sum(0).argmin(0)
        predictions.append(both[:, best, torch.arange(len(best), device=best.device)])
        chosen += [ridges[i] for i in best.tolist()]
    return torch.cat(predictions, dim=1), chosen
