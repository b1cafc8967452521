"""What a restoration leaves of every head's difference, by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.causes.causes import HEAD_CAUSES, Causes
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.heads import HeadMap, all_heads
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import pandas as pd

#: What a constant of the head's own, added by a hook, changes beside the causes.
CONSTANT = "constant"


@dataclass(frozen=True, repr=False)
class Recovered(Shown):
    r"""How much of each head's squared difference remains after restoration: $\sum|\delta_r|^2 / \sum|\delta_p|^2$.

    ``before`` and ``after`` divide it by cause, as fractions of the difference before: those before sum to 1, those
    after to ``remaining``. They are None unless both scans found causes. The cause ``constant`` is what a constant
    added to the head itself changes (negative where it hides a difference that the causes still make); a constant in
    an exported bias acts behind the head, so it is 0 there. NaN where pruning changed nothing or removed the head.
    """

    made_by: ClassVar[str] = "scan.against(other_scan)"

    remaining: Float[Tensor, "layer head"]
    before: Mapping[str, Float[Tensor, "layer head"]] | None = None
    after: Mapping[str, Float[Tensor, "layer head"]] | None = None

    @classmethod
    def of(
        cls,
        pruned: DifferenceStatistics,
        restored: DifferenceStatistics,
        causes: tuple[Causes | None, Causes | None],
        head_map: HeadMap,
    ) -> Recovered:
        """From both scans' statistics of head outputs, their causes, and the heads that pruning removed."""
        whole = head_map.without_removed(pruned.squared_difference.double())
        remaining = _ratio(restored.squared_difference, whole)
        first, second = causes
        if first is None or second is None:
            return cls(remaining)
        before = {**first.heads.by_cause(), CONSTANT: head_map.without_removed(torch.zeros_like(remaining))}
        along = second.heads.fraction.nan_to_num() * second.heads.squared_difference[..., None]
        after = {cause: _ratio(along[..., i], whole) for i, cause in enumerate(HEAD_CAUSES)}
        after[CONSTANT] = remaining - torch.stack(list(after.values())).sum(0)
        return cls(remaining, before, after)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"remaining, mean over heads": _percent(self.remaining)}
        if self.before is not None and self.after is not None:
            facts |= {
                cause: f"{_percent(self.before[cause])} before, {_percent(after)} after"
                for cause, after in self.after.items()
            }
        return facts

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, remaining, and with causes ``inherited_before``, ``inherited_after``, ..."""
        import pandas as pd

        heads = all_heads(*self.remaining.shape)
        columns: dict[str, Any] = {"layer": [h.layer for h in heads], "head": [h.head for h in heads]}
        columns["remaining"] = self.remaining.flatten().tolist()
        for end, parts in (("before", self.before), ("after", self.after)):
            columns |= {f"{cause}_{end}": part.flatten().tolist() for cause, part in (parts or {}).items()}
        return pd.DataFrame(columns)


def _ratio(part: Tensor, whole: Tensor) -> Float[Tensor, "layer head"]:
    return torch.where(whole > 0, part.double() / whole, torch.nan).float()


def _percent(values: Tensor) -> str:
    return f"{round(100 * float(values.double().nanmean()), 1) + 0.0:.1f} %"  # no minus before a zero
