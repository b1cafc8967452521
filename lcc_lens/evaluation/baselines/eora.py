"""EoRA: closed-form low-rank approximation of the removed weights in the inputs' eigenspace (arXiv 2410.21271)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.models.architecture.layers import linear_weight
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model, weight_shape
from lcc_lens.pruning.methods.moments import InputMoments
from lcc_lens.restoration.injections.adapters import AdapterInjection
from lcc_lens.restoration.injections.weights import layer_maps


class EoraInjection(AdapterInjection):
    """Fixed low-rank terms added to linear layers, $y = W x + B A x$; nothing is trained.

    Args:
        layers: a linear layer with its low-rank term, by the path of the plain module that it replaces.
        names: those modules' plain names.
    """

    @property
    def n_beside(self) -> int:
        """Number of parameters kept beside the model's weights."""
        return sum(buffer.numel() for buffer in self.buffers())

    def merged_weights(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By name of a linear layer, a function that merges the low-rank term into its weight ``[out, in]``."""
        return {
            name: member.merged for name, member in zip(self._names, self.members, strict=True)
            if isinstance(member, _WithLowRank)
        }  # fmt: skip


class _WithLowRank(nn.Module):
    """A linear layer and its low-rank term."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a child module: the weights belong to the model
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the low-rank term, which is computed in float32."""
        output: Tensor = self.__dict__["base"](x)
        return output + ((x.float() @ self.A.T) @ self.B.T).to(output)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight ``[out, in]`` with the low-rank term merged."""
        return (weight.float() + self.B @ self.A).to(weight)


def eora(
    model: HookedModel,
    dense: HookedModel,
    sequences: Sequence[TokenSequence],
    *,
    rank: int = 8,
    max_tokens: int = 1024,
) -> EoraInjection:
    r"""The best rank-$r$ approximation of $\Delta W = W_{dense} - W$ on the calibration inputs, for each linear layer.

    With $X X^\top = Q \Lambda Q^\top$ of a layer's inputs in the pruned model, the best rank-$r$ form $U S V^\top$ of
    $\Delta W Q \Lambda^{1/2}$ gives $B = U S$ and $A = V^\top \Lambda^{-1/2} Q^\top$, which minimises
    $\lVert (\Delta W - B A) X \rVert$. It adds parameters and inference time; merging it would fill the zeros.

    Reference:
        EoRA (arXiv 2410.21271), from the paper alone.
    """
    if rank < 1:
        raise RequestError(f"expected a rank of at least 1, got {rank}; raise it")
    linear, originals = layer_maps(model), layer_maps(dense)
    shapes = [{name: weight_shape(module) for name, module in group.items()} for group in (linear, originals)]
    if shapes[0] != shapes[1]:
        raise RequestError("expected models whose layers have the same shapes, got a sliced one; leave eora out")
    moments = _input_moments(model, linear, sequences, max_tokens)
    layers: dict[str, nn.Module] = {}
    paths = {id(module): path for path, module in plain_model(model).named_modules()}
    for name, module in linear.items():
        try:
            moment = moments[name]
        except LensError as error:
            raise RequestError(
                f"expected a model that computes with {name}, got one that uses a copy of it; leave eora out"
            ) from error
        lost = linear_weight(originals[name]).detach().float().to(moment) - linear_weight(module).detach().float()
        layers[paths[id(module)]] = _WithLowRank(module, *_low_rank(lost, moment, rank))
    return EoraInjection(layers, list(linear))


def _low_rank(
    lost: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    values, Q = torch.linalg.eigh(moment.double())
    is_used = values > values[-1] * 1e-9  # directions without input are left out
    root, Q = values[is_used].sqrt(), Q[:, is_used]
    U, S, Vh = torch.linalg.svd(lost.double() @ Q * root, full_matrices=False)
    A = (Vh[:rank] / root) @ Q.T
    return A.float(), (U[:, :rank] * S[:rank]).float()


@torch.inference_mode()
def _input_moments(
    model: HookedModel, layers: Mapping[str, nn.Module], sequences: Sequence[TokenSequence], max_tokens: int
) -> InputMoments:
    moments, device = InputMoments(), device_of(model)
    valid = last = counted = torch.empty(0)

    def observe(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal last, counted
        if args[0] is not last:  # q, k and v read the same inputs and share their moments
            last, counted = args[0], args[0][valid]
        moments.add(name, counted)

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(functools.partial(observe, name)).remove)
        for batch in batches(sequences, max_tokens=max_tokens):
            valid = batch.is_valid().to(device)
            run_without_logits(model, batch.tokens.to(device), [])
    return moments
