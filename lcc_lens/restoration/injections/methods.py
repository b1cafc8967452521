"""The registry of restoration methods: how each builds its injection, and what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.ranges import ranged
from lcc_lens.core.registry import Registry
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.sites import ConstantSite
from lcc_lens.restoration.injections.base import Composite, Injection
from lcc_lens.restoration.injections.constants import FixedConstants, LccInjection, MeanShift, OffsetInjection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.sequential import sequential_means
from lcc_lens.restoration.injections.weights import (
    all_weights,
    masked_low_rank,
    masked_weights,
    mlp_gains,
    norm_gains,
    output_gains,
)
from lcc_lens.restoration.training.config import TrainConfig

#: What a method reads, beside training data: a scan's statistics, its directions at the MLP, sequences, or nothing.
Source = Literal["none", "scan", "scan with mlp", "scan with the mlp's directions", "sequences"]
#: A rank of a request: directions per head, directions per MLP, or that of a low-rank change of weights.
Rank = Literal["rank", "mlp_rank", "low_rank"]


@dataclass(frozen=True)
class Method:
    """How one method builds its injection, and what is known of it before there is a model."""

    made_by: ClassVar[str] = "Method(build, does, trains)"
    build: Callable[[Ingredients], Injection]
    does: str
    """In a few words, for tables."""
    trains: str | None
    """How many parameters, as a formula (K directions, rank r); None for a closed form."""
    biases: tuple[ConstantSite, ...] = ()
    """Sites at which it adds a constant, so that the linear layers behind them must be able to hold a bias."""
    on_heads: bool = False
    """Whether it acts on chosen heads."""
    source: Source = "none"
    """What it reads beside training data."""
    compare_only: bool = False
    """Whether its result cannot be kept as a restoration, so that only comparisons run it."""
    package: str | None = None
    """A package that it needs beside this one's own, of the extra ``baselines``."""
    ranks: tuple[Rank, ...] = ()
    """The ranks that it reads; the command line refuses others."""

    def require_package(self, name: str) -> None:
        """Refuse a method, called ``name`` in the message, whose package is not installed.

        Raises:
            RequestError: says how to install it.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise RequestError(
                f"expected the package {self.package} for {name}, got none; pip install 'lcc-lens[baselines]'"
            )


@dataclass(frozen=True)
class HeadSearch:
    """What a preset may choose its heads by: training on these data, in this model."""

    model: HookedModel
    projections: Sequence[str]
    """The output projections' plain names, by layer."""
    heads: Sequence[Head]
    """The heads to choose from."""
    sequences: Sequence[TokenSequence]
    validation: Sequence[TokenSequence]
    config: TrainConfig
    teacher: HookedModel | None = None
    fraction: float = 0.2
    """Of the heads to choose."""


@dataclass(frozen=True)
class Preset:
    """A method under a name of its own, with its own settings; it is not joined by ``+``, and recorded as ``method``.

    What a request names goes before ``objective``, ``lr``, ``batch_size``, ``low_rank`` and ``patience``.
    """

    made_by: ClassVar[str] = "Preset(method, does)"
    method: str
    does: str
    on_refit: bool = False
    """Whether the pruned model's remaining weights are refitted first."""
    objective: str | None = None
    lr: float | None = None
    batch_size: int | None = None
    low_rank: int | None = None
    on_pool: bool = False
    """Whether it trains on running text of several domains (``mix`` if no data are named) and stops early by text of
    others; the dense model's outputs are kept over several epochs."""
    patience: int | None = None
    all_heads: bool = False
    """Whether it acts on all heads, whatever fraction is requested."""
    instead: str | None = None
    """The preset that takes its place where there is too little memory, in sessions, and where a rank is named."""
    choose_heads: Callable[[HeadSearch], list[Head]] | None = None
    """Chooses the heads by training, among all of them."""


