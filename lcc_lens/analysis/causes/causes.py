"""The causes of every head's and MLP's difference: a changed input and the layer's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from lcc_lens.analysis.causes.statistics import PartStatistics, RunningParts
from lcc_lens.core.heads import HeadMap, all_heads
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import pandas as pd

#: Causes of a head's difference: its layer's input, its queries and keys, its values.
HEAD_CAUSES = ("inherited", "pattern", "value")
#: Causes of an MLP's difference: its input, the weights before the activation, the down projection.
MLP_CAUSES = ("inherited", "gate_up", "down")


@dataclass(frozen=True, repr=False)
class Causes(Shown):
    """The causes of every head's difference, and of every MLP's output where the MLP can be given other weights."""

    heads: PartStatistics
    mlp: PartStatistics | None = None

    def _facts(self) -> dict[str, Any]:
        return {**self.heads._facts(), "MLPs": "not divided" if self.mlp is None else "divided too"}

    def columns(self) -> dict[str, list[float]]:
        """By name, one value per head: the fraction of every cause, its standard error and constant fraction."""
        return _columns(self.heads)

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, and the columns of :meth:`columns`."""
        import pandas as pd

        heads = all_heads(*self.heads.squared_difference.shape)
        places = {"layer": [h.layer for h in heads], "head": [h.head for h in heads]}
        return pd.DataFrame({**places, **self.columns()})

    def layer_table(self) -> pd.DataFrame:
        """Tidy: one row per layer, site (``z`` or ``mlp``) and cause, with the mean fraction over its heads."""
        import pandas as pd

        rows = [
            {"layer": layer, "site": site, "cause": cause, "fraction": float(value[layer].double().nanmean())}
            for site, parts in (("z", self.heads), ("mlp", self.mlp))
            if parts is not None
            for cause, value in parts.by_cause().items()
            for layer in range(len(value))
        ]
        return pd.DataFrame(rows)

    def mlp_table(self) -> pd.DataFrame:
        """One row per layer: the same columns for the MLP's output; empty if MLPs were not divided."""
        import pandas as pd

        columns = {} if self.mlp is None else _columns(self.mlp)
        n_layers = 0 if self.mlp is None else len(self.mlp.fraction)
        return pd.DataFrame({"layer": list(range(n_layers)), **columns})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, such as ``heads.fraction``."""
        sites = {"heads": self.heads, **({} if self.mlp is None else {"mlp": self.mlp})}
        return {f"{site}.{name}": tensor for site, parts in sites.items() for name, tensor in parts.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], n_samples: int) -> Causes | None:
        """The causes that :meth:`tensors` gave; None if there are no tensors."""

        def site(name: str, causes: tuple[str, ...]) -> PartStatistics | None:
            found: dict[str, Any] = {
                key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")
            }
            return PartStatistics(causes, n_samples, **found) if found else None

        heads = site("heads", HEAD_CAUSES)
        return None if heads is None else cls(heads, site("mlp", MLP_CAUSES))


@dataclass(frozen=True)
class RunningCauses:
    """Sums over the parts of every layer's differences; memory does not grow with the number of samples.

    Heads that ``head_map`` removed, whose output is not used, have no fractions.
    """

    heads: RunningParts
    mlp: RunningParts | None
    head_map: HeadMap

    def count(self, example: Int[Tensor, " sample"]) -> None:
        """Count one batch's samples and examples."""
        for parts in self._sites().values():
            parts.count(example)

    def finish(self) -> Causes:
        """The causes over all samples so far."""
        heads = self.heads.finish()
        kept = self.head_map.without_removed
        heads = replace(heads, fraction=kept(heads.fraction), stderr=kept(heads.stderr))
        return Causes(heads, None if self.mlp is None else self.mlp.finish())

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for resuming."""
        return {f"{site}.{name}": t for site, parts in self._sites().items() for name, t in parts.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the sums of :meth:`state`."""
        for site, parts in self._sites().items():
            parts.restore({k.removeprefix(f"{site}."): t for k, t in state.items() if k.startswith(f"{site}.")})

    def _sites(self) -> dict[str, RunningParts]:
        return {"heads": self.heads, **({} if self.mlp is None else {"mlp": self.mlp})}


def _columns(parts: PartStatistics) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for i, cause in enumerate(parts.causes):
        columns[cause] = parts.fraction[..., i].flatten().tolist()
        columns[f"{cause}_stderr"] = parts.stderr[..., i].flatten().tolist()
        columns[f"{cause}_constant"] = parts.constant_fraction[..., i].flatten().tolist()
    return columns
