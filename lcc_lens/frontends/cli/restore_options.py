"""The groups of options of the subcommand restore."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, Natural, Positive, Rate
from lcc_lens.frontends.cli.options import Maybe, Memory, Switch

if TYPE_CHECKING:
    from lcc_lens.restoration.injections.spec import MethodSpec
    from lcc_lens.restoration.training.objectives import Objective

logger = logging.getLogger(__name__)

METHODS_HELP = (
    "best if not given, and lcc where heads, a selector, a scan, directions, a task or --paper are named. lcc: "
    "trained magnitudes over lost directions plus an offset, a constant per head. Its controls: offset without "
    "directions; mean-shift (the scan's mean difference, nothing trained); random-basis (the same training over "
    "random directions); mean-shift-sequential (each layer's mean measured after the layers below it are corrected; "
    "-mlp: MLPs too). mlp-lcc, mlp-offset, mlp-mean-shift, mlp-gain: the same at the MLP. Changed weights, whose "
    "zeros stay: gain (of head outputs), norms, low-rank (on every linear layer), masked (all remaining weights). "
    "Joined by + they train together: lcc+low-rank. best: a refit by least squares, then all remaining weights and "
    "norm gains follow the dense model on text of several domains; a low-rank change (best-low-rank) where there is "
    "too little memory. polish: the same, whatever the memory. perp, perp-lora and lofit are baselines; the other "
    "baselines run in compare."
)
PAPER_HELP = (
    "The paper's own settings at once: its probe (200 steps, K = 1) on a quarter of the heads, 3 epochs, a learning "
    "rate of 1e-3, batches of 8. An option that you give beside it goes first."
)
TASK_HELP = (
    "Recover this task: train on the right answers of its training split, choose heads on other examples of it, then "
    "measure the task's held-out items and another text's perplexity. Sets data, examples, epochs."
)
BUDGET_HELP = (
    "Time that it may take, such as 5m, 15m or 1h, for a method that refits first (best, polish): a short measurement "
    "of this machine chooses the sizes of the refit and of the training (15m if neither it nor sizes are given)."
)
OBJECTIVE_HELP = (
    "Minimise the loss of the response (response) or of all tokens (lm), the distance to the dense model's "
    "distribution (distillation) or to its head outputs (heads), or several joined by +, as in lm+3*distillation "
    "(response if not given; best, polish: 3*distillation+lm)."
)


@dataclass(frozen=True, kw_only=True)
class RestoreData:
    """What it is trained, scanned and measured on."""

    data: Maybe[str] = None
    """Training data, several joined by + (alpaca if not given, or mix where it cannot be had; best, polish: mix)."""
    examples: Maybe[Count] = None
    """Training examples at most (480, or what --budget allows, if not given; 200 of a task, no fewer)."""
    max_length: Maybe[Length] = None
    """Tokens per example at most (512, or the models' context if shorter)."""
    scan_data: Maybe[str] = None
    """Data for the scan where RUN holds none (boolq, or the task)."""
    scan_examples: Count = 256
    """Examples for that scan."""
    items: Count = 500
    """With a task: held-out items to measure at most."""
    text: Maybe[str] = None
    """With a task: another text, to measure perplexity on (wikitext if not given, or wikipedia)."""
    panel: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="DATA [DATA ...]")] = None
    """Texts to measure recovery on at the end: names or your own files (one for each kind of text, if not given)."""
    panel_blocks: Natural = 4
    """Held-out blocks of 512 tokens of each of them (0: measure none)."""
    shuffle_responses: Switch = False
    """A control: train on every prompt with the response of another."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is trained."""

    epochs: Maybe[Count] = None
    """Passes over the training data (1 if not given; 3 over a task)."""
    lr: Maybe[Rate] = None
    """Learning rate of the method's first part; it falls to zero (its own if not given; best, polish: 3e-4)."""
    tune_lr: Switch = False
    """Choose the learning rate by a few steps at each of five first."""
    batch_size: Maybe[Count] = None
    """Examples per optimiser step (the method's own if not given: 8; best, polish: 2)."""
    objective: Annotated[Maybe[str], tyro.conf.arg(help=OBJECTIVE_HELP)] = None
    temperature: Positive = 1.0
    """Temperature of distillation."""
    rank: Maybe[Count] = None
    """Directions per head (all if not given)."""
    mlp_rank: Maybe[Count] = None
    """Directions per MLP (those that the scan holds if not given)."""
    low_rank: Maybe[Count] = None
    """Rank of low-rank (8 if not given; best-low-rank: 16). best trains a low-rank change if it is given."""
    refit_samples: Maybe[Natural] = None
    """Calibration sequences of best's and polish's refit (288, or what --budget allows, if not given; 0: none)."""
    start: Literal["zero", "mean"] = "zero"
    """Where the magnitudes start: at the pruned model, or at the mean difference."""
    patience: Maybe[Count] = None
    """Stop after this many validations without improvement."""
    checkpoint_every: Maybe[Count] = None
    """Optimiser steps between checkpoints (those of 160 examples if not given)."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory(Memory):
    """What takes less memory, and more time."""

    micro_tokens: Maybe[Count] = None
    """Padded tokens of one backward pass; larger batches are split (1024 on a CPU, 4096 on a GPU if not given)."""
    gradient_checkpointing: Switch = False
    """Keep only each layer's input and recompute the rest for gradients: less memory, a third more time."""
    reuse: Switch = False
    """Cache activations below the lowest trained layer: faster over several epochs, but takes memory and disk."""


