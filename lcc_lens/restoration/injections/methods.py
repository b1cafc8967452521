"""Methods by name: which injections train together, alone or joined by ``+``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite, projection_names
from lcc_lens.restoration.injections.base import Composite, Injection
from lcc_lens.restoration.injections.constants import FixedConstants, LccInjection, MeanShift, OffsetInjection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.sequential import sequential_means
from lcc_lens.restoration.injections.weights import (
    check_reached,
    masked_low_rank,
    masked_weights,
    mlp_gains,
    norm_gains,
    output_gains,
)

#: What a method learns from, beside training: a scan's statistics, its directions at the MLP, sequences, or nothing.
Source = Literal["none", "scan", "scan with mlp", "scan with the mlp's directions", "sequences"]


@dataclass(frozen=True)
class Method:
    """A part of a method's name: how it is built, and what is known of it before there is a model."""

    build: Callable[[Ingredients], Injection]
    does: str
    """In a few words, for tables."""
    trains: str | None
    """How many numbers, as a formula (K directions, rank r); None for a closed form."""
    biases: tuple[ConstantSite, ...] = ()
    """Sites at which it adds a constant, so that their maps must be able to hold a bias."""
    on_heads: bool = False
    """Whether it acts on chosen heads."""
    source: Source = "none"


def _offset(given: Ingredients) -> Injection:
    if given.rank:
        raise RequestError(f"expected no rank with the offset alone, got {given.rank}; leave it out or restore by lcc")
    return OffsetInjection(given.lost(), given.heads, start=given.start)


def _random_basis(given: Ingredients) -> Injection:
    components = given.lost().in_random_basis(given.seed)
    return LccInjection(components, given.heads, rank=given.rank, start=given.start)


def _mlp_lcc(given: Ingredients) -> Injection:
    lost = given.lost_mlp(directions=True)
    return LccInjection(lost, given.mlps(), rank=given.mlp_rank, start=given.start, site="mlp")


def _mlp_offset(given: Ingredients) -> Injection:
    return OffsetInjection(given.lost_mlp(directions=False), given.mlps(), start=given.start, site="mlp")


def _mlp_mean_shift(given: Ingredients) -> Injection:
    lost = given.lost_mlp(directions=given.mlp_rank is not None)
    return MeanShift(lost, given.mlps(), rank=given.mlp_rank, site="mlp")


def _sequential(given: Ingredients, *, mlp: bool = False) -> Injection:
    found = sequential_means(given.both(), given.sequences, given.heads, mlp=mlp, model=given.model)
    parts = {"z": given.heads, "mlp": given.mlps()}
    fixed = [FixedConstants(site, values, parts[site]) for site, values in found.items()]
    return fixed[0] if len(fixed) == 1 else Composite(fixed)


_PER_HEAD, _PER_MLP = "(K + d_head) per head", "(K + d_mlp) per layer"
#: ``lcc`` is the paper's (Eq. 8); ``offset``, ``mean-shift`` and ``random-basis`` are its controls.
METHODS: dict[str, Method] = {
    "lcc": Method(
        lambda given: LccInjection(given.lost(), given.heads, rank=given.rank, start=given.start),
        "magnitudes over the lost directions and an offset at head outputs", _PER_HEAD, ("z",), True, "scan",
    ),
    "offset": Method(_offset, "an offset at head outputs", "d_head per head", ("z",), True, "scan"),
    "mean-shift": Method(
        lambda given: MeanShift(given.lost(), given.heads, rank=given.rank),
        "the mean difference at head outputs", None, ("z",), True, "scan",
    ),
    "random-basis": Method(
        _random_basis, "lcc over random directions, a control", _PER_HEAD, ("z",), True, "scan"
    ),
    "mean-shift-sequential": Method(
        _sequential, "the mean difference at head outputs, layer by layer behind mended ones", None, ("z",), True,
        "sequences",
    ),
    "mean-shift-sequential-mlp": Method(
        lambda given: _sequential(given, mlp=True), "the same, MLPs mended as well", None, ("z", "mlp"), True,
        "sequences",
    ),
    "mlp-lcc": Method(
        _mlp_lcc, "magnitudes over the lost directions and an offset at the MLP's post-activation", _PER_MLP, ("mlp",),
        source="scan with the mlp's directions",
    ),
    "mlp-offset": Method(
        _mlp_offset, "an offset at the MLP's post-activation", "d_mlp per layer", ("mlp",), source="scan with mlp"
    ),
    "mlp-mean-shift": Method(
        _mlp_mean_shift, "the mean difference at the MLP's post-activation", None, ("mlp",), source="scan with mlp"
    ),
    "gain": Method(
        lambda given: output_gains(given.model, given.projections, given.heads), "a gain of head outputs",
        "d_head per head", on_heads=True,
    ),
    "mlp-gain": Method(lambda given: mlp_gains(given.model), "a gain of the MLP's post-activation", "d_mlp per layer"),
    "norms": Method(lambda given: norm_gains(given.model), "the weights of all norms", "d_model per norm"),
    "low-rank": Method(
        lambda given: masked_low_rank(given.model, rank=given.low_rank, seed=given.seed),
        "a low rank under the zero pattern of every linear map", "r (n_in + n_out) per map",
    ),
    "masked": Method(lambda given: masked_weights(given.model), "every surviving weight", "n_in n_out per map"),
}  # fmt: skip


