"""Restorations: what training found, frozen, with the weights it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.config import package_version
from lcc_lens.errors import LensError, RequestError
from lcc_lens.files import read_tensors, write_tensors
from lcc_lens.heads import Head, check_heads, head_indices
from lcc_lens.hooks import HookedModel, kept_hooks, z_adders
from lcc_lens.injections.base import Injection
from lcc_lens.injections.changes import Change, merged, read_change
from lcc_lens.injections.constants import LccInjection, constants_by_layer
from lcc_lens.plain_modules import changed_weights, plain_modules, weight_shape

RESTORATION_TENSORS = "restoration.safetensors"
#: In the names of a change's tensors: its place, kind, module and number; no module name holds this sign.
_SEPARATOR = "|"


@dataclass(frozen=True)
class RestorationRecord:
    """Where a restoration comes from: weights, data, settings, and its losses in nats per response token.

    ``data`` and ``n_examples`` are what its numbers were learned from: the training data, or the scan's where nothing
    was trained. ``n_trained`` counts the trained numbers (None where an earlier version did not say).
    """

    dense: str
    pruned: str
    dense_sha256: str
    pruned_sha256: str
    method: str
    data: str
    n_examples: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    version: str = field(default_factory=package_version)
    n_trained: int | None = None


@dataclass(frozen=True)
class Restoration:
    """A constant per chosen head, with the magnitudes and offset it is made of, and changed weights. Frozen.

    Either may be empty. ``changes`` are pairs of a module's plain name and what makes its new weight of the old one, in
    the order in which they act.

    Example:
        >>> with restoration.applied_to(pair.pruned) as restored:  # doctest: +SKIP
        ...     logits = restored(tokens)
    """

    record: RestorationRecord
    heads: tuple[Head, ...]
    constants: Float[Tensor, "chosen d_head"]
    magnitudes: Float[Tensor, "chosen component"]
    offset: Float[Tensor, "chosen d_head"]
    changes: tuple[tuple[str, Change], ...] = ()

    @classmethod
    def of(cls, injection: Injection, record: RestorationRecord) -> Restoration:
        """Freeze what an injection holds now.

        Raises:
            LensError: a number is not finite.
        """
        constant = next((part for part in injection.parts if isinstance(part, LccInjection)), None)
        changes = [(name, _frozen(change)) for part in injection.parts for name, change in part.changes().items()]
        restoration = cls(record, (), torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0), tuple(changes))
        if constant is not None:
            restoration = replace(
                restoration,
                heads=tuple(constant.heads),
                constants=constant.constants().detach().cpu().clone(),
                magnitudes=(constant.unit * constant.magnitudes).detach().cpu(),
                offset=(constant.unit * constant.offset).detach().cpu(),
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in restoration._tensors().values()):
            raise LensError("wanted finite numbers, got NaN or infinity; lower the learning rate")
        return restoration

    @contextmanager
    def applied_to(self, model: HookedModel) -> Iterator[HookedModel]:
        """Let a hooked model compute restored inside the block; the model leaves it unchanged.

        Raises:
            RequestError: the model has other shapes.
        """
        cfg = model.cfg
        if self.heads:
            check_heads(self.heads, int(cfg.n_layers), int(cfg.n_heads))
        self._check_weights(model)
        if self.heads and self.constants.shape[-1] != int(cfg.d_head):
            raise RequestError(f"wanted a model with d_head {self.constants.shape[-1]}, got {cfg.d_head}; wrong model")
        by_layer = constants_by_layer(self.heads, self.constants, int(cfg.n_heads))
        changes = merged({name: change} for name, change in self.changes)
        weights = changed_weights(model, changes) if changes else nullcontext()
        with weights, kept_hooks(model, z_adders(by_layer)) as restored:
            yield restored

    def _check_weights(self, model: HookedModel) -> None:
        """Refuse a model whose weights the changes do not fit."""
        modules = plain_modules(model) if self.changes else {}
        for name, change in self.changes:
            shape = weight_shape(modules[name]) if name in modules else None
            if shape is None or not change.fits(shape):
                got = "none" if shape is None else f"one of shape {shape}"
                raise RequestError(f"wanted a model with the weight {name} that was restored, got {got}; wrong model")

    def save(self, run: str | Path) -> None:
        """Write ``restoration.safetensors`` into a run directory, atomically; its metadata hold the record."""
        tensors = self._tensors()
        record = {"record": json.dumps(asdict(self.record)), "content_sha256": _content_hash(tensors)}
        write_tensors(Path(run) / RESTORATION_TENSORS, tensors, record)

    @classmethod
    def load(cls, run: str | Path) -> Restoration:
        """Read a restoration, bit for bit as it was saved.

        Raises:
            RequestError: the file is missing, damaged or changed.
        """
        path = Path(run) / RESTORATION_TENSORS
        tensors, metadata = read_tensors(path)
        if metadata.get("content_sha256") != _content_hash(tensors):
            raise RequestError(f"wanted {path} as the restoration wrote it, got a changed file; restore again")
        try:
            heads = tuple(Head(int(layer), int(head)) for layer, head in tensors.pop("heads"))
            changes = _read_changes({name: tensors.pop(name) for name in list(tensors) if _SEPARATOR in name})
            return cls(RestorationRecord(**json.loads(metadata["record"])), heads, **tensors, changes=changes)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"wanted a restoration of this version in {path}, got another layout ({error})"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "heads": torch.tensor(list(zip(*head_indices(self.heads), strict=True)), dtype=torch.long),
            "constants": self.constants,
            "magnitudes": self.magnitudes,
            "offset": self.offset,
        }
        for place, (name, change) in enumerate(self.changes):
            start = _SEPARATOR.join((f"{place:05d}", change.kind, name))
            tensors |= {f"{start}{_SEPARATOR}{key}": value for key, value in change.state_dict().items()}
        return tensors


def _frozen(change: Change) -> Change:
    return read_change(change.kind, {key: value.cpu().clone() for key, value in change.state_dict().items()})


def _read_changes(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Change], ...]:
    """Changes by their tensors' names; KeyError or ValueError where they are of another layout."""
    numbers: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for key in sorted(tensors):
        place, kind, name, number = key.split(_SEPARATOR)
        numbers.setdefault((place, kind, name), {})[number] = tensors[key]
    return tuple((name, read_change(kind, own)) for (_, kind, name), own in numbers.items())


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