def _offset(inputs: Ingredients) -> Injection:
    if inputs.rank:
        raise RequestError(f"expected no rank with the offset alone, got {inputs.rank}; leave it out or restore by lcc")
    return OffsetInjection(inputs.lost(), inputs.heads, start=inputs.start)


def _random_basis(inputs: Ingredients) -> Injection:
    components = inputs.lost().in_random_basis(inputs.seed)
    return LccInjection(components, inputs.heads, rank=inputs.rank, start=inputs.start)


def _mlp_lcc(inputs: Ingredients) -> Injection:
    lost = inputs.lost_mlp(directions=True)
    return LccInjection(lost, inputs.mlps(), rank=inputs.mlp_rank, start=inputs.start, site="mlp")


def _mlp_mean_shift(inputs: Ingredients) -> Injection:
    lost = inputs.lost_mlp(directions=inputs.mlp_rank is not None)
    return MeanShift(lost, inputs.mlps(), rank=inputs.mlp_rank, site="mlp")


def _sequential(inputs: Ingredients, *, mlp: bool = False) -> Injection:
    means = sequential_means(inputs.both(), inputs.sequences, inputs.heads, mlp=mlp, model=inputs.model)
    parts = {"z": inputs.heads, "mlp": inputs.mlps()}
    fixed = [FixedConstants(site, values, parts[site]) for site, values in means.items()]
    return fixed[0] if len(fixed) == 1 else Composite(fixed)


_PER_HEAD, _PER_MLP = "(K + d_head) per head", "(K + d_mlp) per layer"
_BASELINES = "lcc_lens.evaluation.baselines.methods"
_TOWARDS_DENSE = "3*distillation+lm"
_POLISHED = (
    "a least-squares refit, then all remaining weights and norm gains trained towards the dense model on text of "
    "several domains"
)
#: ``lcc`` is the paper's (Eq. 8); ``offset``, ``mean-shift`` and ``random-basis`` are its controls.
METHODS: Registry[Method | Preset] = Registry(
    "method",
    {
        "lcc": Method(
            lambda inputs: LccInjection(inputs.lost(), inputs.heads, rank=inputs.rank, start=inputs.start),
            "magnitudes over the lost directions and an offset at head outputs", _PER_HEAD, ("z",), True, "scan",
            ranks=("rank",),
        ),
        "offset": Method(_offset, "an offset at head outputs", "d_head per head", ("z",), True, "scan"),
        "mean-shift": Method(
            lambda inputs: MeanShift(inputs.lost(), inputs.heads, rank=inputs.rank),
            "the mean difference at head outputs", None, ("z",), True, "scan", ranks=("rank",),
        ),
        "random-basis": Method(
            _random_basis, "lcc over random directions, a control", _PER_HEAD, ("z",), True, "scan", ranks=("rank",)
        ),
        "mean-shift-sequential": Method(
            _sequential, "the mean difference at head outputs, layer by layer, each after the layers below it are "
            "corrected", None, ("z",), True, "sequences",
        ),
        "mean-shift-sequential-mlp": Method(
            lambda inputs: _sequential(inputs, mlp=True), "the same, MLPs corrected as well", None, ("z", "mlp"), True,
            "sequences",
        ),
        "mlp-lcc": Method(
            _mlp_lcc, "magnitudes over the lost directions and an offset at the MLP's post-activation", _PER_MLP,
            ("mlp",), source="scan with the mlp's directions", ranks=("mlp_rank",),
        ),
        "mlp-offset": Method(
            lambda i: OffsetInjection(i.lost_mlp(directions=False), i.mlps(), start=i.start, site="mlp"),
            "an offset at the MLP's post-activation", "d_mlp per layer", ("mlp",), source="scan with mlp",
        ),
        "mlp-mean-shift": Method(
            _mlp_mean_shift, "the mean difference at the MLP's post-activation", None, ("mlp",),
            source="scan with mlp", ranks=("mlp_rank",),
        ),
        "gain": Method(
            lambda inputs: output_gains(inputs.model, inputs.projections, inputs.heads), "a gain of head outputs",
            "d_head per head", on_heads=True,
        ),
        "mlp-gain": Method(
            lambda inputs: mlp_gains(inputs.model), "a gain of the MLP's post-activation", "d_mlp per layer"
        ),
        "norms": Method(lambda inputs: norm_gains(inputs.model), "the weights of all norms", "d_model per norm"),
        "low-rank": Method(
            lambda inputs: masked_low_rank(inputs.model, rank=inputs.low_rank, seed=inputs.seed),
            "a low-rank change of every linear layer that keeps its zeros", "r (n_in + n_out) per linear layer",
            ranks=("low_rank",),
        ),
        "masked": Method(
            lambda inputs: masked_weights(inputs.model), "every remaining weight", "n_in n_out per linear layer"
        ),
        "all-weights": Method(
            lambda inputs: all_weights(inputs.model), "every remaining weight and norm gain of the decoder layers",
            "n_in n_out per linear layer, d_model per norm",
        ),
        "polish": Preset(
            "all-weights", _POLISHED, on_refit=True, objective=_TOWARDS_DENSE, lr=3e-4, batch_size=2, on_pool=True,
            patience=3,
        ),
        "best": Preset(
            "all-weights", f"{_POLISHED}, or a low-rank change where there is too little memory", on_refit=True,
            objective=_TOWARDS_DENSE, lr=3e-4, batch_size=2, on_pool=True, patience=3, instead="best-low-rank",
        ),
        "best-low-rank": Preset(
            "low-rank", "a least-squares refit, then a low-rank change trained towards the dense model on text of "
            "several domains", on_refit=True, objective=_TOWARDS_DENSE, lr=5e-3, low_rank=16, on_pool=True,
        ),
    },
    lazy={
        "lora": f"{_BASELINES}:LORA", "dora": f"{_BASELINES}:DORA",
        "lora-all": f"{_BASELINES}:LORA_ALL", "lora-vo": f"{_BASELINES}:LORA_VO",
        "dora-vo": f"{_BASELINES}:DORA_VO", "lofit": f"{_BASELINES}:LOFIT", "eora": f"{_BASELINES}:EORA",
        "flap": f"{_BASELINES}:FLAP", "perp": f"{_BASELINES}:PERP", "perp-lora": f"{_BASELINES}:PERP_LORA",
    },
)  # fmt: skip


