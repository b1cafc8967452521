"""Entries of a comparison: a method, what it is trained on, its objective and its learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Rate, check_numbers
from lcc_lens.core.registry import nearest
from lcc_lens.evaluation.baselines.methods import BASELINES
from lcc_lens.models.hooked.sites import ConstantSite
from lcc_lens.restoration.injections.methods import Preset
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.objectives import Objective

CONTROLS = ("dense", "shuffled", "random-heads")
#: In place of a learning rate: chosen by a range test on the held-out responses.
TUNED = "tuned"
REFIT = "refit"


@dataclass(frozen=True)
class Entry:
    """One entry of a comparison: ``[refit+]method[@control][:objective][=learning rate | =tuned]``.

    ``refit`` starts from the refitted model. ``method`` is one of
    :data:`~lcc_lens.restoration.injections.methods.METHODS`, the baselines included, or several joined by ``+``.
    ``@dense`` trains the same on the dense model: what that improves is not restoration. ``@shuffled`` trains on other
    prompts' responses; ``@random-heads`` chooses heads at random. The objective is read by
    :meth:`~lcc_lens.restoration.training.objectives.Objective.parse`. Without a learning rate each part takes its own;
    ``=tuned`` chooses one for every seed by :func:`~lcc_lens.restoration.training.lr_range.range_test`.

    Example:
        >>> Entry.parse("refit+low-rank+lcc:distillation").method
        'low-rank+lcc'
    """

    text: str
    spec: MethodSpec | None
    """The method; None for the refitted model as it is."""
    on_refit: bool
    control: str | None
    objective: Objective
    lr: Rate | None = None
    tunes_lr: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, lambda name: f"{name} in {self.text!r}")

    @property
    def method(self) -> str | None:
        """The method's name."""
        return None if self.spec is None else self.spec.name

    @property
    def bias_sites(self) -> tuple[ConstantSite, ...]:
        """The sites behind which the result needs biases."""
        return () if self.spec is None else self.spec.bias_sites

    def trains_like(self, other: Entry) -> bool:
        """Whether both are the same training, however they are written."""

        def training(entry: Entry) -> tuple[object, ...]:
            method = None if entry.spec is None else entry.spec.text
            return method, entry.on_refit, entry.control, entry.objective, entry.lr, entry.tunes_lr

        return training(self) == training(other)

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read an entry."""
        whole, _, rate = text.partition("=")
        whole, _, objective = whole.partition(":")
        whole, _, control = whole.partition("@")
        is_refit = whole == REFIT or whole.startswith(f"{REFIT}+")
        method = whole.removeprefix(REFIT).removeprefix("+") if is_refit else whole
        if control and control not in CONTROLS:
            raise RequestError(
                f"expected a control ({', '.join(CONTROLS)}), got {control!r} in {text!r}; {nearest(control, CONTROLS)}"
            )
        spec = MethodSpec.parse(method) if method or not is_refit else None
        preset = Preset("", "") if spec is None else spec.preset
        on_refit = is_refit or preset.on_refit
        if control == "random-heads" and not (spec is not None and spec.selects_heads):
            raise RequestError(f"expected a method that acts on heads for random heads, got {text!r}; leave it out")
        if (control == "dense" and on_refit) or (control and spec is None):
            raise RequestError(
                f"expected a control of a method that trains on the pruned model, got {text!r}; leave it out"
            )
        try:
            lr = float(rate) if rate and rate != TUNED else preset.lr
        except ValueError:
            raise RequestError(
                f"expected a learning rate or {TUNED!r} after =, got {rate!r} in {text!r}; correct it"
            ) from None
        goal = Objective.parse(objective or preset.objective or "response")
        return cls(text, spec, on_refit, control or None, goal, lr, rate == TUNED)


#: What distinguishes restoration from fitting the task, from any training at all, and from any choice of heads.
CONTROL_ENTRIES = ("lcc@dense", "lcc@shuffled", "random-basis", "offset", "mean-shift")


def all_entries(
    methods: Sequence[str], *, baselines: bool = False, controls: bool = False, heads: float = 1.0
) -> tuple[str, ...]:
    """Methods with every baseline and the controls of ``lcc``, each once.

    Args:
        baselines: add :data:`BASELINES`.
        controls: add :data:`CONTROL_ENTRIES`, and random heads where not all are restored.
    """
    added: list[str] = list(BASELINES) if baselines else []
    if controls:
        added += [*CONTROL_ENTRIES, *(["lcc@random-heads"] if heads < 1 else [])]
    return tuple(dict.fromkeys([*methods, *added]))
