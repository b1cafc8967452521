"""Lines of a comparison: a method, baseline or control, what it minimises and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.baselines.adapters import AdapterKind
from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite
from lcc_lens.restoration.injections.methods import bias_sites, parse_method, uses_heads
from lcc_lens.restoration.training.objectives import Objective

CONTROLS = ("dense", "shuffled", "random-heads")
#: Adapters by name: peft's kind, and the maps that they stand beside.
ADAPTERS: dict[str, tuple[AdapterKind, tuple[str, ...]]] = {
    "lora": ("lora", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "dora": ("dora", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "lora-vo": ("lora", ("v_proj", "o_proj")),
    "dora-vo": ("dora", ("v_proj", "o_proj")),
}
#: In place of a learning rate: chosen by a range test on the held-out responses.
TUNED = "tuned"
#: PERP (arXiv 2312.15230) by the parts that do the same. It trains what is cheap: biases and norms (an offset at a site
#: is its map's bias), or LoRA under the mask, here at LoRA's rank.
PERP = {"perp": "norms+offset+mlp-offset", "perp-lora": "low-rank"}
BASELINES = (*ADAPTERS, "lofit", "eora", "flap", *PERP)
REFIT = "refit"


@dataclass(frozen=True)
class Entry:
    """A line of a comparison: ``[refit+]method[@control][:objective][=learning rate | =tuned]``.

    ``refit`` starts from the refitted model. ``method`` are parts of :data:`~lcc_lens.restoration.injections.METHODS`
    joined by
    ``+``, or a baseline: ``lora`` or ``dora`` (on q, k, v, o; with ``-vo`` on v, o), ``lofit``, ``eora``, ``flap``,
    ``perp`` or ``perp-lora`` (see :data:`PERP`). ``@dense`` trains the same on the dense model: what that lowers is not
    restoration; ``@shuffled`` trains on other prompts' responses; ``@random-heads`` chooses heads at random. The
    objective is read by :meth:`~lcc_lens.restoration.training.objectives.Objective.parse`. Without a learning rate
    each part takes its own;
    ``=tuned`` chooses one for every seed by :func:`~lcc_lens.restoration.training.lr_range.range_test`.

    Example:
        >>> Entry.parse("refit+low-rank+lcc:distillation").method
        'low-rank+lcc'
    """

    text: str
    method: str | None
    on_refit: bool
    control: str | None
    objective: Objective
    lr: float | None = None
    tunes_lr: bool = False

    @property
    def parts(self) -> str | None:
        """The method in parts of :data:`~lcc_lens.restoration.injections.METHODS`; None for baselines of another
        kind."""
        if self.method == "lofit":
            return "offset"  # at the heads that its first stage chose
        return PERP.get(self.method or "", None if self.method in BASELINES else self.method)

    @property
    def bias_sites(self) -> tuple[ConstantSite, ...]:
        """The sites whose maps need a bias for the result."""
        if self.method == "flap":
            return CONSTANT_SITES
        return bias_sites(self.parts) if self.parts is not None else ()

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read a line.

        Raises:
            RequestError: an unknown method, control or objective.
        """
        whole, _, rate = text.partition("=")
        whole, _, objective = whole.partition(":")
        whole, _, control = whole.partition("@")
        on_refit = whole == REFIT or whole.startswith(f"{REFIT}+")
        method = whole.removeprefix(REFIT).removeprefix("+") if on_refit else whole
        if control and control not in CONTROLS:
            raise RequestError(f"expected a control ({', '.join(CONTROLS)}), got {control!r} in {text!r}")
        is_own = bool(method) and method not in BASELINES
        if is_own:
            parse_method(method)
        if control == "random-heads" and not (is_own and uses_heads(method)):
            raise RequestError(f"expected a method that acts on heads for random heads, got {text!r}")
        if (control == "dense" and on_refit) or (control and not method):
            raise RequestError(f"expected a control of something that trains on the pruned model, got {text!r}")
        try:
            lr = float(rate) if rate and rate != TUNED else None
        except ValueError:
            raise RequestError(f"expected a learning rate or {TUNED!r} behind =, got {rate!r} in {text!r}") from None
        return cls(
            text, method or None, on_refit, control or None, Objective.parse(objective or "response"), lr, rate == TUNED
        )


#: What tells restoration from fitting the task, from any training at all, and from any choice of heads.
CONTROL_ENTRIES = ("lcc@dense", "lcc@shuffled", "random-basis", "offset", "mean-shift")


def all_entries(
    methods: Sequence[str], *, baselines: bool = False, controls: bool = False, heads: float = 1.0
) -> tuple[str, ...]:
    """Methods with every baseline and the controls of ``lcc``, each once.

    Args:
        methods: entries of one's own.
        baselines: add :data:`BASELINES`.
        controls: add :data:`CONTROL_ENTRIES`, and random heads where not all are restored.
        heads: the share of heads to restore.
    """
    added: list[str] = list(BASELINES) if baselines else []
    if controls:
        added += [*CONTROL_ENTRIES, *(["lcc@random-heads"] if heads < 1 else [])]
    return tuple(dict.fromkeys([*methods, *added]))