def _trains(spec: MethodSpec) -> bool:
    return spec.n_trained is not None


#: Which methods use an option; all methods use the options that are not here.
_USED_BY: dict[str, Callable[[MethodSpec], bool]] = {
    "heads": lambda spec: spec.selects_heads, "selector": lambda spec: spec.selects_heads,
    "scan_data": lambda spec: spec.needs_scan, "scan_examples": lambda spec: spec.needs_scan,
    "rank": lambda spec: "rank" in spec.ranks, "mlp_rank": lambda spec: "mlp_rank" in spec.ranks,
    "low_rank": lambda spec: "low_rank" in spec.ranks, "start": lambda spec: spec.starts_anywhere,
    "refit_samples": lambda spec: spec.preset.on_refit,
    **dict.fromkeys(
        ("epochs", "lr", "tune_lr", "batch_size", "objective", "temperature", "patience", "checkpoint_every",
         "gradient_checkpointing", "reuse", "shuffle_responses"), _trains,
    ),
}  # fmt: skip
#: What scripts give to every method alike: named in the log where it is not used, not refused.
_COMMON = {"heads", "selector", "epochs", "lr", "scan_examples", "refit_samples", "items"}


def given_options(*groups: Any) -> dict[str, Any]:
    """The options of groups, by the names of their fields, that differ from their defaults."""
    values = {field.name: (getattr(group, field.name), field.default) for group in groups for field in fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_used(given: Mapping[str, Any], spec: MethodSpec, objective: Objective) -> None:
    """Refuse options that a method does not use, or that say nothing beside the others.

    Raises:
        RequestError: names them.
    """
    unused = [name for name in given if name in _USED_BY and not _USED_BY[name](spec)]
    if told := [name for name in unused if name in _COMMON]:
        logger.warning("%s uses no %s", spec.name, " and no ".join(map(_option, told)))
    if refused := [_option(name) for name in unused if name not in _COMMON]:
        what = "it" if len(refused) == 1 else "them"
        raise RequestError(f"expected options that {spec.name} uses, got {', '.join(refused)}; leave {what} out")
    if given.keys() >= {"lr", "tune_lr"}:
        raise RequestError("expected --lr or --tune-lr, which chooses one, got both; leave one of them out")
    if "temperature" in given and not objective.distillation:
        raise RequestError("expected --temperature with an --objective of distillation, got another; leave it out")
    if "panel" in given and given.get("panel_blocks") == 0:
        raise RequestError("expected blocks of the texts of --panel, got --panel-blocks 0; leave one of them out")
    if "task" not in given and "text" in given:
        raise RequestError("expected --text with a --task, got none; name its texts by --panel")
    if "task" not in given and "items" in given:
        logger.warning("--items counts those of a --task: nothing here uses it")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
