"""What the head map can show: one number per head each, with its unit and what it means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.frontends.explorer.arrays import packed
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.restoration.result import Restoration

#: Title, unit, factor from the score to that unit, and meaning of every selector's score.
_SELECTORS: dict[str, tuple[str, str, float, str]] = {
    "probe": ("Linear probe", "%", 100.0, "Accuracy of a linear probe that tells right answers from wrong ones."),
    "interaction": (
        "Interaction probe",
        "",
        1.0,
        "Squared error that a probe of the right answer saves with the restored head.",
    ),
    "attribution": ("Attribution patching", "nats", 1.0, "The gradient's estimate of what the dense head would bring."),
    "patching": ("Activation patching", "nats", 1.0, "What the pruned model gains when it is given this dense head."),
    "gradient": ("Gradient", "nats", 1.0, "What a training step of length one on the head's constant gains."),
    "kl": ("KL of votes", "nats", 1.0, "How differently the dense and the pruned head vote through the logit lens."),
    "mse": ("Squared difference", "", 1.0, "The mean squared difference per coordinate of the head's output."),
}


@dataclass(frozen=True)
class View:
    """One number per head, NaN where a head was removed; ``stderr`` is in the same unit."""

    key: str
    title: str
    unit: str
    meaning: str
    value: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"] | None = None
    n_examples: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As the page reads it."""
        return {
            "key": self.key,
            "title": self.title,
            "unit": self.unit,
            "meaning": self.meaning,
            "value": packed(self.value),
            "stderr": None if self.stderr is None else packed(self.stderr),
            "examples": self.n_examples,
        }


def views(run: RunContents) -> list[View]:
    """Everything that the head map of a run can show, the change itself first."""
    if run.scan is None:
        return []
    found = views_of_scan(run.scan)
    if run.restoration is not None and run.restoration.heads:
        learned = _learned(run.scan, run.restoration)
        found.append(replace(learned, value=present(run.scan, learned.value)))
    return found


def views_of_scan(scan: Scan) -> list[View]:
    """What a scan alone has to show: the change of every head, then the selectors' scores."""
    return [replace(view, value=present(scan, view.value)) for view in (*_changes(scan), *_scores(scan))]


def _changes(scan: Scan) -> Iterator[View]:
    """The statistics of the difference."""
    first = scan.components.explained_share()[..., 0]
    yield View("changed", "Changed", "%", "How much of the head's output pruning changed: the root of the squared "
               "difference over the squared output of the dense head.", 100 * scan.relative_loss)  # fmt: skip
    yield View("constant", "Constant share", "%", "The share of the squared difference that is the same for every "
               "input: all that a constant can mend.", 100 * scan.constant_share)  # fmt: skip
    yield View("first", "First direction", "%", "The share of the squared difference along its first direction: "
               "high where the loss is simple.", 100 * first)  # fmt: skip
    yield View("rank", "Effective rank", "directions", "How many directions the difference really takes.",
               scan.components.effective_rank)  # fmt: skip
    yield View("turned", "Cosine distance", "", "How far the head's output points elsewhere: one minus the cosine "
               "between both models' outputs.", 1 - scan.cosine)  # fmt: skip


def _scores(scan: Scan) -> Iterator[View]:
    """What the selectors say."""
    for name, scores in {**scan.selected_by, "mse": scan.scores("mse")}.items():
        title, unit, factor, meaning = _SELECTORS.get(name, (name, "", 1.0, "A selector's score."))
        yield _score(f"selector-{name}", title, unit, factor, meaning, scores)


def _score(key: str, title: str, unit: str, factor: float, meaning: str, scores: HeadScores) -> View:
    return View(key, title, unit, meaning, factor * scores.value, factor * scores.stderr, scores.n_examples)


def _learned(scan: Scan, restoration: Restoration) -> View:
    """The size of the learned constant beside that of the mean difference."""
    value = torch.full_like(scan.relative_loss, math.nan)
    for head, constant in zip(restoration.heads, restoration.constants, strict=True):
        size = float(scan.mean_difference[head].norm())
        value[head] = 100 * float(constant.norm()) / size if size > 0 else math.nan
    return View("learned", "Learned constant", "%", "The length of the constant that training found, in percent of the "
                "mean difference's; heads without one are blank.", value)  # fmt: skip


def present(scan: Scan, value: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """The values with NaN for heads that pruning removed whole, and for what is not finite."""
    blank = ~value.isfinite()
    for layer, removed in enumerate(scan.head_map.removed):
        blank[layer, list(removed)] = True
    return value.float().masked_fill(blank, math.nan)
