"""How much a head's output votes for the tokens that it attends to: the copying score of its OV circuit."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.causes.attention_weights import head_rows
from lcc_lens.analysis.causes.swapped import PlainModule
from lcc_lens.core.errors import LensError
from lcc_lens.models.hooked.direct_path import Norm, Unembedding
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of


def copying_scores(model: HookedModel) -> Float[Tensor, "layer head"]:
    r"""$\sum_i \lambda_i / \sum_i |\lambda_i|$ over the eigenvalues of $W_U W_O W_V W_E$, token to logits.

    1 where attending to a token always raises its own logit, -1 where it lowers it. Gains and centring of the norm
    before attention and of the final norm are included, their scales are not. NaN where the weights cannot be told
    apart.

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "copying".
    """
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    try:
        unembedding, embedding = Unembedding.of(model), _embedding(model)
        to_logits = _product(embedding, unembedding.weight.detach())
        rows = [_layer_scores(model, layer, to_logits, unembedding.norm) for layer in range(n_layers)]
    except (AttributeError, KeyError, LensError, RuntimeError, StopIteration):
        return torch.full((n_layers, n_heads), torch.nan)
    return torch.stack(rows).cpu()


def _embedding(model: HookedModel) -> Float[Tensor, "d_vocab d_model"]:
    return cast("Tensor", cast("Any", model).embed.original_component.weight).detach()


def _product(embedding: Tensor, unembedding: Tensor, block: int = 16_384) -> Float[Tensor, "d_model d_model"]:
    """$W_E^T W_U$, summed over blocks of the vocabulary."""
    n = min(len(embedding), len(unembedding))
    parts = zip(embedding[:n].split(block), unembedding[:n].split(block), strict=True)
    total: Tensor = sum((e.float().T @ u.float() for e, u in parts), torch.zeros(()).to(embedding.device))
    return total


def _layer_scores(model: HookedModel, layer: int, to_logits: Tensor, last: Norm) -> Float[Tensor, " head"]:
    n_heads, d_head, d_model = (int(getattr(model.cfg, name)) for name in ("n_heads", "d_head", "d_model"))
    plain, block = PlainModule.of(model, layer, "attn"), cast("Any", model).blocks[layer]
    first, after = (_norm(block._modules.get(name), d_model, device_of(model)) for name in ("ln1", "ln1_post"))
    read = to_logits if first is None else first.linear(to_logits.T).T
    values = _value_weights(plain, n_heads, d_head)
    values = values.repeat_interleave(n_heads // len(values), dim=0)
    written = plain.output_values()["weight"].float().T.unflatten(0, (n_heads, d_head))
    written = written if after is None else after.linear(written)
    circuit = values @ read @ last.linear(written).transpose(-1, -2)
    eigenvalues = torch.linalg.eigvals(circuit)
    scores: Tensor = eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
    return scores


def _value_weights(plain: PlainModule, n_heads: int, d_head: int) -> Float[Tensor, "group d_head d_model"]:
    """The weights that compute values, by key-value head."""
    for name, parameter in plain.parameters.items():
        rows = head_rows(name, parameter.value.shape[parameter.row_axis], n_heads, d_head)[2]
        if name.endswith("weight") and len(rows):
            weight = parameter.value.movedim(parameter.row_axis, 0)
            return weight[rows.flatten()].float().reshape(len(rows), d_head, -1)
    raise KeyError("value projection")


def _norm(bridge: Any, d_model: int, device: torch.device) -> Norm | None:
    return None if bridge is None else Norm.of(bridge.original_component, d_model, device)
