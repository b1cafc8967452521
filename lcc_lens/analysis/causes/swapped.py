"""Run one layer's attention or MLP by the model's own module, with chosen inputs and another model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.fused_attention import can_fuse
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.layer_skipping import replaced_forward

Part = Literal["attn", "mlp"]
_OUTPUTS: Mapping[Part, frozenset[str]] = {
    "attn": frozenset(name.rpartition(".")[2] for name in ATTENTION_OUTPUTS),
    "mlp": frozenset(name.rpartition(".")[2] for name in MLP_OUTPUTS),
}
#: TransformerLens' name of the output layer of each part.
_ENDS: Mapping[Part, str] = {"attn": "o", "mlp": "out"}


class _Stop(Exception):
    """Carries a module's input out of a forward pass that needs to go no further."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass(frozen=True)
class Call:
    """How a model calls a layer's attention or MLP: masks and positions, and the input."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Float[Tensor, "batch pos d_model"]:
        """The input: the output of the norm before, where there is one."""
        return cast("Tensor", self.args[0] if self.args else self.kwargs["hidden_states"])

    def on(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with another input, and without a cache of earlier keys and values."""
        from transformers import Cache  # slow to import; where a model runs, it has been

        kwargs = {name: value for name, value in self.kwargs.items() if not isinstance(value, Cache)}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return ((hidden, *self.args[1:]), kwargs) if self.args else ((), {**kwargs, "hidden_states": hidden})


@dataclass(frozen=True)
class Parameter:
    """A weight or bias where its module reads it."""

    owner: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        """The tensor that the module computes with."""
        return cast("Tensor", getattr(self.owner, self.attribute)).detach()

    @property
    def row_axis(self) -> int:
        """The axis of outputs: 1 in the weight of a transposed linear layer."""
        return 1 if self.attribute == "weight" and is_transposed(self.owner) else 0


@dataclass(frozen=True)
class PlainModule:
    """A layer's attention or MLP as transformers computes it, and the linear layer at its end."""

    module: nn.Module
    output: nn.Module
    parameters: Mapping[str, Parameter]
    """Without those of the output."""

    @classmethod
    def of(cls, model: HookedModel, layer: int, part: Part) -> PlainModule:
        """The module of a layer; an ``AttributeError`` or ``KeyError`` if there is none of its own."""
        module = getattr(cast("Any", model).blocks[layer], part).original_component
        children = dict(module.named_children())
        output = next(children[name] for name in children if name in _OUTPUTS[part])
        at_end = {id(inner) for inner in output.modules()}
        parameters = {
            f"{path}.{name}".replace("_original_component.", "").lstrip("."): Parameter(owner, name)
            for path, owner in module.named_modules()
            if id(owner) not in at_end
            for name in _tensor_names(owner)
        }
        return cls(module, output, parameters)

    def values(self) -> dict[str, Tensor]:
        """The parameters' tensors."""
        return {name: parameter.value for name, parameter in self.parameters.items()}

    def output_values(self) -> dict[str, Tensor]:
        """Weight ``[out, in]`` and bias of the linear layer at the end."""
        output = getattr(self.output, "original_component", self.output)
        weight = cast("Tensor", output.weight).detach()
        bias = getattr(output, "bias", None)
        values = {"weight": weight.T if is_transposed(output) else weight}
        return values if bias is None else {**values, "bias": bias.detach()}

    def before_output(
        self,
        call: Call,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        computed: Projections | None = None,
    ) -> Tensor:
        """What the linear layer at the end reads: head outputs, or the MLP's post-activation.

        Args:
            call: how the model calls the module.
            hidden: the module's input.
            weights: by the names of ``parameters``, what the module computes with instead of its own.
            computed: outputs of linear layers in earlier calls, which are not computed again; new ones are added.
        """
        args, kwargs = call.on(hidden)

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Stop(inputs[0])

        handle = self.output.register_forward_pre_hook(stop, prepend=True)  # before a visit of this place
        try:
            with ExitStack() as stack:
                stack.enter_context(shadowed({self.parameters[name]: v for name, v in (weights or {}).items()}))
                if computed is not None:
                    stack.enter_context(computed.reused(self.parameters.values(), hidden))
                self.module.forward(*args, **kwargs)
        except _Stop as stopped:
            return stopped.value
        finally:
            handle.remove()
        raise RuntimeError("the module does not call its output layer")


