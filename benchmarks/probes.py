"""Time the linear probes of all heads against a plain loop over heads, on synthetic activations.

    python benchmarks/probes.py [--repeats 3] [--out benchmarks/probes.json]

270 heads (30 layers of 9), 1,000 contrastive pairs, d_head 64. The loop is the published procedure written down
plainly: for each head a linear layer, sigmoid, binary cross-entropy and 200 full-batch steps of Adam. All sides are
interleaved and include everything from the activations to the held-out accuracies; a ratio is the median over repeats
of loop / ours, with the smallest and largest. The synthetic heads have decaying spectra in a random basis, answers
that share most of their variance with each other and some with the question, and a planted signal of known strength,
which says how well each ranking finds the heads that matter.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from run import describe, timed
from torch import nn

from lcc_lens.analysis.components import LostComponents, components_from_moments
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.probes.published import split_pairs
from lcc_lens.analysis.selectors.interaction_probe import score_interaction_probe
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, linear_probe_scores
from lcc_lens.core.files import write_json

LAYERS, HEADS, PAIRS, D_HEAD = 30, 9, 1000, 64
STRONGEST = 1.0  # in standard deviations of an answer along the signal's direction


def synthetic(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Activations ``[pair, layer, head, d_head]``, in the order of LayerFeatures, and each head's signal strength."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (PAIRS, LAYERS, HEADS, D_HEAD)
    basis = torch.linalg.qr(normal(LAYERS, HEADS, D_HEAD, D_HEAD))[0]
    mix = torch.arange(1.0, D_HEAD + 1).pow(-0.7)[:, None] * basis
    strength = STRONGEST * torch.rand(LAYERS, HEADS, generator=generator)
    direction = nn.functional.normalize(normal(LAYERS, HEADS, D_HEAD), dim=-1) * strength[..., None]
    question, answer = normal(*shape), normal(*shape)
    answer = (0.5 * question + answer) / 1.12
    right, wrong = (0.8 * answer + 0.6 * normal(*shape) + sign * direction / 2 for sign in (1, -1))
    pruned = 0.8 * question + 0.3 * normal(*shape)
    return [torch.einsum("nlhd,lhde->nlhe", z, mix) for z in (pruned, question + 0.2, right, wrong)], strength


def loop_over_heads(layers: list[LayerFeatures], components: LostComponents, seed: int = 0) -> torch.Tensor:
    """The published probe, one head after the other, with the starts that the batched version draws."""
    train, test = split_pairs(PAIRS, 0.3, seed)
    generator = torch.Generator().manual_seed(seed)
    edit, accuracy = components.component(1), torch.zeros(LAYERS, HEADS)
    for i, layer in enumerate(layers):
        start = (torch.rand(HEADS, 2 * D_HEAD + 1, generator=generator) * 2 - 1) / math.sqrt(2 * D_HEAD)
        for head in range(HEADS):
            question = layer.z_pruned_question[:, head] + edit[i, head]
            right = torch.cat([question, layer.z_dense_right[:, head]], dim=-1)
            wrong = torch.cat([question, layer.z_dense_wrong[:, head]], dim=-1)
            sides = [torch.cat([right[part], wrong[part]]) for part in (train, test)]
            labels = [(torch.arange(2 * len(part)) < len(part)).float() for part in (train, test)]
            probe = trained(sides[0], labels[0], start[head])
            with torch.no_grad():
                accuracy[i, head] = ((probe(sides[1]).squeeze(-1) >= 0.5) == labels[1].bool()).float().mean()
    return accuracy


def trained(rows: torch.Tensor, labels: torch.Tensor, start: torch.Tensor) -> nn.Module:
    linear = nn.Linear(rows.shape[1], 1)
    with torch.no_grad():
        linear.weight.copy_(start[None, :-1])
        linear.bias.copy_(start[-1:])
    probe = nn.Sequential(linear, nn.Sigmoid())
    optimizer, loss = torch.optim.Adam(probe.parameters(), lr=1e-2), nn.BCELoss()
    for _ in range(200):
        optimizer.zero_grad()
        loss(probe(rows).squeeze(-1), labels).backward()
        optimizer.step()
    return probe


def interleaved(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, one after the other in each repeat, after one run of each but the loop to warm up."""
    for name, work in sides.items():
        if name != "loop":
            work()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            times[name].append(timed(work))
    return times


def spread(values: list[float], digits: int) -> dict[str, float]:
    found = (statistics.median(values), min(values), max(values))
    return {key: round(v, digits) for key, v in zip(("median", "smallest", "largest"), found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "probes.json")
    arguments = parser.parse_args()
    features, strength = synthetic(seed=0)
    lost = features[1] - features[0]
    components = components_from_moments(lost.sum(0), torch.einsum("nlhd,nlhe->lhde", lost, lost), PAIRS)
    layers = [LayerFeatures(*(z[:, layer] for z in features)) for layer in range(LAYERS)]
    scores: dict[str, HeadScores] = {}

    def run(name: str, **options) -> Callable[[], object]:
        return lambda: scores.__setitem__(name, linear_probe_scores(layers, components, **options))

    def loop() -> None:
        accuracy = loop_over_heads(layers, components)
        scores["loop"] = HeadScores("loop", accuracy, torch.zeros_like(accuracy), PAIRS)

    sides = {
        "loop": loop,
        "published": run("published", solver="published"),
        "newton": run("newton"),
        "newton, 5 folds": run("newton, 5 folds", folds=5),
    }
    times = interleaved(sides, arguments.repeats)
    one_layer = LostComponents(
        components.directions[:1], components.singular_values[:1], components.coefficients[:1], components.n_samples
    )
    interaction = timed(lambda: score_interaction_probe(layers[:1], one_layer))
    planted = HeadScores("planted", strength, torch.zeros_like(strength), PAIRS)
    top = LAYERS * HEADS // 4
    best = {name: set(found.value.flatten().topk(top).indices.tolist()) for name, found in scores.items()}
    result = {
        "command": "python benchmarks/probes.py",
        "machine": describe(),
        "sizes": {"layers": LAYERS, "heads": HEADS, "pairs": PAIRS, "d_head": D_HEAD},
        "seconds": {name: spread(values, 3) for name, values in times.items()},
        "loop / ours": {
            name: spread([a / b for a, b in zip(times["loop"], values, strict=True)], 2)
            for name, values in times.items() if name != "loop"
        },
        "interaction probe, seconds a head": round(interaction / HEADS, 3),
        "mean accuracy": {name: round(float(found.value.mean()), 4) for name, found in scores.items()},
        "mean standard error": {n: round(float(s.stderr.mean()), 4) for n, s in scores.items() if n != "loop"},
        "largest difference, published - loop": float((scores["published"].value - scores["loop"].value).abs().max()),
        "rank correlation with the loop": {n: round(s.rank_correlation(scores["loop"]), 4) for n, s in scores.items()},
        "rank correlation with the planted signal": {
            name: round(found.rank_correlation(planted), 4) for name, found in scores.items()
        },
        "share of the loop's best quarter": {n: round(len(b & best["loop"]) / top, 3) for n, b in best.items()},
    }  # fmt: skip
    write_json(arguments.out, result)
    for name, row in result["loop / ours"].items():
        print(f"loop / {name:<20} {row['median']:.2f}  ({row['smallest']:.2f} to {row['largest']:.2f})")


if __name__ == "__main__":
    main()
