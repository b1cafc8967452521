"""A dense and a pruned model under hooks, checked to have the same shapes, tokenizer and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.config import DeviceMap, HookKind
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import HEAD_MAP, HeadMap, read_head_map
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.showing import Shown
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.zeros import refuse_swapped
from lcc_lens.models.hooked.activations import Site, site_widths
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.loading.hooked import LoadedModel, ModelIdentity, as_reference, load_hooked
from lcc_lens.models.loading.provenance import check_provenance
from lcc_lens.models.loading.references import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHAPES = ("n_layers", "d_head", "d_model", "d_vocab")


@dataclass(frozen=True, repr=False)
class BothModels(Shown):
    """Both models in memory."""

    dense: HookedModel
    pruned: HookedModel


class OneAtATime:
    """Holds the model that was requested last; loading it frees the other one."""

    def __init__(self, load: dict[str, Callable[[], HookedModel]], loaded: tuple[str, HookedModel]) -> None:
        self._load = load
        self._loaded: tuple[str, HookedModel] | None = loaded

    @property
    def dense(self) -> HookedModel:
        return self._get("dense")

    @property
    def pruned(self) -> HookedModel:
        return self._get("pruned")

    @property
    def in_memory(self) -> HookedModel:
        """The model that is loaded, whichever it is."""
        return self.pruned if self._loaded is None else self._loaded[1]

    def _get(self, name: str) -> HookedModel:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # free it first: both do not fit
            release_memory()
            self._loaded = (name, self._load[name]())
        return self._loaded[1]


@dataclass(frozen=True, repr=False)
class Pair(Shown):
    """A dense and a pruned model with the same tokenizer and shapes, both hooked.

    If whole heads were sliced off, the pruned model has fewer; ``head_map`` maps them to the dense model's. A pair that
    is ``one_at_a_time`` has one model in memory: reading the other one's attribute loads it instead.

    Example:
        >>> pair = load_pair("smollm2", "out/wanda50")  # doctest: +SKIP
        >>> pair.dense.cfg.n_layers, pair.dense.cfg.n_heads  # doctest: +SKIP
        (30, 9)
    """

    made_by: ClassVar[str] = "load_pair(dense, pruned)"
    models: BothModels | OneAtATime
    tokenizer: PreTrainedTokenizerBase
    dense_id: ModelIdentity
    pruned_id: ModelIdentity
    head_map: HeadMap
    n_layers: int
    n_heads: int
    """Query heads per layer of the pruned model."""
    d_head: int
    sites: tuple[Site, ...]
    """Sites that can be compared: both models have them, equally wide."""
    context: int
    """Tokens of a sequence at most."""
    dtype: torch.dtype
    """Number format that both compute in."""
    output_projections: tuple[str, ...]
    """The pruned model's output projections by layer, as its checkpoint names them."""

    def _facts(self) -> dict[str, Any]:
        heads = f"{self.n_heads} of width {self.d_head} in each of {self.n_layers} layers"
        return {
            "dense": _named(self.dense_id),
            "pruned": _named(self.pruned_id),
            "heads": f"{heads}, {sum(map(len, self.head_map.removed))} removed whole",
            "context": f"{self.context} tokens",
            "dtype": str(self.dtype).removeprefix("torch."),
            "compared at": self.sites,
            "in memory": "one model at a time" if self.one_at_a_time else "both models",
        }

    @property
    def dense(self) -> HookedModel:
        """The dense model."""
        return self.models.dense

    @property
    def pruned(self) -> HookedModel:
        """The pruned model."""
        return self.models.pruned

    @property
    def device(self) -> torch.device:
        """Where both models compute; loads none of them."""
        loaded = self.models.in_memory if isinstance(self.models, OneAtATime) else self.models.dense
        return device_of(loaded)

    @property
    def one_at_a_time(self) -> bool:
        """Whether only one of the models is in memory."""
        return isinstance(self.models, OneAtATime)

    def require_unchanged(self) -> None:
        """Refuse a result whose models were replaced on disk while it was computed; see :class:`Checkpoint`."""
        for identity in (self.dense_id, self.pruned_id):
            identity.checkpoint.require_unchanged(identity.sha256)

    def kept_heads(
        self, layer: int, z: Float[Tensor, "*sample dense_head d_head"]
    ) -> Float[Tensor, "*sample head d_head"]:
        """A layer's dense head outputs in the order of the pruned model's heads."""
        heads = self.head_map.dense_heads[layer]
        return z if heads == tuple(range(z.shape[-2])) else z[..., list(heads), :]


def _named(identity: ModelIdentity) -> str:
    return f"{identity.reference} (SHA-256 {identity.sha256[:12]}…)"


