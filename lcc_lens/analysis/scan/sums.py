"""What a scan adds up over its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from lcc_lens.analysis.causes.causes import RunningCauses
from lcc_lens.analysis.statistics import RunningDifferences
from lcc_lens.models.hooked.activations import Site, parts_of
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of


@dataclass(frozen=True)
class ScanSums:
    """The differences at every site and, where they are found, the parts of differences by cause."""

    sites: dict[Site, RunningDifferences]
    causes: RunningCauses | None = None

    def count(self, example: Int[Tensor, " sample"]) -> None:
        """Count one shard's samples and examples; ``example`` counts from 0 within the shard."""
        for running in self._by_name().values():
            running.count(example)

    def state(self) -> dict[str, Tensor]:
        """The sums so far by name."""
        named = self._by_name().items()
        return {f"{name}.{key}": t.cpu() for name, running in named for key, t in running.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the sums of :meth:`state`."""
        for name, running in self._by_name().items():
            running.restore({k.removeprefix(f"{name}."): t for k, t in state.items() if k.startswith(f"{name}.")})

    def _by_name(self) -> dict[str, RunningDifferences | RunningCauses]:
        named: dict[str, RunningDifferences | RunningCauses] = dict(self.sites.items())
        return named if self.causes is None else {**named, "causes": self.causes}


def running_sums(model: HookedModel, sites: Sequence[Site], spectra: Sequence[Site]) -> dict[Site, RunningDifferences]:
    """Empty sums for every site, on the model's device."""
    n_layers, device = int(model.cfg.n_layers), device_of(model)
    return {
        site: RunningDifferences(n_layers, *parts_of(model, site), device, second_moment=site in spectra)
        for site in sites
    }
