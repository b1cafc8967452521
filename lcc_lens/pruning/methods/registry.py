"""The registry of pruning methods, to which users add their own; it imports a method when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.core.registry import Registry

if TYPE_CHECKING:
    from lcc_lens.pruning.methods.pruners import PrunerFactory

_HERE = "lcc_lens.pruning.methods"
PRUNERS: Registry[PrunerFactory] = Registry(
    "pruner",
    {},
    lazy={
        "magnitude": f"{_HERE}.pruners:MagnitudePruner",
        "wanda": f"{_HERE}.pruners:WandaPruner",
        "sparsegpt": f"{_HERE}.sparsegpt:SparseGPTPruner",
        "slimgpt": f"{_HERE}.slimgpt:SlimGPTPruner",
    },
)
_MEMBERS = ("uses_inputs", "observe", "pruned", "removed")


@ranged
def register_pruner(name: str, factory: PrunerFactory, *, replace: bool = False) -> None:
    """Add a pruning method, which then works in :func:`lcc_lens.prune` under its name.

    For the command line, install it in a package with an entry point of the group ``lcc_lens.pruners``.

    Args:
        name: lower-case letters, digits, ``-`` and ``_``.
        factory: a class that satisfies :class:`~lcc_lens.pruning.methods.pruners.LayerPruner`; it is called with the
            :class:`~lcc_lens.pruning.methods.pruners.LayerTask` of every decoder layer.
        replace: allow a name that is taken.

    Raises:
        RequestError: the class lacks a member of the protocol, or the name has another form or is taken.

    Example:
        >>> import torch
        >>> from lcc_lens.pruning.methods.pruners import MaskPruner
        >>> class RandomPruner(MaskPruner):  # prunes the weights with the lowest scores
        ...     def __init__(self, task):
        ...         super().__init__(task)
        ...         self.generator = torch.Generator().manual_seed(task.seed)
        ...
        ...     def score(self, name, weight):
        ...         return torch.rand(weight.shape, generator=self.generator)
        >>> register_pruner("random", RandomPruner)
        >>> lcc_lens.prune("smollm2", "out/random50", method="random")  # doctest: +SKIP
    """
    _require_members(name, factory)
    PRUNERS.register(name, factory, replace=replace)


def pruner_factory(name: str) -> PrunerFactory:
    """The factory of a pruning method.

    Raises:
        RequestError: there is no such method, or it does not satisfy the protocol.
    """
    factory = PRUNERS[name]
    _require_members(name, factory)
    return factory


def _require_members(name: str, factory: PrunerFactory) -> None:
    if missing := [member for member in _MEMBERS if not hasattr(factory, member)]:
        raise RequestError(
            f"expected a class with {', '.join(_MEMBERS)} for the pruner {name!r}, got {factory!r} without "
            f"{', '.join(missing)}; see lcc_lens.pruning.methods.pruners.LayerPruner"
        )
