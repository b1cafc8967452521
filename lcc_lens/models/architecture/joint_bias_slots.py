"""The biases of several sites in one checkpoint: one configuration under which all of them load."""

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
    """The slots of every site that has constants, and what a checkpoint becomes so that all of them load.

    Sites may share a bias (both blocks of a parallel layer); it then takes the constants of both.
    """

    by_site: Mapping[ConstantSite, BiasSlots]

    @property
    def retyped_as(self) -> str | None:
        """The other architecture, where one is needed."""
        return next((slots.retyped_as for slots in self.by_site.values() if slots.retyped_as), None)

    @property
    def config(self) -> dict[str, Any]:
        """Entries of ``config.json`` to set (all of them for another architecture)."""
        entries = {name: value for slots in self.by_site.values() for name, value in slots.config.items()}
        switched = {name: slots.config[name] for slots in self.by_site.values() for name in slots.switches}
        return {**entries, **switched}  # a site's configuration has the other site's switch off

    @property
    def splits(self) -> Splits:
        """See :class:`~lcc_lens.models.architecture.bias_slots.BiasSlots`."""
        return {name: parts for slots in self.by_site.values() for name, parts in slots.splits.items()}

    def new_biases(self, stored: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the biases that a checkpoint has not yet, those that stay zero as well."""
        shapes: dict[str, tuple[int, ...]] = {}
        for slots in self.by_site.values():
            shapes |= slots.zero_biases
            shapes |= {bias: (slots.width or 0,) for bias in slots.biases if bias not in stored}
        return shapes


def find_joint_slots(
    checkpoint: Checkpoint, maps: Mapping[ConstantSite, tuple[str, ...]], *, shared_values: bool = False
) -> JointSlots:
    """Find biases that hold the constants of every named site at once; see
    :func:`~lcc_lens.models.architecture.bias_slots.find_slots`.

    Args:
        checkpoint: the model on disk.
        maps: what reads each site, by layer.
        shared_values: whether the heads that share a value head have the same constant.

    Raises:
        RequestError: a site has no exact way, or the sites' ways exclude each other.
    """
    found = {site: find_slots(checkpoint, names, site, shared_values=shared_values) for site, names in maps.items()}
    joint = JointSlots(found)
    for slots in found.values():
        is_stored = not slots.config and not joint.splits
        if joint.retyped_as not in (None, slots.retyped_as) and not is_stored:
            ways = " and ".join(slots.way for slots in found.values())
            raise RequestError(
                f"expected one configuration that holds the constants of {' and '.join(found)}, got {ways}; "
                f"restore one "
                "of them, or for hooks alone (exportable=False, --hooks-only) and serve it by lcc_lens.load_restored"
            )
    return joint
