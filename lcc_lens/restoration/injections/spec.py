"""A method's text, such as ``lcc+low-rank``, parsed into what it builds and needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite, projection_names
from lcc_lens.restoration.injections.base import Composite, Injection
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import METHODS, Method, Preset, Rank
from lcc_lens.restoration.injections.weights import check_reached


@dataclass(frozen=True)
class MethodSpec:
    """A method's text, parsed once: the methods that it joins, and what they need together."""

    text: str
    """What records call it."""
    name: str
    """How it was requested; differs from ``text`` for a preset."""
    parts: tuple[Method, ...]
    preset: Preset = field(default=Preset("", ""))
    """The settings of a preset; none otherwise."""

    @classmethod
    def parse(cls, text: str | MethodSpec) -> MethodSpec:
        """Read the name of a method or preset, or several methods joined by ``+``."""
        if isinstance(text, MethodSpec):
            return text
        names = [name.strip() for name in text.split("+")]
        entries = {name: METHODS[name] for name in names}
        first = entries[names[0]]
        if isinstance(first, Preset) and len(names) == 1:
            return replace(cls.parse(first.method), name=text, preset=first)
        parts = tuple(entry for entry in entries.values() if isinstance(entry, Method))
        alone = [name for name, entry in entries.items() if isinstance(entry, Preset) or entry.compare_only]
        if alone and len(names) > 1:
            raise RequestError(f"expected a method that can be joined by +, got {alone[0]} in {text!r}; name it alone")
        sites = [site for part in parts for site in part.biases]
        if len(parts) < len(names) or len(set(sites)) < len(sites):
            raise RequestError(
                f"expected every part once and one constant per head and per MLP, got {text!r}; leave one out"
            )
        return cls(text, text, parts)

    @property
    def leaner(self) -> MethodSpec:
        """What a preset names for machines with less memory; the method itself if it names nothing."""
        return self if self.preset.instead is None else MethodSpec.parse(self.preset.instead)

    @property
    def preset_name(self) -> str | None:
        """The name of its preset; None where it has none."""
        return None if self.name == self.text else self.name

    @property
    def on_heads(self) -> bool:
        """Whether it acts on chosen heads."""
        return any(part.on_heads for part in self.parts)

    @property
    def selects_heads(self) -> bool:
        """Whether the request says which heads; a preset may choose them itself."""
        return self.on_heads and not (self.preset.all_heads or self.preset.choose_heads)

    @property
    def needs_components(self) -> bool:
        """Whether it reads a scan's statistics."""
        return any(part.source.startswith("scan") for part in self.parts)

    @property
    def needs_scan(self) -> bool:
        """Whether there must be a scan, for its statistics or to choose heads by."""
        return self.needs_components or self.on_heads

    @property
    def needs_sequences(self) -> bool:
        """Whether it measures both models on the data before anything is trained."""
        return any(part.source == "sequences" for part in self.parts)

    @property
    def compare_only(self) -> bool:
        """Whether only comparisons run it."""
        return any(part.compare_only for part in self.parts)

    @property
    def n_trained(self) -> str | None:
        """How many parameters it trains, as a formula; None if nothing is trained."""
        return " + ".join(part.trains for part in self.parts if part.trains is not None) or None

    @property
    def ranks(self) -> frozenset[Rank]:
        """The ranks that it reads."""
        return frozenset(rank for part in self.parts for rank in part.ranks)

    @property
    def starts_anywhere(self) -> bool:
        """Whether its training may start at the mean difference."""
        return any(part.trains is not None and part.source.startswith("scan") for part in self.parts)

    @property
    def bias_sites(self) -> tuple[ConstantSite, ...]:
        """Sites at which constants are added: the linear layers behind them must be able to hold a bias."""
        return tuple(site for site in CONSTANT_SITES if any(site in part.biases for part in self.parts))

    @property
    def scan_sites(self) -> tuple[Site, ...]:
        """The sites that a scan must compare."""
        return ("z", "mlp") if any("mlp" in part.source for part in self.parts) else ("z",)

    @property
    def spectra(self) -> tuple[Site, ...]:
        """The sites whose directions a scan must hold."""
        return ("z", "mlp") if any("directions" in part.source for part in self.parts) else ("z",)

    def build(self, inputs: Ingredients) -> Injection:
        """Build the injection on the model's device.

        Raises:
            RequestError: ingredients that do not fit it, or a model whose hooked forward pass would not read the
                changed weights (see :func:`~lcc_lens.restoration.injections.weights.check_reached`) or has no linear
                layer behind a constant's site.
        """
        if "mlp" in self.bias_sites:
            projection_names(inputs.model, "mlp")  # refused unless one linear layer reads this hook point
        parts = [part.build(inputs) for part in self.parts]
        injection = (parts[0] if len(parts) == 1 else Composite(parts)).to(device_of(inputs.model))
        check_reached(inputs.model, injection)
        return injection


def describe_methods(inputs: Ingredients | None = None) -> list[dict[str, str]]:
    """A row per method: what it does, trains, reads beside training data, and folds into.

    Args:
        inputs: a model, with what else there is: numbers of parameters instead of formulas, and under ``refused`` why a
            method cannot be built on it.

    Example:
        >>> {row["method"]: row["folds into"] for row in describe_methods()}["mlp-gain"]
        'existing weights'
    """
    return [_described(name, inputs) for name in METHODS]


def _described(name: str, inputs: Ingredients | None) -> dict[str, str]:
    words = {"z": "biases of output projections", "mlp": "biases of down projections"}
    entry, spec = METHODS[name], MethodSpec.parse(name)
    trains, refused = spec.n_trained or "nothing", ""
    if inputs is not None:
        try:
            trains = str(spec.build(inputs).footprint.n_trained)
        except RequestError as error:
            refused = str(error)
    folds = " and ".join(words[site] for site in spec.bias_sites) or "existing weights"
    source = ", ".join(dict.fromkeys(part.source for part in spec.parts))
    return {
        "method": name, "does": entry.does, "trains": trains, "learns from": source,
        "folds into": "nothing: it is compared only" if spec.compare_only else folds, "refused": refused,
    }  # fmt: skip
