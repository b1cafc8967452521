"""Training that computes once what does not change: the dense model's last hidden states, the layers below the first
injected one."""

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

_LAYER = re.compile(r"\.(\d+)\.")


class CachedTeacher(Source):
    """The dense model's logits from its last hidden states, which are kept per sequence.

    Logits are hundreds of times larger than the hidden states that they are one product of, so the states are kept
    (in the model's own format) and the product is repeated. Where a model makes more of it than that product, and for
    head outputs, it runs as a whole every time.

    Args:
        model: the hooked dense model.
        kept: where hidden states are kept.
    """

    def __init__(self, model: HookedModel, kept: KeptStates | None = None) -> None:
        self.model = model
        self._kept = kept or KeptStates()

    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        """See :class:`~lcc_lens.restoration.training.objectives.Source`; there may be no hooks."""
        if with_z or hooks or not with_logits or not _is_product(self.model):
            return run_model(self.model, batch, mask, hooks, with_logits=with_logits, with_z=with_z)
        hidden = self._kept.of(batch, device_of(self.model), lambda tokens: _hidden(self.model, tokens))
        return Outputs(_unembed(self.model, hidden[mask.to(hidden.device)][None])[0], {})


class StartedLater(Source):
    """A model whose lower layers are run once per sequence: passes go on from the residual stream that they leave.

    Args:
        model: the hooked model; what is injected must leave the layers below ``layer`` alone.
        layer: where to start.
        kept: where residual streams are kept.
        checkpoint_layers: see :func:`~lcc_lens.models.hooked.forward.forward`.
    """

    def __init__(
        self, model: HookedModel, layer: int, kept: KeptStates | None = None, *, checkpoint_layers: bool = False
    ) -> None:
        self.model, self.layer, self.checkpoint_layers = model, layer, checkpoint_layers
        self._kept = kept or KeptStates()

    def outputs(
        self, batch: Batch, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Any], *, with_logits: bool, with_z: bool
    ) -> Outputs:
        """See :class:`~lcc_lens.restoration.training.objectives.Source`."""
        reads = {"with_logits": with_logits, "with_z": with_z, "checkpoint_layers": self.checkpoint_layers}
        if with_z or not can_start_at_layers(self.model):
            return run_model(self.model, batch, mask, hooks, **reads)
        stream = self._kept.of(
            batch, device_of(self.model), lambda tokens: layer_output(self.model, self.layer - 1, tokens)
        )
        with only_layers(self.model, range(self.layer, int(self.model.cfg.n_layers)), stream):
            return run_model(self.model, batch, mask, hooks, **reads)


def first_layer(injection: Injection) -> int:
    """The lowest layer that an injection acts on; 0 where a name does not tell."""
    names = [name for name, _ in injection.hooks()]
    names += [name for part in injection.parts for name in part.changes()]
    layers = [int(found[1]) if (found := _LAYER.search(f".{name}.")) else 0 for name in names]
    return min(layers, default=0)


def reused(
    model: HookedModel, injection: Injection, kept: StartedLater | None = None, *, checkpoint_layers: bool = False
) -> HookedModel | StartedLater:
    """The model; started at the first layer that the injection acts on where that leaves something out.

    Args:
        kept: what an earlier call gave for this model, which is used again where it starts at the same layer.
        checkpoint_layers: see :func:`~lcc_lens.models.hooked.forward.forward`.
    """
    layer = first_layer(injection)
    if kept is not None and (kept.layer, kept.checkpoint_layers) == (layer, checkpoint_layers):
        return kept
    return (
        StartedLater(model, layer, checkpoint_layers=checkpoint_layers)
        if layer > 0 and can_start_at_layers(model)
        else model
    )


@tried_once(on_failure=False)
def _is_product(model: HookedModel) -> bool:
    """Whether a model's logits are what its unembedding makes of its last hidden states; tried once per model."""
    tokens = check_tokens(model)
    whole = forward(model, tokens, [])
    return is_close(_unembed(model, _hidden(model, tokens)), whole, SAME_OPERATIONS, whole.dtype)


@torch.no_grad()
def _hidden(model: HookedModel, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """What enters the unembedding."""
    kept: list[Tensor] = []

    def keep(resid: Tensor, hook: Any) -> None:
        kept.append(resid)

    forward(model, tokens, [(before_unembed(model), keep), *logits_at(model, None)])
    return kept[0]


def _unembed(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.unembed(hidden)
    return logits


logger = logging.getLogger(__name__)
_MEMORY = 2**30
#: What of the free disk may be filled if no number is given.
_DISK_SHARE = 0.5


class KeptStates:
    """Tensors ``[pos, width]`` by token sequence.

    Every sequence is computed on its own, so what is kept does not depend on the batch that it was first met in: a
    training that reuses it gives the same bits whether it is computed, kept or read back, and after an interruption
    too. What lies on disk are temporary files (in ``TMPDIR``) that are mapped into memory and have no name any more:
    nothing is left behind, even if the process is killed.

    Args:
        max_bytes: of memory, on the device of the tensors.
        max_disk_bytes: of disk; half of what is free if not given.
    """

    def __init__(self, *, max_bytes: int = _MEMORY, max_disk_bytes: int | None = None) -> None:
        self.max_bytes, self._max_disk_bytes = max_bytes, max_disk_bytes
        self.n_bytes = self.n_disk_bytes = 0
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def of(
        self,
        batch: Batch,
        device: torch.device,
        compute: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos width"]],
    ) -> Float[Tensor, "batch pos width"]:
        """A batch's tensors, zero where it is padded.

        Args:
            compute: gives the tensor of one sequence's tokens, which lie there.
        """
        rows = zip(batch.tokens, batch.lengths.tolist(), strict=True)
        states = [self._one(tokens[:n], device, compute) for tokens, n in rows]
        return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _one(
        self, tokens: Int[Tensor, " pos"], device: torch.device, compute: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "pos width"]:
        key = tuple(tokens.tolist())
        if key in self._kept:
            return self._kept[key].to(device)
        with torch.inference_mode(mode=False), torch.no_grad():  # what is kept may enter a backward pass
            computed = compute(tokens[None].to(device))[0].detach().clone()
            size = computed.numel() * computed.element_size()
            if self.n_bytes + size <= self.max_bytes:
                self._kept[key], self.n_bytes = computed, self.n_bytes + size
            elif self.n_disk_bytes + size <= self._disk_bytes():
                self._spill(key, computed, size)
        return computed

    def _spill(self, key: tuple[int, ...], computed: Tensor, size: int) -> None:
        try:
            self._kept[key] = _mapped(computed)
            self.n_disk_bytes += size
        except OSError as error:
            logger.warning("nothing more is kept on disk (%s); it is computed again each time", error.strerror)
            self._max_disk_bytes = 0

    def _disk_bytes(self) -> int:
        if self._max_disk_bytes is None:
            self._max_disk_bytes = int(shutil.disk_usage(tempfile.gettempdir()).free * _DISK_SHARE)
        return self._max_disk_bytes


def _mapped(tensor: Tensor) -> Tensor:
    """The tensor's values in a file that is mapped into memory and deleted: the system frees it with the mapping."""
    values = tensor.cpu().contiguous().view(torch.uint8).reshape(-1)
    with tempfile.NamedTemporaryFile(prefix="lcc-lens-") as file:
        file.write(values.numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, size=values.numel(), dtype=torch.uint8)
    return mapped.view(tensor.dtype).reshape(tensor.shape)
