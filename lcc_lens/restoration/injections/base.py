"""What every injection can do: act on a hooked model, say what it trains, and hand over what can be folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, kept_hooks
from lcc_lens.models.hooked.weights import changed_weights
from lcc_lens.restoration.injections.changes import Change, merged
from lcc_lens.restoration.injections.footprint import Footprint


class Injection(nn.Module):
    """Numbers that act on a hooked model's forward pass and fold into tensors that its checkpoint has anyway.

    All trained numbers are float32 whatever the model computes in: steps of 1e-3 are lost in bfloat16.
    """

    #: AdamW's learning rate if none is asked for; injections train together at their own rates.
    default_lr: float = 1e-3

    @property
    def n_trained(self) -> int:
        """How many numbers training moves."""
        return sum(number.numel() for number in self.parameters() if number.requires_grad)

    @property
    def parts(self) -> Sequence[Injection]:
        """The injections that this one is made of; itself if it is simple."""
        return (self,)

    @property
    def footprint(self) -> Footprint:
        """What it touches, trains and needs; changed weights by default."""
        return Footprint(weights=tuple(self.changes()), n_trained=self.n_trained)

    def hooks(self) -> list[NamedHook]:
        """Hooks with the present numbers; gradients flow into them."""
        return []

    def changes(self) -> Mapping[str, Change]:
        """Changed weights by the plain name of their module."""
        return {}

    def merged_weights(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """By plain name of a map, what gives its weight ``[out, in]`` once the injection is merged."""
        return merged(part.changes() for part in self.parts)

    def penalty(self) -> Tensor | None:
        """What training adds to the objective of every step, once; nothing by default."""
        return None

    def attached(self, model: HookedModel) -> AbstractContextManager[HookedModel]:
        """Let the model compute with the changed weights inside the block; :meth:`hooks` are for every forward pass."""
        changes = self.merged_weights()
        return changed_weights(model, changes) if changes else nullcontext(model)

    @contextmanager
    def applied_to(self, model: HookedModel) -> Iterator[HookedModel]:
        """Let the model compute with the present numbers inside the block; it leaves the block unchanged."""
        with self.attached(model), kept_hooks(model, self.hooks()):
            yield model


class Composite(Injection):
    """Several injections at once.

    Args:
        parts: what acts together; the learning rate that a request names is that of the first one that trains.
    """

    def __init__(self, parts: Sequence[Injection]) -> None:
        super().__init__()
        self.members = nn.ModuleList(parts)
        self.default_lr = next((part.default_lr for part in parts if part.n_trained), parts[0].default_lr)

    @property
    def parts(self) -> Sequence[Injection]:
        """The injections that this one is made of."""
        return [part for member in self.members if isinstance(member, Injection) for part in member.parts]

    @property
    def footprint(self) -> Footprint:
        """That of all parts."""
        return Footprint.joined(part.footprint for part in self.parts)

    def hooks(self) -> list[NamedHook]:
        """The hooks of all parts."""
        return [hook for part in self.parts for hook in part.hooks()]