def load_pair(
    dense: str | Path | torch.nn.Module,
    pruned: str | Path | torch.nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    one_at_a_time: bool = False,
    device_map: DeviceMap | None = None,
    hooks: HookKind | None = None,
) -> Pair:
    """Load a dense and a pruned model, hooked and checked against each other.

    Args:
        dense: reference of the dense model (see :func:`resolve`), or a model of transformers or a HookedTransformer in
            memory (see :func:`load_hooked`).
        pruned: the pruned model, likewise; ``tokenizer``: of models in memory.
        device: where to compute.
        dtype: compute format of both models.
        one_at_a_time: hold one model in memory at a time; a scan then runs the dense model over all data first.
        device_map: for models larger than memory, see :func:`lcc_lens.models.hooked.offloading.placement`.
        hooks: see :func:`lcc_lens.core.config.hook_kind`.

    Raises:
        RequestError: the tokenizers or shapes differ, or the dense model is the one with the zeros.
    """
    dense, pruned = (m if is_hooked_transformer(m) else as_reference(m, tokenizer) for m in (dense, pruned))
    _check_references(dense, pruned)

    def load(reference: str | Path | torch.nn.Module) -> LoadedModel:
        return load_hooked(reference, device=device, dtype=dtype, device_map=device_map, hooks=hooks)

    loaded = load(dense)
    dense_description, dense_model = _Description.of(loaded), None if one_at_a_time else loaded.model
    del loaded
    release_memory()
    second = load(pruned)
    pruned_description, cfg = _Description.of(second), second.model.cfg
    check_pair(dense_description, pruned_description)
    models: BothModels | OneAtATime
    if dense_model is None:
        load_by_name = {"dense": lambda: load(dense).model, "pruned": lambda: load(pruned).model}
        models = OneAtATime(load_by_name, ("pruned", second.model))
    else:
        models = BothModels(dense_model, second.model)
    return Pair(
        models=models,
        tokenizer=second.tokenizer,
        dense_id=dense_description.identity,
        pruned_id=second.identity,
        head_map=match_heads(dense_description.n_heads, second),
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        d_head=int(cfg.d_head),
        sites=dense_description.shared_sites(pruned_description),
        context=min(dense_description.context, second.context),
        dtype=cfg.dtype,
        output_projections=second.output_projections,
    )


def _check_references(dense: object, pruned: object) -> None:
    """Refuse a wrong second path, and models in the wrong order, before the first model is loaded."""
    if isinstance(dense, str | Path) and isinstance(pruned, str | Path):
        check_models(dense, pruned)
    elif isinstance(pruned, str | Path):
        resolve(pruned)


def check_models(dense: str | Path, pruned: str | Path, max_length: int | None = None) -> None:
    """Refuse what the files alone tell, before any model or data are loaded.

    Raises:
        RequestError: a reference of no model, the dense model in the place of the pruned one, or sequences longer than
            a model's context.
    """
    paths = resolve(dense), resolve(pruned)
    refuse_swapped(*paths)
    for path in paths if max_length is not None else ():
        fitting_length(max_length, context_of(read_config(path)))


@dataclass(frozen=True)
class _Description:
    """The properties of a model that are compared with the other one's."""

    identity: ModelIdentity
    shapes: dict[str, int]
    widths: dict[Site, int]
    n_heads: int
    vocabulary: dict[str, int]
    context: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Description:
        cfg = loaded.model.cfg
        shapes = {name: int(getattr(cfg, name)) for name in _SHAPES}
        return cls(
            loaded.identity,
            shapes,
            site_widths(loaded.model),
            int(cfg.n_heads),
            loaded.tokenizer.get_vocab(),
            loaded.context,
        )

    def shared_sites(self, other: _Description) -> tuple[Site, ...]:
        """The sites that both models have, equally wide."""
        return tuple(site for site, width in self.widths.items() if other.widths.get(site) == width)


def check_pair(dense: _Description, pruned: _Description) -> None:
    """Refuse models that are not a dense and a pruned version of the same one."""
    for name, size in dense.shapes.items():
        if size != pruned.shapes[name]:
            raise RequestError(
                f"expected two models of the same shape, got {name} {size} in {dense.identity.reference} and "
                f"{pruned.shapes[name]} in {pruned.identity.reference}; name the model that this one was pruned from"
            )
    if dense.vocabulary != pruned.vocabulary:
        raise RequestError(
            f"expected two models with the same tokenizer, got different vocabularies in {dense.identity.reference} "
            f"and {pruned.identity.reference}; name the model that this one was pruned from"
        )
    check_provenance(dense.identity.checkpoint, pruned.identity.checkpoint)


def match_heads(n_dense: int, pruned: LoadedModel) -> HeadMap:
    """The dense model's head for every pruned head, from the head map beside the weights; without one, the same head.

    Heads that pruning removed without slicing are found in the weights.
    """
    n_layers, n_heads = int(pruned.model.cfg.n_layers), int(pruned.model.cfg.n_heads)
    stored = read_head_map(pruned.identity.path)
    if stored is None:
        if n_heads != n_dense:
            raise RequestError(
                f"expected {HEAD_MAP} beside {pruned.identity.reference}, which has {n_heads} heads of "
                f"{n_dense}, got none; write the file (the dense head of each one), or prune with lcc-lens"
            )
        return HeadMap.identity(n_layers, n_heads, pruned.removed_heads)
    if not stored.fits(n_layers, n_heads) or max(map(max, stored.dense_heads)) >= n_dense:
        raise RequestError(
            f"expected a head map of {n_layers} layers with {n_heads} of {n_dense} heads beside "
            f"{pruned.identity.reference}, got another; name the model that this one was pruned from"
        )
    return HeadMap(stored.dense_heads, pruned.removed_heads)
