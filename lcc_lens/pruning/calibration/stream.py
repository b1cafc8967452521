"""Run calibration data through a model one layer at a time, each on the outputs of the already pruned ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.core.config import default_device_map
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.machine.memory import trim_heap
from lcc_lens.core.machine.threads import settle_threads
from lcc_lens.core.progress import loading_models
from lcc_lens.models.architecture.layers import decoder_layers, read_config
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.models.hooked.offloading import bring_in, entry_device, placement
from lcc_lens.pruning.calibration.attention_cache import AttentionCache
from lcc_lens.pruning.calibration.layer_calls import LayerCall, record_calls
from lcc_lens.pruning.methods.pruners import LayerPruner

#: Takes a matrix's name and a batch of its inputs ``[token, in]``.
Observer = Callable[[str, Tensor], None]

#: Size limit of cached activations, for one layer; 2 GiB.
MOST_BYTES = 2**31
#: Tolerance for the relative rounding error of a sum in bfloat16.
_ROUNDING = 2e-2


class LayerStream:
    """Hidden states of all calibration sequences at the input of the current decoder layer.

    Only one layer's hidden states exist at a time: `advance` overwrites them in place. The other arguments of a layer
    depend on the layer and the batch's shape, not on the tokens, so they are recorded once per shape.

    Args:
        model: a causal language model, in evaluation mode on the device to compute on.
        layers: its decoder layers.
        tokens: calibration sequences of equal length, without padding.
        batch_size: sequences per forward pass.

    Raises:
        RequestError: a layer has arguments other than the hidden states that depend on the tokens.
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, tokens: Int[Tensor, "sequence pos"], batch_size: int
    ) -> None:
        self._layers = layers
        self._index = 0
        self._brought_in: set[int] = set()
        self._attention_cache = AttentionCache(MOST_BYTES)
        self._batch_size = batch_size
        self._calls: dict[int, list[LayerCall]] = {}
        device = entry_device(model)
        hidden = torch.empty(0)
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size].to(device)
            n_calls = 1 if len(batch) in self._calls else len(layers)
            hidden_in, calls = record_calls(model, layers, batch, n_calls=n_calls)
            if not calls[0].has_tensors_of(self._calls.setdefault(len(batch), calls)[0]):
                raise RequestError(
                    "expected layers that see the tokens through hidden states alone, "
                    f"got other inputs in {type(model).__name__}; the architecture is not supported"
                )
            if start == 0:
                hidden = hidden_in.new_empty(len(tokens), *hidden_in.shape[1:])
            hidden[start : start + len(batch)] = hidden_in
        self._hidden: Float[Tensor, "sequence pos d_model"] = hidden

    def observe(self, matrices: Sequence[Matrix], pruner: LayerPruner) -> None:
        """Run the current layer and pass the inputs of its matrices to a pruner; see :meth:`batches_observed`."""
        for _ in self.batches_observed(matrices, pruner.observe):
            pass

    def batches_observed(
        self, matrices: Sequence[Matrix], observe: Observer, *, settled: Matrix | None = None
    ) -> Generator[None, None, None]:
        """Run the current layer and pass the inputs of some matrices to an observer; yields after every batch.

        If each matrix ran once in the first batch, later passes end after the last of them.

        Args:
            settled: one of them, whose inputs will not change while this layer is the current one: they are cached
                where possible (see :class:`~lcc_lens.pruning.calibration.attention_cache.AttentionCache`).

        Raises:
            LensError: a weight of the layer is not finite in the compute format.
        """
        layer = self._checked_layer()
        runs = dict.fromkeys((matrix.name for matrix in matrices), 0)
        last, n_runs = math.inf, 0

        def show(name: str, inputs: Tensor) -> None:
            nonlocal n_runs
            observe(name, inputs)
            n_runs, runs[name] = n_runs + 1, runs[name] + 1
            if n_runs == last:
                raise _AllSeen

        observed = {name: layer.get_submodule(m.path) for name, m in zip(runs, matrices, strict=True)}
        with ExitStack() as stack:
            after_pass: Callable[[int], None] | None = None
            if settled is not None:
                after_pass = stack.enter_context(self._attention_cache.recording(layer, settled.path, self.n_batches))
            stack.enter_context(_observed(observed, show))
            for start in range(0, len(self._hidden), self._batch_size):
                n_runs = 0
                with suppress(_AllSeen):
                    self._output(start)
                if after_pass is not None:
                    after_pass(start)
                if start == 0 and set(runs.values()) == {1}:
                    last = len(runs)
                yield

    def whole_batches(
        self, matrices: Sequence[Matrix], observe: Observer
    ) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """Run the whole current layer and pass the inputs of some matrices to an observer; yields its outputs by batch.

        Raises:
            LensError: a weight of the layer is not finite in the compute format.
        """
        layer = self._checked_layer()
        with _observed({matrix.name: layer.get_submodule(matrix.path) for matrix in matrices}, observe):
            for start in range(0, len(self._hidden), self._batch_size):
                yield self._output(start)

    @property
    def n_batches(self) -> int:
        """How many batches there are."""
        return -(-len(self._hidden) // self._batch_size)

    def hidden_batches(self) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """The inputs of the current layer, in the batches of :meth:`batches_observed`."""
        for start in range(0, len(self._hidden), self._batch_size):
            yield self._hidden[start : start + self._batch_size]

    def adds_up(self, outputs: Sequence[Matrix]) -> bool:
        """Whether the current layer's output is its input plus these projections' outputs, on the first batch."""
        layer, projected = self._layer(), []
        modules = [layer.get_submodule(matrix.path) for matrix in outputs]
        handles = [module.register_forward_hook(lambda _, args, output: projected.append(output)) for module in modules]
        try:
            hidden_out = self._output(0).float()
        finally:
            for handle in handles:
                handle.remove()
        hidden_in = next(self.hidden_batches()).float()
        total = hidden_in + sum(output.reshape(hidden_in.shape).float() for output in projected)
        return float((total - hidden_out).norm()) <= _ROUNDING * float((hidden_out - hidden_in).norm())

    def replace(self, matrix: Matrix, weight: Tensor) -> None:
        """Put a new weight, in the layout of the checkpoint, into the current layer."""
        parameter = self._layer().get_submodule(matrix.path).get_parameter("weight")
        # Not copied where formats agree: the model and the result then share memory.
        parameter.data = weight.to(device=parameter.device, dtype=parameter.dtype)
        self._attention_cache.forget(matrix.path)

    def layers_ahead(self, n: int) -> list[nn.Module]:
        """The current layer and those behind it, ``n`` in all or as many as there are, with their weights in memory."""
        return [self._layer(index) for index in range(self._index, min(self._index + n, len(self._layers)))]

    def calls_ahead(self, n_sequences: int) -> list[LayerCall]:
        """The other arguments of the current layer and of all behind it, for a batch of a size that was streamed."""
        return self._calls[n_sequences][self._index :]

    def inputs(self, sequences: Int[Tensor, " batch"]) -> Float[Tensor, "batch pos d_model"]:
        """The inputs of the current layer for some sequences; a copy."""
        return self._hidden[sequences.to(self._hidden.device)]

    def advance(
        self, outputs: Sequence[Float[Tensor, "_ pos d_model"]] | None = None, *, past_last: bool = False
    ) -> None:
        """Run the current layer as it is now and let its outputs become the inputs of the next one.

        Args:
            outputs: its outputs by batch, if they are known; the layer then does not run.
            past_last: whether the last layer runs too, whose outputs no layer reads.
        """
        if past_last or self._index + 1 < len(self._layers):
            for place, start in enumerate(range(0, len(self._hidden), self._batch_size)):
                output = self._output(start) if outputs is None else outputs[place]
                if not bool(torch.isfinite(output).all()):
                    raise LensError(
                        f"expected finite activations, got NaN or infinity from layer {self._index}; "
                        "check the checkpoint or compute in float32"
                    )
                self._hidden[start : start + len(output)] = output
        self._attention_cache.clear()
        if self._index in self._brought_in:  # it was read from disk and is not needed again
            self._layers[self._index].to("meta")
            trim_heap()
        self._index += 1

    @classmethod
    def of(
        cls,
        model_dir: Path,
        tokens: Int[Tensor, "sequence pos"],
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LayerStream:
        """Load a model and compute the inputs of its first layer."""
        from transformers import AutoModelForCausalLM

        settle_threads(device)
        places = placement(model_dir, device, default_device_map())
        # transformers chooses the attention: sdpa, or eager for architectures that sdpa cannot compute (Gemma 2).
        with loading_models():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, trust_remote_code=False, **places
            )
        (model if places else model.to(device)).eval().requires_grad_(False)
        return cls(model, decoder_layers(model, read_config(model_dir))[1], tokens, batch_size)

    @torch.no_grad()
    def _output(self, start: int) -> Float[Tensor, "batch pos d_model"]:
        """The current layer's output for the batch that begins with sequence ``start``."""
        # A copy, since a layer may add to its input in place and the buffer is read twice.
        batch = self._hidden[start : start + self._batch_size].clone()
        with self._attention_cache.applied(start):
            return self._calls[len(batch)][self._index](self._layer(), batch)

    def _checked_layer(self) -> nn.Module:
        layer = self._layer()
        for path, parameter in layer.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise LensError(
                    f"expected finite weights, got NaN or infinity in {path} of layer {self._index}; "
                    "check the checkpoint or compute in float32"
                )
        return layer

    def _layer(self, index: int | None = None) -> nn.Module:
        """A layer, the current one if not named, with its weights in memory."""
        index = self._index if index is None else index
        layer = self._layers[index]
        if bring_in(layer):
            self._brought_in.add(index)
        return layer


class _AllSeen(Exception):
    """Ends a layer's pass once all observed modules have run."""


@contextmanager
def _observed(modules: Mapping[str, nn.Module], observe: Observer) -> Iterator[None]:
    """Pass every input of some modules to an observer while the block runs."""

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: observe(name, args[0].reshape(-1, args[0].shape[-1]))

    handles = [module.register_forward_pre_hook(watcher(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