@ranged
def register_method(name: str, method: Method | Preset, *, replace: bool = False) -> None:
    """Add a restoration method: ``restore``, ``compare`` and the command line then take its name like any other.

    Its injection folds into a checkpoint if it adds constants at the sites in ``biases`` (a
    :class:`~lcc_lens.restoration.injections.constants.ConstantInjection`) or changes weights (a
    :class:`~lcc_lens.restoration.injections.weights.WeightInjection`). An installed package registers a method for the
    command line by an entry point of the group ``lcc_lens.methods``.

    Args:
        name: lower-case letters, digits, ``-`` and ``_``.
        method: how it is built, or a :class:`Preset`.
        replace: allow a name that is taken.

    Raises:
        RequestError: the name is taken or has another form.

    Example:
        >>> import torch, lcc_lens as lcc
        >>> from lcc_lens.models.hooked.weights import weight_shape
        >>> from lcc_lens.restoration.injections.changes import Shift
        >>> from lcc_lens.restoration.injections.weights import layer_maps
        >>> def last_projections(inputs):
        ...     layers = {n: m for n, m in layer_maps(inputs.model).items() if n.endswith("down_proj")}
        ...     changes = {n: Shift(torch.zeros(weight_shape(m))) for n, m in layers.items()}
        ...     return lcc.WeightInjection(changes, default_lr=1e-4)
        >>> lcc.register_method("down", lcc.Method(last_projections, "all down projections", "n_in n_out per layer"))
        >>> lcc.restore(pair, None, (), data, method="down")  # doctest: +SKIP
    """
    METHODS.register(name, method, replace=replace)
