"""Frozen restorations, with a record of the weights, data and settings that they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, require_made, write_tensors
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.heads import Head, HeadTuple, check_heads, head_indices
from lcc_lens.core.outputs.places import refuse_model
from lcc_lens.core.reading import convert, parse_json, reading
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.activations import parts_of
from lcc_lens.models.hooked.hooks import HookedModel, kept_hooks
from lcc_lens.models.hooked.sites import ConstantSite
from lcc_lens.models.hooked.weights import changeable_weights, changed_weights
from lcc_lens.models.loading.hooked import identity_of
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.changes import Change, merged, read_change
from lcc_lens.restoration.injections.constants import ConstantInjection, SiteConstants
from lcc_lens.restoration.injections.footprint import Footprint
from lcc_lens.restoration.record import RestorationRecord, parts_table

if TYPE_CHECKING:
    import pandas as pd

RESTORATION_TENSORS = "restoration.safetensors"
_AGAIN = "restore again"
#: Prefix of the names of tensors of constants at the MLP.
_MLP = "mlp."
#: Separates place, kind, module and parameter in the names of a change's tensors; module names do not contain it.
_SEPARATOR = "|"


@dataclass(frozen=True, repr=False)
class Restoration(Shown):
    """A constant per chosen head with its magnitudes and offset, and changes of weights. Frozen.

    Either may be empty. ``changes`` are pairs of a module's plain name and the function from its old weight to the new
    one, in the order in which they apply. ``mlp`` are constants at the MLPs' post-activation, if any.

    Example:
        >>> with restoration.applied_to(pair.pruned) as restored:  # doctest: +SKIP
        ...     logits = restored(tokens)
    """

    made_by: ClassVar[str] = "restore(pair, scan, heads, data), or Restoration.load(run)"
    record: RestorationRecord
    heads: tuple[Head, ...]
    constants: Float[Tensor, "chosen d_head"]
    magnitudes: Float[Tensor, "chosen component"]
    offset: Float[Tensor, "chosen d_head"]
    changes: tuple[tuple[str, Change], ...] = ()
    mlp: SiteConstants | None = None

    def _facts(self) -> dict[str, Any]:
        n_mlps = 0 if self.mlp is None else len(self.mlp.parts)
        return self.record.facts(self.heads, n_mlps, len(dict(self.changes)))

    def table(self) -> pd.DataFrame:
        """One row per head, MLP or changed weight: part, kind, how many numbers it holds, the norm of a constant."""
        return parts_table(self.constant_sites, self.changes)

    @property
    def constant_sites(self) -> tuple[SiteConstants, ...]:
        """The constants of every site with constants."""
        heads = SiteConstants("z", self.heads, self.constants, self.magnitudes, self.offset)
        return tuple(site for site in (heads, self.mlp) if site is not None and site.parts)

    @property
    def footprint(self) -> Footprint:
        """The biases and weights that it changes."""
        biases = tuple(constants.site for constants in self.constant_sites)
        return Footprint(biases, tuple(dict(self.changes)), self.record.n_trained or 0)

    @classmethod
    def of(cls, injection: Injection, record: RestorationRecord) -> Restoration:
        """Freeze an injection's current parameters.

        Raises:
            RequestError: it does not fold into a checkpoint, or consists of biases.
            LensError: a parameter is not finite.
        """
        if not injection.footprint.folds:
            raise RequestError(
                "expected an injection that folds into the checkpoint, got one that stays beside it; compare it instead"
            )
        changes = [(name, _frozen(change)) for part in injection.parts for name, change in part.changes().items()]
        constants = [part.frozen() for part in injection.parts if isinstance(part, ConstantInjection)]
        by_site: dict[ConstantSite, SiteConstants] = {site.site: site for site in constants}
        if not set(injection.footprint.biases) <= by_site.keys():  # flap trains biases, not constants
            raise RequestError("expected constants or changed weights, got biases of linear layers; compare it instead")
        empty = torch.zeros(0, 0)
        z = by_site.get("z", SiteConstants("z", (), empty, empty, empty))
        restoration = cls(
            record, HeadTuple(z.parts), z.values, z.magnitudes, z.offset, tuple(changes), by_site.get("mlp")
        )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in restoration._tensors().values()):
            raise LensError("expected finite parameters, got NaN or infinity; lower the learning rate")
        return restoration

    @contextmanager
    def applied_to(self, model: HookedModel, *, any_weights: bool = False) -> Iterator[HookedModel]:
        """Apply the restoration to a hooked model inside the block; the model is unchanged after it.

        Args:
            model: the pruned model that was restored.
            any_weights: accept other weights of the same shapes, such as the dense model's in a control.

        Raises:
            RequestError: the model has other weights (by hash, if it was loaded here) or shapes.
        """
        if not any_weights:
            self._check_identity(model)
        hooks = [hook for constants in self.constant_sites for hook in constants.hooks(_n_parts(constants, model))]
        self._check_weights(model)
        changes = merged({name: change} for name, change in self.changes)
        weights = changed_weights(model, changes) if changes else nullcontext()
        with weights, kept_hooks(model, hooks) as restored:
            yield restored

    def _check_identity(self, model: HookedModel) -> None:
        """Refuse weights other than the restored ones, if both hashes are known."""
        identity, sha256 = identity_of(model), self.record.pruned_sha256
        if identity is not None and sha256 and identity.sha256 != sha256:
            raise RequestError(
                f"expected the pruned model with SHA-256 {sha256[:12]}…, got {identity.sha256[:12]}… of "
                f"{identity.reference}; name the model that was restored, or pass any_weights=True"
            )

    def _check_weights(self, model: HookedModel) -> None:
        """Refuse a model whose weights do not fit the changes."""
        weights = changeable_weights(model) if self.changes else {}
        for name, change in self.changes:
            shape = weights[name].shape if name in weights else None
            if shape is None or not change.fits(shape):
                got = "none" if shape is None else f"one of shape {shape}"
                raise RequestError(
                    f"expected a model with the weight {name}, got {got}; name the model that was restored"
                )

    @property
    def content_sha256(self) -> str:
        """A hash of all numbers; what is computed from a restoration is stored with it."""
        return _content_hash(self._tensors())

    def save(self, run: str | Path) -> None:
        """Write ``restoration.safetensors`` into a run directory, atomically, with the record as its metadata.

        Raises:
            RequestError: the folder is a model's.
        """
        refuse_model(Path(run))
        record = json.dumps(asdict(self.record))
        hashes = {"content_sha256": self.content_sha256, "record_sha256": fingerprint(record)}
        write_tensors(Path(run) / RESTORATION_TENSORS, self._tensors(), {"record": record, **hashes})

    @classmethod
    def load(cls, run: str | Path) -> Restoration:
        """Read a restoration that :meth:`save` wrote.

        Raises:
            RequestError: the file is missing, damaged or changed.
        """
        path = require_made(Path(run) / RESTORATION_TENSORS, "lcc-lens restore")
        tensors, metadata = read_tensors(path)
        text = metadata.get("record", "")
        is_changed = metadata.get("record_sha256", fingerprint(text)) != fingerprint(text)  # 0.1.0 wrote no such hash
        if is_changed or metadata.get("content_sha256") != _content_hash(tensors):
            raise RequestError(f"expected {path} as the restoration wrote it, got a changed file; {_AGAIN}")
        record = convert(parse_json(text, str(path), _AGAIN, finite=True), RestorationRecord, str(path), _AGAIN)
        with reading(path, _AGAIN):
            heads = HeadTuple(Head(int(layer), int(head)) for layer, head in tensors.pop("heads"))
            changes = _read_changes({name: tensors.pop(name) for name in list(tensors) if _SEPARATOR in name})
            mlp = _read_mlp({name: tensors.pop(name) for name in list(tensors) if name.startswith(_MLP)})
            return cls(record, heads, **tensors, changes=changes, mlp=mlp)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "heads": torch.tensor(list(zip(*head_indices(self.heads), strict=True)), dtype=torch.long),
            "constants": self.constants,
            "magnitudes": self.magnitudes,
            "offset": self.offset,
        }
        if self.mlp is not None:
            tensors |= {
                f"{_MLP}layers": torch.tensor([part.layer for part in self.mlp.parts]),
                f"{_MLP}values": self.mlp.values,
                f"{_MLP}magnitudes": self.mlp.magnitudes,
                f"{_MLP}offset": self.mlp.offset,
            }
        for place, (name, change) in enumerate(self.changes):
            start = _SEPARATOR.join((f"{place:05d}", change.kind, name))
            tensors |= {f"{start}{_SEPARATOR}{key}": value for key, value in change.state_dict().items()}
        return tensors


def _n_parts(constants: SiteConstants, model: HookedModel) -> int:
    """The parts per layer of a model, after a check that the constants fit it."""
    n_parts, width = parts_of(model, constants.site)
    check_heads(constants.parts, int(model.cfg.n_layers), n_parts)
    if constants.values.shape[-1] != width:
        name = "d_head" if constants.site == "z" else "d_mlp"
        raise RequestError(
            f"expected a model with {name} {constants.values.shape[-1]}, got {width}; name the model that was restored"
        )
    return n_parts


def _read_mlp(tensors: Mapping[str, Tensor]) -> SiteConstants | None:
    """Constants at the MLP from their tensors; raises KeyError or TypeError for another layout."""
    if not tensors:
        return None
    fields = {name.removeprefix(_MLP): tensor for name, tensor in tensors.items()}
    parts = tuple(Head(int(layer), 0) for layer in fields.pop("layers"))
    return SiteConstants("mlp", parts, **fields)


def _frozen(change: Change) -> Change:
    return read_change(change.kind, {key: value.cpu().clone() for key, value in change.state_dict().items()})


def _read_changes(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Change], ...]:
    """Changes from their tensors; raises KeyError or ValueError for another layout."""
    by_change: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for key in sorted(tensors):
        place, kind, name, parameter = key.split(_SEPARATOR)
        by_change.setdefault((place, kind, name), {})[parameter] = tensors[key]
    return tuple((name, read_change(kind, parameters)) for (_, kind, name), parameters in by_change.items())


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
