"""The interface of injections: act on a hooked model, train, and fold into its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, kept_hooks
from lcc_lens.models.hooked.weights import changed_weights
from lcc_lens.restoration.injections.changes import Change, merged
from lcc_lens.restoration.injections.footprint import Footprint


class Injection(nn.Module):
    """Trainable module that acts on a hooked model's forward pass and folds into tensors of its checkpoint.

    Trained parameters are float32 whatever the model's dtype: bfloat16 would lose steps of 1e-3.
    """

    #: AdamW's learning rate if the request names none; injections that train together keep their own.
    default_lr: float = 1e-3

    @property
    def n_trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def parts(self) -> Sequence[Injection]:
        """The injections that this one joins; itself if it joins none."""
        return (self,)

    @property
    def footprint(self) -> Footprint:
        """The biases and weights that it needs and trains; changed weights by default."""
        return Footprint(weights=tuple(self.changes()), n_trained=self.n_trained)

    def hooks(self) -> list[NamedHook]:
        """Hooks with the current parameters; gradients flow into them."""
        return []

    def changes(self) -> Mapping[str, Change]:
        """Changed weights by the plain name of their module."""
        return {}

    def merged_weights(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """By plain name of a linear layer, the function from its weight ``[out, in]`` to the merged one."""
        return merged(part.changes() for part in self.parts)

    def penalty(self) -> Tensor | None:
        """A term that training adds to the objective once per step; none by default."""
        return None

    def attached(self, model: HookedModel) -> AbstractContextManager[HookedModel]:
        """Change the model's weights inside the block; :meth:`hooks` must be passed to every forward pass beside it."""
        changes = self.merged_weights()
        return changed_weights(model, changes) if changes else nullcontext(model)

    @contextmanager
    def applied_to(self, model: HookedModel) -> Iterator[HookedModel]:
        """Apply hooks and changed weights inside the block; the model is unchanged after it."""
        with self.attached(model), kept_hooks(model, self.hooks()):
            yield model


class Composite(Injection):
    """Several injections at once.

    Args:
        parts: the injections; a requested learning rate is that of the first one that trains.
    """

    def __init__(self, parts: Sequence[Injection]) -> None:
        super().__init__()
        self.members = nn.ModuleList(parts)
        self.default_lr = next((part.default_lr for part in parts if part.n_trained), parts[0].default_lr)

    @property
    def parts(self) -> Sequence[Injection]:
        return [part for member in self.members if isinstance(member, Injection) for part in member.parts]

    @property
    def footprint(self) -> Footprint:
        """The joined footprint of all parts."""
        return Footprint.joined(part.footprint for part in self.parts)

    def hooks(self) -> list[NamedHook]:
        """The hooks of all parts."""
        return [hook for part in self.parts for hook in part.hooks()]
