"""Settings of a pruning run, independent of model and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Seed, check_numbers
from lcc_lens.models.architecture.anatomy import LayerAnatomy
from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, Unstructured
from lcc_lens.pruning.methods.masks import Scope
from lcc_lens.pruning.methods.pruners import Choice, LayerPruner, LayerTask, Split
from lcc_lens.pruning.methods.registry import pruner_factory
from lcc_lens.pruning.methods.structured import SCHEDULES, Schedule, layer_ratios

#: Methods that invert a second moment, and so need at least as many tokens as a linear layer has inputs.
INVERTING: tuple[str, ...] = ("sparsegpt", "slimgpt")
# A sliced MLP width stays a multiple of this where the dense one is: such sizes run faster.
_ROUND_WIDTH = 32


@dataclass(frozen=True)
class PruneConfig:
    """How much to remove and by which method.

    Args:
        method: the pruner.
        pattern: how many weights to remove and where.
        scope: whether unstructured scores are compared within a row or the whole matrix (magnitude only).
        seed: seed of the draw of calibration data, and of random choices.
        batch_size: calibration sequences per forward pass.
        sliced: whether heads and neurons are also cut out of the shapes (slimgpt only); all layers then lose equally
            many.
        schedule: how slimgpt distributes the sparsity over the layers; ``log`` by default, ``uniform`` if sliced.
        choice: how slimgpt chooses heads and neurons: by ``error`` as in the paper, or the controls ``magnitude`` and
            ``random``.
        split: how many heads slimgpt removes per layer: their fraction rounded down (``spared``), to the nearest
            (``proportional``), or the number with the smallest output ``error`` (not if sliced); neurons make up the
            difference. By default ``spared``, and ``proportional`` for the controls.

    Raises:
        RequestError: a setting is unknown, does not fit the method or the other settings, or the batch is empty.

    Example:
        >>> from lcc_lens.models.architecture.sparsity_patterns import Unstructured
        >>> PruneConfig("wanda", Unstructured(0.5)).uses_inputs
        True
    """

    method: str
    pattern: Pattern
    scope: Scope = "row"
    seed: Seed = 0
    batch_size: Count = 8
    sliced: bool = False
    schedule: Schedule | None = None
    choice: Choice = "error"
    split: Split | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        pruner_factory(self.method)
        _one_of("scope", self.scope, ("row", "matrix"))
        _one_of("schedule", self.chosen_schedule, SCHEDULES)
        _one_of("choice", self.choice, get_args(Choice))
        _one_of("split", self.chosen_split, get_args(Split))
        if self.scope == "matrix" and self.method != "magnitude":
            raise RequestError(f"expected the scope row for {self.method}, got matrix; leave it out")
        self._check_structure()

    def _check_structure(self) -> None:
        if not self.is_structured:
            if self.sliced or self.schedule or self.split or self.choice != "error":
                raise RequestError(
                    f"expected slimgpt for sliced, schedule, split and choice, got {self.method}; it removes single "
                    "weights, equally many in every layer"
                )
            return
        if isinstance(self.pattern, NofM):
            raise RequestError(f"expected a fraction for slimgpt, got the pattern {self.pattern}; name a sparsity")
        if self.sliced and self.chosen_schedule != "uniform":
            raise RequestError(
                f"expected the schedule uniform for a sliced model, got {self.schedule}; "
                "a standard configuration has one size for all layers"
            )
        if self.chosen_split == "error" and (self.sliced or self.choice != "error"):
            raise RequestError(
                "expected the split spared or proportional for a sliced model or a control, got error; leave it out"
            )

    @property
    def chosen_schedule(self) -> Schedule:
        """How the sparsity is distributed over the layers."""
        return self.schedule or ("uniform" if self.sliced else "log")

    @property
    def chosen_split(self) -> Split:
        """How a layer's fraction is divided between heads and neurons."""
        if self.split is not None:
            return self.split
        return "spared" if self.choice == "error" else "proportional"

    @property
    def is_structured(self) -> bool:
        """Whether whole heads and neurons are removed."""
        return self.method == "slimgpt"

    @property
    def uses_inputs(self) -> bool:
        """Whether the method needs calibration data."""
        return pruner_factory(self.method).uses_inputs and not (self.is_structured and self.choice != "error")

    def tasks(
        self,
        n_layers: int,
        anatomies: list[LayerAnatomy] | None = None,
        allowed_groups: frozenset[int] | None = None,
    ) -> list[LayerTask]:
        """The task of each layer.

        Args:
            anatomies: the layers' heads and neurons, for structured methods.
            allowed_groups: numbers of key-value groups that may be removed from a layer; any number if None.
        """
        task = LayerTask(
            self.pattern, self.scope, choice=self.choice, split=self.chosen_split, allowed_groups=allowed_groups
        )
        seeds = [1000 * self.seed + layer for layer in range(n_layers)]
        if anatomies is None:
            return [replace(task, seed=seed) for seed in seeds]
        width = anatomies[0].mlp.n_groups
        multiple = next(m for m in (_ROUND_WIDTH, 16, 8, 4, 2, 1) if width % m == 0) if self.sliced else 1
        ratios = layer_ratios(self.chosen_schedule, self.pattern.sparsity, n_layers)
        return [
            replace(task, pattern=Unstructured(ratio), anatomy=anatomy, multiple=multiple, seed=seed)
            for ratio, anatomy, seed in zip(ratios, anatomies, seeds, strict=True)
        ]

    def pruner(self, task: LayerTask) -> LayerPruner:
        """A new pruner for one layer."""
        return pruner_factory(self.method)(task)


def _one_of(what: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise RequestError(f"expected the {what} {', '.join(words[:-1])} or {words[-1]}, got {word!r}; choose one")
