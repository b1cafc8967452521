"""Check that attention and MLPs can be run alone with other weights: tried once per model, on a few tokens."""

from __future__ import annotations

from torch import Tensor

from lcc_lens.analysis.causes.attention_weights import head_rows
from lcc_lens.analysis.causes.swapped import Call, Part, PlainModule, watched_modules
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.self_checks import OTHER_KERNELS, check_tokens, is_close, tried_once
from lcc_lens.models.hooked.sites import has_mlp_site


@tried_once(on_failure="a computation of its own, which takes no other weights")
def attention_refusal(model: HookedModel) -> str | None:
    """Why a model's attention cannot be given other weights; None if it can. Tried once per model.

    Every layer's module must compute the model's head outputs, and twice those if values have twice the weights.
    """
    if is_hooked_transformer(model):
        return "HookedTransformer's copies of them; use LCC_LENS_HOOKS=bridge"
    n_heads, d_head = int(model.cfg.n_heads), int(model.cfg.d_head)
    verdicts: list[bool] = []

    def compute(part: Part, layer: int, call: Call, z: Tensor) -> None:
        if part == "attn":
            plain = PlainModule.of(model, layer, part)
            doubled = {}
            for name, parameter in plain.parameters.items():
                value, axis = parameter.value, parameter.row_axis
                rows = head_rows(name, value.shape[axis], n_heads, d_head)[2].flatten().to(value.device)
                if len(rows):
                    doubled[name] = value.index_copy(axis, rows, 2 * value.index_select(axis, rows))
            once, twice = (plain.before_output(call, call.hidden, weights) for weights in ({}, doubled))
            verdicts.append(all(_is_same(found, factor * z, model) for factor, found in ((1, once), (2, twice))))

    with watched_modules(model, compute):
        run_without_logits(model, check_tokens(model), [])
    is_swappable = len(verdicts) == int(model.cfg.n_layers) and all(verdicts)
    return None if is_swappable else "one whose queries, keys and values are not told apart"


@tried_once(on_failure=False)
def can_swap_mlp(model: HookedModel) -> bool:
    """Whether every layer's MLP is one module whose post-activation it computes; tried once per model."""
    verdicts: list[bool] = []

    def compute(part: Part, layer: int, call: Call, post: Tensor) -> None:
        if part == "mlp":
            found = PlainModule.of(model, layer, part).before_output(call, call.hidden)
            verdicts.append(_is_same(found, post, model))

    if not has_mlp_site(model):
        return False
    with watched_modules(model, compute):
        run_without_logits(model, check_tokens(model), [])
    return len(verdicts) == int(model.cfg.n_layers) and all(verdicts)


def _is_same(found: Tensor, expected: Tensor, model: HookedModel) -> bool:
    return is_close(found.reshape(expected.shape), expected, OTHER_KERNELS, model.cfg.dtype)
