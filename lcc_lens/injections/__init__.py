"""Injections: small trainable modules that act on a hooked model and fold into its checkpoint's tensors."""

from lcc_lens.injections.base import Composite, Injection
from lcc_lens.injections.changes import Change
from lcc_lens.injections.constants import LccInjection, MeanShift, OffsetInjection, Start, constants_by_layer
from lcc_lens.injections.methods import (
    METHODS,
    Ingredients,
    build_injection,
    parse_method,
    uses_components,
    uses_heads,
)
from lcc_lens.injections.weights import WeightInjection, check_reached

__all__ = [
    "METHODS",
    "Change",
    "Composite",
    "Ingredients",
    "Injection",
    "LccInjection",
    "MeanShift",
    "OffsetInjection",
    "Start",
    "WeightInjection",
    "build_injection",
    "check_reached",
    "constants_by_layer",
    "parse_method",
    "uses_components",
    "uses_heads",
]
