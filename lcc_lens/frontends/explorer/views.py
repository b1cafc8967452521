"""Quantities that the head map can show: one number per head, with its unit and meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.head_types.result import MEASURES, HeadTypes
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.heads import all_heads
from lcc_lens.frontends.explorer.texts import TextReading
from lcc_lens.frontends.run_contents import RunContents
from lcc_lens.restoration.result import Restoration

#: Title, unit, factor from the score to that unit, and meaning of every selector's score.
_SELECTORS: dict[str, tuple[str, str, float, str]] = {
    "probe": ("Linear probe", "%", 100.0, "Accuracy of a linear probe that tells right answers from wrong ones."),
    "interaction": ("Interaction probe", "", 1.0,
                    "Decrease of the squared error of a probe for the right answer when the head is restored."),
    "attribution": ("Attribution patching", "nats", 1.0,
                    "Gradient estimate of the gain from patching in the dense head's output."),
    "patching": ("Activation patching", "nats", 1.0,
                 "Gain of the pruned model when the dense head's output is patched in."),
    "gradient": ("Gradient", "nats", 1.0, "Gain from one training step of length one on the head's constant."),
    "kl": ("KL, logit lens", "nats", 1.0,
           "KL divergence between what the dense and the pruned head promote, read through the logit lens."),
    "own": ("Own loss", "", 1.0, "Mean squared difference per coordinate that comes from the head's own weights."),
    "mse": ("Mean squared difference", "", 1.0, "Mean squared difference per coordinate of the head's output."),
}  # fmt: skip


#: Title of every cause of a difference, and the end of the sentence that explains its share.
_CAUSES = {
    "inherited": ("Inherited", "comes from the changed input of its layer"),
    "pattern": ("Own pattern", "comes from its own pruned queries and keys"),
    "value": ("Own values", "comes from its own pruned values"),
}


#: Title and meaning of the scores of head types that are views.
_TYPES = {
    "induction": ("Induction", "Share of attention, on repeated random tokens, at the token after an earlier copy of "
                  "the current one: high in induction heads."),
    "total_variation": ("Pattern distance", "Total variation between this model's attention pattern and the dense "
                        "model's, mean over tokens."),
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """One number per head, NaN where a head was removed; ``stderr`` is in the same unit.

    ``code`` is the expression that computes ``value``, of ``scan`` and, where a run has them, of ``restoration`` and of
    ``seen``, the comparison of a prompt.
    """

    key: str
    title: str
    unit: str
    meaning: str
    value: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"] | None = None
    n_examples: int | None = None
    code: str = ""
    prompt: str | None = None


def views(run: RunContents, texts: Sequence[TextReading] = ()) -> list[View]:
    """All views of a run, the change itself first, the changes on prompts last."""
    if run.scan is None:
        return []
    shown = views_of_scan(run.scan)
    if run.restoration is not None and run.restoration.heads:
        learned = _learned(run.scan, run.restoration)
        shown.append(replace(learned, value=present(run.scan, learned.value)))
    if run.types is not None:
        shown += [replace(view, value=present(run.scan, view.value)) for view in _types(run.types, run.path)]
    for place, text in enumerate(texts):
        if text.kind == "prompt":
            shown += [replace(v, value=present(run.scan, v.value)) for v in _on_prompt(place, text)]
    return shown


def views_of_scan(scan: Scan) -> list[View]:
    """The views of a scan alone: the change of every head, its causes, then the selectors' scores."""
    return [
        replace(view, value=present(scan, view.value)) for view in (*_changes(scan), *_causes(scan), *_scores(scan))
    ]


def _changes(scan: Scan) -> Iterator[View]:
    """Statistics of the difference."""
    first = scan.components.explained_share()[..., 0]
    yield View("changed", "Relative change", "%", "Relative change of the output z: |dense − pruned| / |dense|, "
               "root mean square over positions.", 100 * scan.relative_loss,
               code="100 * scan.relative_loss")  # fmt: skip
    yield View("constant", "Constant share", "%", "Share of the squared difference that is the same for every input: "
               "the most that a constant, hence a bias, can correct.", 100 * scan.constant_share,
               code="100 * scan.constant_share")  # fmt: skip
    yield View("first", "First direction", "%", "Share of the squared difference along its first singular direction: "
               "high where the difference is close to rank one.", 100 * first,
               code="100 * scan.components.explained_share()[..., 0]")  # fmt: skip
    yield View("rank", "Effective rank", "directions", "Effective number of directions of the difference.",
               scan.components.effective_rank, code="scan.components.effective_rank")  # fmt: skip
    yield View("turned", "Cosine distance", "", "One minus the cosine between the dense and the pruned output.",
               1 - scan.cosine, code="1 - scan.cosine")  # fmt: skip


