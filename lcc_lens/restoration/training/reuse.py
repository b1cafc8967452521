"""Cache activations that training does not change: below the lowest trained layer, and of the dense model."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.data.batches import Batch
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, before_unembed, logits_at
from lcc_lens.models.hooked.layer_skipping import only_layers
from lcc_lens.models.hooked.layer_walk import can_start_at_layers, layer_output
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.self_checks import SAME_OPERATIONS, check_tokens, is_close, tried_once
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.objectives import Outputs, Source, run_model

logger = logging.getLogger(__name__)
_LAYER = re.compile(r"\.(\d+)\.")
_MEMORY = 2**30
#: Fraction of the free disk space that may be used.
_DISK_FRACTION = 0.5


class CachedTeacher(Source):
    """The dense model's logits from its last hidden states, which are cached per sequence.

    Logits are hundreds of times larger than the hidden states, so the hidden states are cached (in the model's format)
    and only the unembedding runs again. A model whose logits are not the unembedding of its hidden states, and one
    whose head outputs are requested, runs as a whole every time.

    Args:
        model: the hooked dense model.
        kept: where hidden states are kept.
    """

    def __init__(self, model: HookedModel, cache: StateCache | None = None) -> None:
        self.model = model
        self._cache = cache or StateCache()

    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        if with_z or hooks or not with_logits or not _can_unembed(self.model):
            return run_model(self.model, batch, mask, hooks, with_logits=with_logits, with_z=with_z)
        hidden = self._cache.get(batch, device_of(self.model), lambda tokens: _hidden(self.model, tokens))
        return Outputs(_unembed(self.model, hidden[mask.to(hidden.device)][None])[0], {})


class StartedLater(Source):
    """A model whose lower layers run once per sequence; passes start at a layer from the cached residual stream.

    Args:
        model: the hooked model; the injection must not change the layers below ``layer``.
        layer: the first layer of a pass.
        checkpoint_layers: see :func:`~lcc_lens.models.hooked.forward.forward`.
    """

    def __init__(
        self, model: HookedModel, layer: int, cache: StateCache | None = None, *, checkpoint_layers: bool = False
    ) -> None:
        self.model, self.layer, self.checkpoint_layers = model, layer, checkpoint_layers
        self._cache = cache or StateCache()

    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        reads = {"with_logits": with_logits, "with_z": with_z, "checkpoint_layers": self.checkpoint_layers}
        if with_z or not can_start_at_layers(self.model):
            return run_model(self.model, batch, mask, hooks, **reads)
        stream = self._cache.get(
            batch, device_of(self.model), lambda tokens: layer_output(self.model, self.layer - 1, tokens)
        )
        with only_layers(self.model, range(self.layer, int(self.model.cfg.n_layers)), stream):
            return run_model(self.model, batch, mask, hooks, **reads)


def first_layer(injection: Injection) -> int:
    """The lowest layer that an injection acts on; 0 if a hook's or module's name has no layer."""
    names = [name for name, _ in injection.hooks()]
    names += [name for part in injection.parts for name in part.changes()]
    layers = [int(match[1]) if (match := _LAYER.search(f".{name}.")) else 0 for name in names]
    return min(layers, default=0)


def reused(
    model: HookedModel, injection: Injection, last: StartedLater | None = None, *, checkpoint_layers: bool = False
) -> HookedModel | StartedLater:
    """The model started at the lowest layer that the injection acts on; the model itself if that is the first layer.

    Args:
        last: the result of an earlier call for this model, which is returned if it starts at the same layer.
        checkpoint_layers: see :func:`~lcc_lens.models.hooked.forward.forward`.
    """
    layer = first_layer(injection)
    if last is not None and (last.layer, last.checkpoint_layers) == (layer, checkpoint_layers):
        return last
    if layer == 0 or not can_start_at_layers(model):
        return model
    return StartedLater(model, layer, checkpoint_layers=checkpoint_layers)


@tried_once(on_failure=False)
def _can_unembed(model: HookedModel) -> bool:
    """Whether a model's logits are the unembedding of its last hidden states; tried once per model."""
    tokens = check_tokens(model)
    whole = forward(model, tokens, [])
    return is_close(_unembed(model, _hidden(model, tokens)), whole, SAME_OPERATIONS, whole.dtype)


@torch.no_grad()
def _hidden(model: HookedModel, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """The input of the unembedding."""
    hidden: list[Tensor] = []

    def keep(resid: Tensor, hook: Any) -> None:
        hidden.append(resid)

    forward(model, tokens, [(before_unembed(model), keep), *logits_at(model, None)])
    return hidden[0]


def _unembed(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.unembed(hidden)
    return logits


class StateCache:
    """Tensors ``[pos, width]`` by token sequence, in memory and then on disk.

    Every sequence is computed by itself, so a cached tensor does not depend on the batch in which the sequence first
    occurred: training gives the same bits whether tensors are computed or cached, also after an interruption. On disk
    they are temporary files (in ``TMPDIR``) that are mapped into memory and already deleted, so that nothing is left
    behind, even if the process is killed.

    Args:
        max_bytes: limit of memory, on the tensors' device.
        max_disk_bytes: limit of disk space; half of the free space if not given.
    """

    def __init__(self, *, max_bytes: int = _MEMORY, max_disk_bytes: int | None = None) -> None:
        self.max_bytes, self._max_disk_bytes = max_bytes, max_disk_bytes
        self.n_bytes = self.n_disk_bytes = 0
        self._states: dict[tuple[int, ...], Tensor] = {}

    def get(
        self,
        batch: Batch,
        device: torch.device,
        compute: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos width"]],
    ) -> Float[Tensor, "batch pos width"]:
        """A batch's tensors on a device, zero at padding; ``compute`` returns that of one sequence's tokens."""
        rows = zip(batch.tokens, batch.lengths.tolist(), strict=True)
        states = [self._one(tokens[:n], device, compute) for tokens, n in rows]
        whole = states[0].new_zeros(*batch.tokens.shape, states[0].shape[-1])
        for row, state in zip(whole, states, strict=True):
            row[: len(state)] = state
        return whole

    def _one(
        self, tokens: Int[Tensor, " pos"], device: torch.device, compute: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "pos width"]:
        key = tuple(tokens.tolist())
        if key in self._states:
            return self._states[key].to(device)
        with torch.inference_mode(mode=False), torch.no_grad():  # a backward pass may read the cached tensor
            computed = compute(tokens[None].to(device))[0].detach().clone()
            size = computed.numel() * computed.element_size()
            if self.n_bytes + size <= self.max_bytes:
                self._states[key], self.n_bytes = computed, self.n_bytes + size
            elif self.n_disk_bytes + size <= self._disk_bytes():
                self._spill(key, computed, size)
        return computed

    def _spill(self, key: tuple[int, ...], computed: Tensor, size: int) -> None:
        try:
            self._states[key] = _mapped(computed)
            self.n_disk_bytes += size
        except OSError as error:
            logger.warning("no more activations are cached on disk (%s); they are computed again", error.strerror)
            self._max_disk_bytes = 0

    def _disk_bytes(self) -> int:
        if self._max_disk_bytes is None:
            self._max_disk_bytes = int(shutil.disk_usage(tempfile.gettempdir()).free * _DISK_FRACTION)
        return self._max_disk_bytes


def _mapped(tensor: Tensor) -> Tensor:
    """The tensor in a file that is mapped into memory and deleted; the system frees it with the mapping."""
    values = tensor.cpu().contiguous().view(torch.uint8).reshape(-1)
    with tempfile.NamedTemporaryFile(prefix="lcc-lens-") as file:
        file.write(values.numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, size=values.numel(), dtype=torch.uint8)
    return mapped.view(tensor.dtype).reshape(tensor.shape)
