"""Restorations: what training found, frozen, with the weights it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from lcc_lens.injection import LccInjection, constants_by_layer

RESTORATION_TENSORS = "restoration.safetensors"


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
    """A constant per chosen head, with the magnitudes and offset it is made of. Frozen.

    Example:
        >>> with restoration.applied_to(pair.pruned) as restored:  # doctest: +SKIP
        ...     logits = restored(tokens)
    """

    record: RestorationRecord
    heads: tuple[Head, ...]
    constants: Float[Tensor, "chosen d_head"]
    magnitudes: Float[Tensor, "chosen component"]
    offset: Float[Tensor, "chosen d_head"]

    @classmethod
    def of(cls, injection: LccInjection, record: RestorationRecord) -> Restoration:
        """Freeze what an injection holds now.

        Raises:
            LensError: a number is not finite.
        """
        constants = injection.constants().detach().cpu().clone()
        if not bool(torch.isfinite(constants).all()):
            raise LensError("wanted finite magnitudes, got NaN or infinity; lower the learning rate")
        return cls(
            record=record,
            heads=tuple(injection.heads),
            constants=constants,
            magnitudes=(injection.unit * injection.magnitudes).detach().cpu(),
            offset=(injection.unit * injection.offset).detach().cpu(),
        )

    @contextmanager
    def applied_to(self, model: HookedModel) -> Iterator[HookedModel]:
        """Add the constants to a hooked model's head outputs inside the block; the model leaves it unchanged.

        Raises:
            RequestError: the model has other shapes.
        """
        cfg = model.cfg
        check_heads(self.heads, int(cfg.n_layers), int(cfg.n_heads))
        if self.constants.shape[-1] != int(cfg.d_head):
            raise RequestError(f"wanted a model with d_head {self.constants.shape[-1]}, got {cfg.d_head}; wrong model")
        by_layer = constants_by_layer(self.heads, self.constants, int(cfg.n_heads))
        with kept_hooks(model, z_adders(by_layer)) as restored:
            yield restored

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
            return cls(RestorationRecord(**json.loads(metadata["record"])), heads, **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"wanted a restoration of this version in {path}, got another layout ({error})"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "heads": torch.tensor(list(zip(*head_indices(self.heads), strict=True))),
            "constants": self.constants,
            "magnitudes": self.magnitudes,
            "offset": self.offset,
        }


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
