"""Find biases for the constants of several sites at once, under one configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.rewriting import Splits
from lcc_lens.models.architecture.bias_slots import BiasSlots, find_slots
from lcc_lens.models.hooked.sites import ConstantSite


@dataclass(frozen=True)
class JointSlots:
    """The biases of every site that has constants, and the changes that make a checkpoint load with all of them.

    Two sites may share a bias (attention and MLP of a parallel layer); it then takes the constants of both.
    """

    by_site: Mapping[ConstantSite, BiasSlots]

    @property
    def retyped_as(self) -> str | None:
        """The other architecture, if one is needed."""
        return next((slots.retyped_as for slots in self.by_site.values() if slots.retyped_as), None)

    @property
    def config(self) -> dict[str, Any]:
        """Entries of ``config.json`` to set (all of them for another architecture)."""
        entries = {name: value for slots in self.by_site.values() for name, value in slots.config.items()}
        switched = {name: slots.config[name] for slots in self.by_site.values() for name in slots.switches}
        return {**entries, **switched}  # each site's configuration leaves the other site's switch off

    @property
    def splits(self) -> Splits:
        """See :class:`~lcc_lens.models.architecture.bias_slots.BiasSlots`."""
        return {name: parts for slots in self.by_site.values() for name, parts in slots.splits.items()}

    def new_biases(self, stored: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the biases that a checkpoint lacks, including those that stay zero."""
        shapes: dict[str, tuple[int, ...]] = {}
        for slots in self.by_site.values():
            shapes |= slots.zero_biases
            shapes |= {bias: (slots.width or 0,) for bias in slots.biases if bias not in stored}
        return shapes


def find_joint_slots(
    checkpoint: Checkpoint, projections: Mapping[ConstantSite, tuple[str, ...]], *, shared_values: bool = False
) -> JointSlots:
    """Find biases that hold the constants of every named site at once; see
    :func:`~lcc_lens.models.architecture.bias_slots.find_slots`.

    Args:
        projections: by site, the linear layers that read it, by layer.
        shared_values: whether the heads that share a value head have the same constant.
    """
    by_site = {
        site: find_slots(checkpoint, names, site, shared_values=shared_values) for site, names in projections.items()
    }
    joint = JointSlots(by_site)
    for slots in by_site.values():
        is_stored = not slots.config and not joint.splits
        if joint.retyped_as not in (None, slots.retyped_as) and not is_stored:
            ways = " and ".join(slots.way for slots in by_site.values())
            raise RequestError(
                f"expected one configuration that holds the constants of {' and '.join(by_site)}, got {ways}; "
                "restore one of them, or both for hooks alone (exportable=False, --hooks-only) and serve the model "
                "with lcc_lens.load_restored"
            )
    return joint
