"""Activations of hooked models at chosen sites and positions: head outputs, MLP post-activation, residual stream."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data.batches import Batch, TokenSequence
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, mlp_name, readers, resid_name, z_name
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.sites import has_mlp_site, mlp_width

Site = Literal["z", "mlp", "resid"]
PositionName = Literal["all", "last", "end", "response"]
Positions = PositionName | tuple[int, ...]
SITES: tuple[Site, ...] = get_args(Site)
_NAMES: dict[Site, Callable[[int], str]] = {"z": z_name, "mlp": mlp_name, "resid": resid_name}
_WORDS: dict[Site, str] = {"mlp": "the MLP's post-activation of layer", "resid": "the residual stream of layer"}


def site_widths(model: HookedModel) -> dict[Site, int]:
    """The sites that a model's hooks can read, with their widths; a mixture of experts has no ``mlp``."""
    widths = {site: parts_of(model, site)[1] for site in SITES if _NAMES[site](0) in model.hook_dict}
    if not has_mlp_site(model):
        widths.pop("mlp", None)
    return {site: width for site, width in widths.items() if width}


def parts_of(model: HookedModel, site: Site) -> tuple[int, int]:
    """Parts per layer (heads, or 1) and width of a part (d_head, d_mlp or d_model)."""
    cfg = model.cfg
    if site == "z":
        return int(cfg.n_heads), int(cfg.d_head)
    return 1, mlp_width(model) if site == "mlp" else int(cfg.d_model)


@dataclass(frozen=True)
class TokenPositions:
    """Chosen (sequence, position) pairs of a padded batch."""

    sequence: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]

    def __len__(self) -> int:
        return len(self.sequence)

    @classmethod
    def ends(cls, batch: Batch) -> TokenPositions:
        """The last token of every sequence."""
        return cls(torch.arange(len(batch.lengths)), batch.lengths - 1)

    @classmethod
    def all_tokens(cls, batch: Batch) -> TokenPositions:
        """Every position that is not padding, sequence by sequence."""
        sequence, position = batch.is_valid().nonzero().unbind(1)
        return cls(sequence, position)

    def to(self, device: torch.device) -> TokenPositions:
        """The same positions on another device."""
        return TokenPositions(self.sequence.to(device), self.position.to(device))


def sampled_positions(sequence: TokenSequence, positions: Positions) -> list[int]:
    """The positions of one sequence at which activations are read.

    ``all`` tokens; ``last``, the question's last token (Eq. 7; of plain text the last token); ``end``, the last token
    of the whole sequence; ``response``, the positions that predict the response; or chosen ones, counted from 0 or, if
    negative, from the end; those outside the sequence are skipped.
    """
    n = len(sequence)
    question_end = sequence.loss_from - 1 if sequence.loss_from > 1 else n - 1
    if positions == "all":
        return list(range(n))
    if positions == "last":
        return [question_end]
    if positions == "end":
        return [n - 1]
    if positions == "response":
        return list(range(sequence.loss_from - 1, n - 1))
    chosen = {p if p >= 0 else n + p for p in positions}
    return sorted(p for p in chosen if 0 <= p < n)


SiteVisitor = Callable[[Site, int, Tensor], None]


def visit_sites(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    places: Mapping[Site, TokenPositions],
    visit: SiteVisitor,
    **options: Any,
) -> None:
    """Run forward and call ``visit(site, layer, activation)`` with each layer's activations at chosen positions.

    An activation is ``[sample, part, width]`` in the order of ``places``, in the model's number format. No logits are
    computed.

    Args:
        options: passed to the model: ``past_key_values``, ``attention_mask``, ``position_ids``.

    Raises:
        LensError: an activation is NaN or infinite (names layer and head).
    """
    device = device_of(model)
    hooks: list[NamedHook] = []
    for site, positions in places.items():
        here = positions.to(device)

        def read(layer: int, activation: Tensor, site: Site = site, here: TokenPositions = here) -> None:
            at = here.to(activation.device)  # a model may be spread over several devices
            chosen = activation[at.sequence, at.position]
            chosen = chosen if site == "z" else chosen[:, None]
            if not bool(torch.isfinite(chosen.sum(dtype=torch.float32))):
                refuse_non_finite(chosen, site, layer)
            visit(site, layer, chosen)

        hooks += readers(_NAMES[site], range(int(model.cfg.n_layers)), read)
    with torch.inference_mode():
        run_without_logits(model, tokens.to(device), hooks, **options)


def refuse_non_finite(activation: Tensor, site: Site, layer: int) -> None:
    """Refuse ``[sample, part, width]`` activations that are NaN or infinite."""
    bad = (~torch.isfinite(activation)).any(-1).any(0).nonzero()
    if len(bad):
        where = f"head L{layer}H{int(bad[0])}" if site == "z" else f"{_WORDS[site]} {layer}"
        raise LensError(f"expected finite activations, got NaN or infinity in {where}; check the weights")


def check_positions(positions: Any) -> Positions:
    """The positions as a word or a tuple of integers, whatever holds these.

    Raises:
        RequestError: another word, no positions, or something else than whole numbers.
    """
    names = get_args(PositionName)
    if isinstance(positions, str) and positions in names:
        return cast("PositionName", positions)
    try:
        chosen = [] if isinstance(positions, str) else list(positions)
        if not chosen or any(isinstance(position, bool) for position in chosen):
            raise TypeError
        return tuple(map(operator.index, chosen))
    except TypeError as error:
        raise RequestError(
            f"expected positions {', '.join(names)} or whole numbers, got {positions!r:.60}; name some"
        ) from error


def check_sites(sites: Iterable[str]) -> None:
    """Refuse unknown sites."""
    for site in sites:
        if site not in SITES:
            raise RequestError(f"expected sites among {', '.join(SITES)}, got {site!r}; correct the name")
