"""Lost components and trained constants as steering vectors that other tools add: safetensors and a description."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lcc_lens.analysis.scan.result import Scan
from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json, write_tensors
from lcc_lens.core.heads import Head, all_heads, check_heads, head_indices
from lcc_lens.core.outputs.folders import claim_files
from lcc_lens.core.ranges import ranged
from lcc_lens.exporters.folding import fold
from lcc_lens.models.hooked.activations import parts_of
from lcc_lens.models.hooked.hooks import HookedModel, mlp_name, z_name
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.hooked.weights import named_weight
from lcc_lens.models.loading.hooked import identity_of
from lcc_lens.restoration.injections.constants import SiteConstants, constants_by_layer
from lcc_lens.restoration.result import Restoration

VECTORS, DESCRIPTION = "components.safetensors", "components.json"
#: steering-vectors' names of the sites.
_LAYER_TYPES = {"z": "self_attn", "mlp": "mlp"}


@ranged
def save_components(
    source: Scan | Restoration,
    folder: str | Path,
    model: HookedModel,
    *,
    heads: Sequence[Head] | None = None,
    rank: int | None = None,
) -> Path:
    r"""Write lost components, or a restoration's constants, as steering vectors for other tools.

    Each vector is added to the pruned model's activation at every position. A tensor is named after the place: a hook
    point of TransformerLens (``blocks.3.attn.hook_z``, ``[head, d_head]``; ``blocks.3.mlp.hook_post``, ``[d_mlp]``) or
    a module of transformers' (``model.layers.3.self_attn.o_proj``, ``[d_model]``: what the projection makes of the
    constants, for the package steering-vectors). Add one kind or the other. ``components.json`` says which is which,
    and where the vectors come from.

    Args:
        source: a scan: the lost component $\sum_{i \le K} \alpha_i v_i$ of each head; or a restoration of constants:
            what it trained.
        folder: for ``components.safetensors`` and ``components.json``, which are replaced.
        model: the hooked pruned model, ``pair.pruned``.
        heads: of a scan, which heads; all if not given.
        rank: of a scan, K; all directions, which is the mean difference, if not given.

    Returns:
        The file with the vectors.

    Raises:
        RequestError: a restoration that changes weights, or another model's; heads or rank of a restoration.

    Example:
        >>> save_components(restoration, "out/components", pair.pruned)  # doctest: +SKIP
    """
    record, identity = source.record, identity_of(model)
    if identity is not None and record.pruned_sha256 and identity.sha256 != record.pruned_sha256:
        raise RequestError(
            f"expected the pruned model with SHA-256 {record.pruned_sha256[:12]}…, got {identity.reference}; name the "
            "one that was scanned or restored"
        )
    sites = (_lost(source, heads, rank),) if isinstance(source, Scan) else _trained(source, heads, rank)
    tensors: dict[str, Tensor] = {}
    hooks = [described for site in sites for described in _at_hooks(site, model, tensors)]
    modules = [described for site in sites for described in _at_modules(site, model, tensors)]
    folder = Path(folder)
    claim_files(folder, [VECTORS, DESCRIPTION])
    write_tensors(folder / VECTORS, tensors, {"format": "pt"})
    write_json(folder / DESCRIPTION, _described(source, rank, hooks, modules))
    return folder / VECTORS


def _lost(scan: Scan, heads: Sequence[Head] | None, rank: int | None) -> SiteConstants:
    """The lost components of a scan's heads as constants."""
    component = scan.components.component(rank)
    shape = component.shape[0], component.shape[1]
    chosen = all_heads(*shape) if heads is None else check_heads(heads, *shape)
    values = component[head_indices(chosen)]
    return SiteConstants("z", tuple(chosen), values, values.new_zeros(len(values), 0), values)


def _trained(restoration: Restoration, heads: Sequence[Head] | None, rank: int | None) -> tuple[SiteConstants, ...]:
    if heads is not None or rank is not None:
        raise RequestError("expected heads and rank of a scan alone, got them with a restoration; leave them out")
    if restoration.changes or not restoration.constant_sites:
        raise RequestError(
            f"expected a restoration of constants alone, got {restoration.record.method}, which changes weights; "
            "export it instead"
        )
    return restoration.constant_sites


def _at_hooks(site: SiteConstants, model: HookedModel, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Put a site's vectors among the tensors, by TransformerLens' hook points; gives their descriptions."""
    n_parts, _ = parts_of(model, site.site)
    described = []
    for layer, values in constants_by_layer(site.parts, site.values, n_parts).items():
        name = z_name(layer) if site.site == "z" else mlp_name(layer)
        tensors[name] = (values if site.site == "z" else values[0]).float().contiguous()
        parts = {"heads": [part.head for part in site.parts if part.layer == layer]} if site.site == "z" else {}
        described.append({"name": name, "layer": layer, "shape": list(tensors[name].shape), **parts})
    return described


def _at_modules(site: SiteConstants, model: HookedModel, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The same by transformers' modules: what the projection that reads the site makes of the constants."""
    names = projection_names(model, site.site)
    layers = sorted({part.layer for part in site.parts})
    folded = fold(site.values, site.parts, {layer: named_weight(model, names[layer]).cpu() for layer in layers})
    tensors |= {names[layer]: vector.float() for layer, vector in folded.items()}
    template = names[0].replace(".0.", ".{num}.", 1)
    kind = _LAYER_TYPES[site.site]
    return [{"name": names[layer], "layer": layer, "layer_type": kind, "template": template} for layer in layers]


def _described(
    source: Scan | Restoration, rank: int | None, hooks: list[dict[str, Any]], modules: list[dict[str, Any]]
) -> dict[str, Any]:
    record = source.record
    what = "lost components" if isinstance(source, Scan) else f"constants restored by {source.record.method}"
    origin = {name: getattr(record, name) for name in ("dense", "pruned", "dense_sha256", "pruned_sha256")}
    return {
        "format": "lcc_lens components 1", "made_by": f"lcc_lens {package_version()}", "what": what, "rank": rank,
        "learned_from": record.data, "n_examples": record.n_examples, **origin,
        "use": "add each vector to the pruned model's activation of its name, at every position: hooks or modules",
        "hooks": hooks, "modules": modules,
    }  # fmt: skip
