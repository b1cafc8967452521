"""Methods by name: which injections train together, alone or joined by ``+``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcc_lens.components import LostComponents
from lcc_lens.errors import RequestError
from lcc_lens.heads import Head
from lcc_lens.hooks import HookedModel
from lcc_lens.injections.base import Composite, Injection
from lcc_lens.injections.constants import LccInjection, MeanShift, OffsetInjection, Start
from lcc_lens.injections.weights import check_reached, masked_low_rank, masked_weights, norm_gains, output_gains
from lcc_lens.models import device_of


@dataclass(frozen=True)
class Ingredients:
    """What injections are made of.

    ``components`` are the pair's lost components (None where no scan is needed), ``projections`` the output
    projections' plain names by layer, ``rank`` the directions per head (K; all if None), ``low_rank`` the rank of a
    masked low rank.
    """

    model: HookedModel
    components: LostComponents | None
    heads: Sequence[Head]
    projections: Sequence[str]
    rank: int | None = None
    start: Start = "zero"
    low_rank: int = 8
    seed: int = 0

    def lost(self) -> LostComponents:
        """The lost components.

        Raises:
            RequestError: there is no scan.
        """
        if self.components is None:
            raise RequestError("wanted a scan of the pair for a method of constants, got none; scan it first")
        return self.components


def _offset(given: Ingredients) -> Injection:
    if given.rank:
        raise RequestError(f"wanted no rank with the offset alone, got {given.rank}; leave it out or restore by lcc")
    return OffsetInjection(given.lost(), given.heads, start=given.start)


def _random_basis(given: Ingredients) -> Injection:
    components = given.lost().in_random_basis(given.seed)
    return LccInjection(components, given.heads, rank=given.rank, start=given.start)


#: ``lcc`` is the paper's (Eq. 8); ``offset``, ``mean-shift`` and ``random-basis`` are its controls.
METHODS: dict[str, Callable[[Ingredients], Injection]] = {
    "lcc": lambda given: LccInjection(given.lost(), given.heads, rank=given.rank, start=given.start),
    "offset": _offset,
    "mean-shift": lambda given: MeanShift(given.lost(), given.heads, rank=given.rank),
    "random-basis": _random_basis,
    "gain": lambda given: output_gains(given.model, given.projections, given.heads),
    "norms": lambda given: norm_gains(given.model),
    "low-rank": lambda given: masked_low_rank(given.model, rank=given.low_rank, seed=given.seed),
    "masked": lambda given: masked_weights(given.model),
}
_CONSTANTS = ("lcc", "offset", "mean-shift", "random-basis")


def parse_method(method: str) -> tuple[str, ...]:
    """The names in a method such as ``lcc+low-rank``.

    Raises:
        RequestError: an unknown name, a name twice, or two constants for the same heads.
    """
    names = tuple(name.strip() for name in method.split("+"))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise RequestError(f"wanted a method ({', '.join(METHODS)}, joined by +), got {unknown[0]!r}")
    if len(set(names)) < len(names) or sum(name in _CONSTANTS for name in names) > 1:
        raise RequestError(f"wanted every part once and one constant per head, got {method!r}; leave one out")
    return names


def uses_heads(method: str) -> bool:
    """Whether a method acts on chosen heads."""
    return any(name in (*_CONSTANTS, "gain") for name in parse_method(method))


def uses_components(method: str) -> bool:
    """Whether a method needs a scan's lost components: constants, which fold into biases that some models lack."""
    return any(name in _CONSTANTS for name in parse_method(method))


def build_injection(method: str, given: Ingredients) -> Injection:
    """Build the injection of a method's name, on the model's device.

    Raises:
        RequestError: an unknown name, ingredients that do not fit it, or a model whose hooked forward pass would not
            read the changed weights (see :func:`~lcc_lens.injections.weights.check_reached`).
    """
    parts = [METHODS[name](given) for name in parse_method(method)]
    injection = (parts[0] if len(parts) == 1 else Composite(parts)).to(device_of(given.model))
    check_reached(given.model, injection)
    return injection
