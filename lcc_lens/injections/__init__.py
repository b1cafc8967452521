"""Injections: small trainable modules that act on a hooked model and fold into its checkpoint's tensors."""

from lcc_lens.injections.base import Composite, Injection
from lcc_lens.injections.changes import Change
from lcc_lens.injections.constants import (
    ConstantInjection,
    FixedConstants,
    LccInjection,
    MeanShift,
    OffsetInjection,
    SiteConstants,
    Start,
    constants_by_layer,
)
from lcc_lens.injections.footprint import Footprint
from lcc_lens.injections.ingredients import Ingredients
from lcc_lens.injections.methods import (
    METHODS,
    Method,
    bias_sites,
    build_injection,
    describe_methods,
    parse_method,
    scanned_sites,
    trains_numbers,
    uses_components,
    uses_heads,
    uses_sequences,
)
from lcc_lens.injections.weights import WeightInjection, check_reached

__all__ = [
    "METHODS",
    "Change",
    "Composite",
    "ConstantInjection",
    "FixedConstants",
    "Footprint",
    "Ingredients",
    "Injection",
    "LccInjection",
    "MeanShift",
    "Method",
    "OffsetInjection",
    "SiteConstants",
    "Start",
    "WeightInjection",
    "bias_sites",
    "build_injection",
    "check_reached",
    "constants_by_layer",
    "describe_methods",
    "parse_method",
    "scanned_sites",
    "trains_numbers",
    "uses_components",
    "uses_heads",
    "uses_sequences",
]