def _scores(scan: Scan) -> Iterator[View]:
    """Scores of the selectors."""
    for name, scores in {**scan.selected_by, "mse": scan.scores("mse")}.items():
        title, unit, factor, meaning = _SELECTORS.get(name, (name, "", 1.0, "Score of a selector."))
        value, stderr = factor * scores.value, factor * scores.stderr
        code = f"scan.scores({name!r}).value"
        code = code if factor == 1 else f"{factor:g} * {code}"
        yield View(f"selector-{name}", title, unit, meaning, value, stderr, scores.n_examples, code)


def _causes(scan: Scan) -> Iterator[View]:
    """The share of every cause in a head's squared difference."""
    if scan.causes is None:
        return
    parts = scan.causes.heads
    for place, cause in enumerate(parts.causes):
        title, meaning = _CAUSES[cause]
        yield View(f"cause-{cause}", title, "%", f"Share of the head's squared difference that {meaning}.",
                   100 * parts.fraction[..., place], 100 * parts.stderr[..., place], scan.record.n_examples,
                   f"100 * scan.causes.heads.by_cause()[{cause!r}]")  # fmt: skip


def _types(types: HeadTypes, path: Path) -> Iterator[View]:
    """Induction score in every model, and how far attention patterns are from the dense model's."""
    record = types.record
    for name, (title, meaning) in _TYPES.items():
        n_sequences = record.n_texts if name in MEASURES else record.n_sequences
        for place, model in enumerate(record.models):
            if name == "total_variation" and model == "dense":
                continue
            yield View(f"{name}-{model}", f"{title}, {model}", "%", meaning, 100 * types.value[name][place],
                       100 * types.stderr[name][place], n_sequences,
                       f"100 * lcc.HeadTypes.load({str(path)!r}).value[{name!r}][{place}]")  # fmt: skip


def _learned(scan: Scan, restoration: Restoration) -> View:
    """Size of the trained constant relative to the mean difference."""
    value = torch.full_like(scan.relative_loss, math.nan)
    for head, constant in zip(restoration.heads, restoration.constants, strict=True):
        size = float(scan.mean_difference[head].norm())
        value[head] = 100 * float(constant.norm()) / size if size > 0 else math.nan
    means = "torch.stack([scan.mean_difference[head] for head in restoration.heads])"
    code = f"100 * restoration.constants.norm(dim=-1) / {means}.norm(dim=-1)"
    return View("learned", "Learned constant", "%", "Length of the trained constant, in percent of the length of the "
                "mean difference; heads without a constant are blank.", value, code=code)  # fmt: skip


def _on_prompt(place: int, text: TextReading) -> Iterator[View]:
    """Relative change of every head on one prompt, in the pruned and in the restored model."""
    for model in text.models[1:]:
        yield View(
            f"text-{place}-{model}", f"On “{_shortened(text.title)}”, {model}", "%",
            f"Relative change of the head's output on this prompt, |dense − {model}| / |dense|, root mean square over "
            "its tokens.", 100 * text.change(model), code=f"100 * seen.change({model!r})", prompt=text.title,
        )  # fmt: skip


def _shortened(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def present(scan: Scan, value: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """The values with NaN for removed heads and for values that are not finite."""
    blank = ~value.isfinite()
    for layer, removed in enumerate(scan.head_map.removed):
        blank[layer, list(removed)] = True
    return value.float().masked_fill(blank, math.nan)


def removed_heads(scan: Scan) -> list[str]:
    """Names of the heads that pruning removed."""
    heads = all_heads(*scan.relative_loss.shape)
    return [str(head) for head in heads if head.head in scan.head_map.removed[head.layer]]