def parse_method(method: str) -> tuple[str, ...]:
    """The names in a method such as ``lcc+low-rank``.

    Raises:
        RequestError: an unknown name, a name twice, or two constants for the same heads or MLPs.
    """
    names = tuple(name.strip() for name in method.split("+"))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise RequestError(f"expected a method ({', '.join(METHODS)}, joined by +), got {unknown[0]!r}")
    sites = [site for name in names for site in METHODS[name].biases]
    if len(set(names)) < len(names) or len(set(sites)) < len(sites):
        raise RequestError(
            f"expected every part once and one constant per head and per MLP, got {method!r}; leave one out"
        )
    return names


def uses_heads(method: str) -> bool:
    """Whether a method acts on chosen heads."""
    return any(METHODS[name].on_heads for name in parse_method(method))


def uses_components(method: str) -> bool:
    """Whether a method needs a scan's statistics."""
    return any(METHODS[name].source.startswith("scan") for name in parse_method(method))


def uses_sequences(method: str) -> bool:
    """Whether a method measures both models on the data before anything is trained."""
    return any(METHODS[name].source == "sequences" for name in parse_method(method))


def trains_numbers(method: str) -> bool:
    """Whether there is anything to train in a method."""
    return any(METHODS[name].trains is not None for name in parse_method(method))


def bias_sites(method: str) -> tuple[ConstantSite, ...]:
    """The sites whose maps must be able to hold a bias for a method to be exported."""
    found = {site for name in parse_method(method) for site in METHODS[name].biases}
    return tuple(site for site in CONSTANT_SITES if site in found)


def scanned_sites(method: str) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """What a scan must compare for a method: its sites, and those whose spectrum it needs."""
    sources = {METHODS[name].source for name in parse_method(method)}
    spectra: tuple[Site, ...] = ("z", "mlp") if "scan with the mlp's directions" in sources else ("z",)
    return ("z", "mlp") if "mlp" in spectra or "scan with mlp" in sources else ("z",), spectra


def build_injection(method: str, given: Ingredients) -> Injection:
    """Build the injection of a method's name, on the model's device.

    Raises:
        RequestError: an unknown name, ingredients that do not fit it, or a model whose hooked forward pass would not
            read the changed weights (see :func:`~lcc_lens.restoration.injections.weights.check_reached`) or has no
            map that reads a constant.
    """
    names = parse_method(method)
    if "mlp" in bias_sites(method):
        projection_names(given.model, "mlp")  # a hook point of this name that no single map reads would not fold
    parts = [METHODS[name].build(given) for name in names]
    injection = (parts[0] if len(parts) == 1 else Composite(parts)).to(device_of(given.model))
    check_reached(given.model, injection)
    return injection


def describe_methods(given: Ingredients | None = None) -> list[dict[str, str]]:
    """A row per method: what it does, trains, learns from beside training, and folds into.

    Args:
        given: a model, with what else there is: numbers trained instead of formulas, and under ``refused`` why a method
            cannot be built on it.

    Example:
        >>> {row["method"]: row["folds into"] for row in describe_methods()}["mlp-gain"]
        'weights that are there'
    """
    return [_described(name, method, given) for name, method in METHODS.items()]


def _described(name: str, method: Method, given: Ingredients | None) -> dict[str, str]:
    words = {"z": "biases of output projections", "mlp": "biases of down projections"}
    trains, refused = method.trains or "nothing", ""
    if given is not None:
        try:
            trains = str(build_injection(name, given).footprint.n_trained)
        except RequestError as error:
            refused = str(error)
    folds = " and ".join(words[site] for site in method.biases) or "weights that are there"
    learns = {"method": name, "does": method.does, "trains": trains, "learns from": method.source}
    return {**learns, "folds into": folds, "refused": refused}