class Projections:
    """Outputs of the linear layers that read a module's input itself, by layer, weights and input."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[int, ...], tuple[tuple[Any, ...], Tensor]] = {}

    def __len__(self) -> int:
        """The number of outputs that were computed."""
        return len(self._outputs)

    @contextmanager
    def reused(self, parameters: Iterable[Parameter], hidden: Tensor) -> Iterator[None]:
        """Inside the block, a layer that has read ``hidden`` with the same weights gives the same output again."""
        layers = {id(p.owner): p.owner for p in parameters if p.attribute == "weight" and p.value.ndim == 2}
        with ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(replaced_forward(layer, self._remembering(layer, hidden)))
            yield

    def _remembering(self, layer: nn.Module, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        compute = layer.forward

        def forward(x: Tensor) -> Tensor:
            if x is not hidden:
                return cast("Tensor", compute(x))
            read = (layer, layer.weight, getattr(layer, "bias", None), hidden)
            key = tuple(map(id, read))
            if key not in self._outputs:
                self._outputs[key] = read, compute(x)  # what was read is kept, so that no other object gets its id
            return self._outputs[key][1].clone()  # a module may change it in place

        return forward


#: Called with part and layer, how the model calls the module, and what its output layer reads.
Visit = Callable[[Part, int, Call, Tensor], None]


@contextmanager
def watched_modules(model: HookedModel, visit: Visit) -> Iterator[None]:
    """Call ``visit(part, layer, call, value)`` in every layer's attention and MLP, before the output layer computes.

    Hooks that change the value at this point, such as constants of a restoration, come after it.
    """
    can_fuse(model)  # tried by passes of its own, before they are watched
    with ExitStack() as stack:
        for layer, block in enumerate(cast("Any", model).blocks):
            for part, end in _ENDS.items():
                module = block._modules.get(part)
                output = None if module is None else module._modules.get(end)
                if module is not None and output is not None:
                    watch = _Watch(visit, part, layer)
                    stack.callback(module.register_forward_pre_hook(watch.enter, with_kwargs=True).remove)
                    stack.callback(output.register_forward_pre_hook(watch.leave).remove)
        yield


class _Watch:
    """The call of one module, until its output layer is reached."""

    def __init__(self, visit: Visit, part: Part, layer: int) -> None:
        self.visit, self.part, self.layer = visit, part, layer
        self.call: Call | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = Call(args, kwargs)

    def leave(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        call, self.call = self.call, None
        if call is not None:
            self.visit(self.part, self.layer, call, inputs[0])


@contextmanager
def shadowed(values: Mapping[Parameter, Tensor]) -> Iterator[None]:
    """Let modules compute with other tensors than their parameters inside the block."""
    before = {at: at.owner.__dict__.get(at.attribute) for at in values}
    for at, value in values.items():
        at.owner.__dict__[at.attribute] = value  # an instance's attribute comes before a parameter of the same name
    try:
        yield
    finally:
        for at, old in before.items():
            if old is None:
                del at.owner.__dict__[at.attribute]
            else:
                at.owner.__dict__[at.attribute] = old


def _tensor_names(module: nn.Module) -> list[str]:
    """A module's parameters, also those that are temporarily replaced."""
    replaced = [name for name in ("weight", "bias") if isinstance(module.__dict__.get(name), Tensor)]
    return [*(name for name, value in module._parameters.items() if value is not None), *replaced]
