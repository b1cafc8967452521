"""Some decoder layers in a row that learn, under their mask, to give the dense model's hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError
from lcc_lens.models.architecture.layers import decoder_layers, read_config, skeleton
from lcc_lens.models.architecture.linear_maps import STORED_DTYPES
from lcc_lens.pruning.calibration.stream import LayerStream

#: A parameter's name within a decoder layer, and its tensor's name in the checkpoint.
StoredNames = Mapping[str, str]


def stored_parameters(checkpoint: Checkpoint) -> list[StoredNames]:
    """The parameters of every decoder layer that the checkpoint stores as they are: weights, biases and norm gains."""
    config = read_config(checkpoint.path)
    prefix, layers = decoder_layers(skeleton(checkpoint.path, config), config)
    names: list[StoredNames] = []
    for index, layer in enumerate(layers):
        shapes = {path: tuple(parameter.shape) for path, parameter in layer.named_parameters()}
        stored = {path: checkpoint.stored_name(f"{prefix}.{index}.{path}") for path in shapes}
        names.append({path: name for path, name in stored.items() if _is_stored(checkpoint, name, shapes[path])})
    return names


def _is_stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    tensor = checkpoint.tensors.get(name)
    return tensor is not None and tensor.shape == shape and tensor.dtype in STORED_DTYPES


class Window:
    """The current decoder layer of a stream and some behind it, with their parameters in float32.

    Products of matrices are computed in the stream's format, sums in float32.

    Args:
        stream: the pruned model's.
        checkpoint: the pruned model on disk.
        stored: the parameters to train, of every layer of the window.

    Raises:
        LensError: a parameter is not finite.
    """

    def __init__(self, stream: LayerStream, checkpoint: Checkpoint, stored: Sequence[StoredNames]) -> None:
        self._stream, self._checkpoint, self._stored = stream, checkpoint, stored
        self._layers = stream.layers_ahead(len(stored))
        self._parameters = [
            {path: _read(checkpoint, name, layer.get_parameter(path).device) for path, name in names.items()}
            for names, layer in zip(stored, self._layers, strict=True)
        ]

    def error(self, dense: LayerStream, sequences: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        r"""$\lVert \hat h - h \rVert^2 / \lVert h \rVert^2$ behind the window, mean over tokens.

        Args:
            dense: the dense model's stream, advanced behind the window: its hidden states are $h$.
            sequences: as many as batches of the pruned model's stream have.
        """
        targets = dense.inputs(sequences).float()
        squares = (self._output(sequences).to(targets) - targets).square().sum(-1)
        return (squares / targets.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()

    @torch.no_grad()
    def mean_error(self, dense: LayerStream, batches: Iterable[Int[Tensor, " _"]]) -> float:
        """The error over some batches, each counted by its sequences."""
        parts = [(len(batch), float(self.error(dense, batch))) for batch in batches]
        return sum(n * error for n, error in parts) / sum(n for n, _ in parts)

    @torch.enable_grad()
    def train(self, dense: LayerStream, batches: Sequence[Int[Tensor, " _"]], lr: float) -> Iterator[None]:
        """Minimise the error by Adam, a step for each batch, under a rate that falls to zero; yields after every step.

        Ends early where the error is not finite. Parameters that are zero stay zero.
        """
        parameters = [parameter.requires_grad_() for layer in self._parameters for parameter in layer.values()]
        optimiser = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(batches))
        for batch in batches:
            optimiser.zero_grad()
            error = self.error(dense, batch)
            if not bool(error.isfinite()):
                return
            error.backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(parameter.detach() == 0, 0)
            optimiser.step()
            schedule.step()
            yield

    @torch.no_grad()
    def round(self) -> dict[str, Tensor]:
        """Round the parameters to the checkpoint's format and give them by stored name; none becomes zero by it."""
        rounded: dict[str, Tensor] = {}
        for names, parameters in zip(self._stored, self._parameters, strict=True):
            for path, parameter in parameters.items():
                before = self._checkpoint.read(names[path]).to(parameter.device)
                after = parameter.detach().to(before.dtype)
                after = torch.where((after == 0) | (before == 0), before, after)
                parameters[path] = after.float()
                rounded[names[path]] = after.cpu()
        return rounded

    def _output(self, sequences: Int[Tensor, " batch"]) -> Float[Tensor, "batch pos d_model"]:
        hidden = self._stream.inputs(sequences)
        dtype, calls = hidden.dtype, self._stream.calls_ahead(len(sequences))
        hidden = hidden.float()
        with torch.autocast(hidden.device.type, dtype, enabled=dtype != torch.float32):
            for layer, parameters, call in zip(self._layers, self._parameters, calls, strict=False):
                hidden = call(partial(_run, layer, parameters), hidden)
        return hidden


def put(layers: Sequence[nn.Module], stored: Sequence[StoredNames], weights: Mapping[str, Tensor]) -> None:
    """Give decoder layers other parameters, by stored name, in their own format."""
    for layer, names in zip(layers, stored, strict=True):
        for path, name in names.items():
            if name in weights:
                parameter = layer.get_parameter(path)
                parameter.data = weights[name].to(device=parameter.device, dtype=parameter.dtype)


def _run(layer: nn.Module, parameters: Mapping[str, Tensor], *args: object, **kwargs: object) -> object:
    return functional_call(layer, dict(parameters), args, kwargs)


def _read(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    parameter = checkpoint.read(name).to(device=device, dtype=torch.float32, copy=True)
    if not bool(parameter.isfinite().all()):
        raise LensError(f"expected finite weights, got NaN or infinity in {name}; fetch the checkpoint again")
    return parameter
