"""Hooks that read or change activations of a TransformerLens model, or restrict the positions of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.core.errors import RequestError

HookFunction = Callable[..., Tensor | None]
NamedHook = tuple[str, HookFunction]

#: Where the residual stream enters the unembedding: TransformerBridge, then HookedTransformer (whose unembedding has
#: no input hook, so the final norm's output stands in for it).
_BEFORE_UNEMBED = ("unembed.hook_in", "ln_final.hook_normalized")


@runtime_checkable
class HookedModel(Protocol):
    """A TransformerLens model: configuration, hook points and hooked runs."""

    cfg: Any
    hook_dict: dict[str, Any]

    def run_with_hooks(self, *args: Any, fwd_hooks: list[NamedHook], **kwargs: Any) -> Any:
        """Run forward with temporary hooks."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward and keep activations."""
        ...

    def hooks(self, fwd_hooks: list[NamedHook]) -> Any:
        """Context manager that keeps hooks on the model."""
        ...


def z_name(layer: int) -> str:
    """The hook point of a layer's head outputs before the output projection, ``[batch, pos, n_heads, d_head]``."""
    return f"blocks.{layer}.attn.hook_z"


def pattern_name(layer: int) -> str:
    """The hook point of a layer's attention patterns, ``[batch, n_heads, query, key]``."""
    return f"blocks.{layer}.attn.hook_pattern"


def mlp_name(layer: int) -> str:
    """The hook point of a layer's MLP after its activation, before the down projection, ``[batch, pos, d_mlp]``."""
    return f"blocks.{layer}.mlp.hook_post"


def resid_name(layer: int) -> str:
    """The hook point of the residual stream after a layer, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_resid_post"


def resid_pre_name(layer: int) -> str:
    """The hook point of the residual stream before a layer, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_resid_pre"


def readers(name: Callable[[int], str], layers: Iterable[int], visit: Callable[[int, Tensor], None]) -> list[NamedHook]:
    """Hooks that call ``visit(layer, activation)`` with every layer's activation at the hook point ``name(layer)``."""

    def reader(layer: int) -> HookFunction:
        def read(z: Tensor, hook: Any) -> None:
            visit(layer, z)

        return read

    return [(name(layer), reader(layer)) for layer in layers]


def z_readers(layers: Iterable[int], visit: Callable[[int, Tensor], None]) -> list[NamedHook]:
    """Hooks that call ``visit(layer, z)`` with every layer's head outputs."""
    return readers(z_name, layers, visit)


def adders(name: Callable[[int], str], constants: Mapping[int, Tensor]) -> list[NamedHook]:
    """Hooks that add a constant at the hook point ``name(layer)``, the same at every position.

    Args:
        constants: by layer, of the activation's shape without batch and position.
    """

    def adder(constant: Tensor) -> HookFunction:
        def add(z: Tensor, hook: Any) -> Tensor:
            return z + constant.to(z)

        return add

    return [(name(layer), adder(constant)) for layer, constant in constants.items()]


def z_adders(constants: dict[int, Float[Tensor, "head d_head"]]) -> list[NamedHook]:
    r"""Hooks that add a constant to head outputs, $z \leftarrow z + c$ at every position (Eq. 5)."""
    return adders(z_name, constants)


def before_unembed(model: HookedModel) -> str:
    """The hook point at which the residual stream enters the unembedding."""
    name = next((name for name in _BEFORE_UNEMBED if name in model.hook_dict), None)
    if name is None:
        raise RequestError(
            f"expected a hook point before the unembedding ({' or '.join(_BEFORE_UNEMBED)}), got none; use another "
            "model"
        )
    return name


def logits_at(model: HookedModel, mask: Bool[Tensor, "batch pos"] | None) -> list[NamedHook]:
    """A hook after which the unembedding computes the logits of the masked positions only; of none with ``None``.

    The run returns logits ``[1, n_masked, d_vocab]`` in row-major order of the mask. The unembedding takes a fifth of a
    small model's time and most of its memory.
    """
    name = before_unembed(model)

    def narrow(resid: Tensor, hook: Any) -> Tensor:
        return resid[:1, :0] if mask is None else resid[mask][None]

    return [(name, narrow)]


@contextmanager
def kept_hooks(model: HookedModel, hooks: list[NamedHook]) -> Iterator[HookedModel]:
    """Keep hooks on a model inside the block, and remove them after it, also after an error."""
    with model.hooks(fwd_hooks=hooks):
        yield model
