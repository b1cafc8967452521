"""The way from a head into the residual stream: the output projection and what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.copied_maps import HeldWeight, copied_maps, copied_weights
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.hooked_transformer import is_hooked_transformer
from lcc_lens.hooks import HookedModel, resid_name, z_adders, z_name
from lcc_lens.models import device_of
from lcc_lens.norm import Norm
from lcc_lens.offloading import require_in_memory
from lcc_lens.pruning.layers import is_transposed
from lcc_lens.wiring import is_close, probe_tokens, run_keeping, unknown_way


@dataclass(frozen=True)
class HeadWriter:
    r"""How a model's heads write into its residual stream: $z \mapsto m\,g \odot C(z W_O[h]) / s$.

    In most architectures this is $z W_O[h]$. Granite multiplies by a constant $m$; Gemma 2 and OLMo 2 normalise the
    attention output before adding it, whose scale $s$ belongs to all heads of a layer together: :meth:`output` leaves
    it at one (the final norm takes out most of it anyway) and :meth:`scale` reads it off.
    """

    projections: tuple[HeldWeight, ...]
    norms: tuple[Norm, ...] | None
    multiplier: float
    n_heads: int
    output_point: str = "attn.o.hook_out"

    @classmethod
    def of(cls, model: HookedModel) -> HeadWriter:
        """Take the output projections and what follows them from a hooked model, and check them.

        Raises:
            LensError: a change of a head's output reaches the residual stream in another way.
        """
        bridge, d_model, device = cast("Any", model), int(model.cfg.d_model), device_of(model)
        if is_hooked_transformer(model):
            held = copied_weights(model)
            copies = tuple(held[name] for name in copied_maps(model, "z"))
            copied = cls(copies, None, 1.0, int(model.cfg.n_heads), "hook_attn_out")
            copied._check(model)
            return copied
        try:
            modules = tuple(block.attn.o.original_component for block in bridge.blocks)
            projections = tuple(HeldWeight(module, "weight", is_transposed(module)) for module in modules)
            # getattr() of a bridge falls through to transformers' module, which may call another norm by this name
            posts = [block._modules.get("ln1_post") for block in bridge.blocks]
        except AttributeError as error:
            raise unknown_way("into the residual stream", str(error)) from error
        if any(posts):
            require_in_memory(bridge.original_model, "norms after attention")
        norms = tuple(Norm.of(post.original_component, d_model, device) for post in posts if post is not None)
        config = bridge.original_model.config.get_text_config()
        multiplier = float(getattr(config, "residual_multiplier", 1.0))
        writer = cls(projections, norms or None, multiplier, int(model.cfg.n_heads))
        writer._check(model)
        return writer

    def W_O(self, head: Head) -> Float[Tensor, "d_head d_model"]:
        """One head's rows of the output projection, as the weights hold them."""
        (head,) = check_heads([head], len(self.projections), self.n_heads)
        held = self.projections[head.layer]
        rows = held.matrix(held.value.detach()).T
        return rows.reshape(self.n_heads, -1, rows.shape[1])[head.head]

    def output(self, head: Head, z: Float[Tensor, "*sample d_head"]) -> Float[Tensor, "*sample d_model"]:
        """What a head's outputs add to the residual stream (up to the layer's scale where there is a norm)."""
        W_O = self.W_O(head).float()
        out = self.multiplier * (z.to(W_O) @ W_O)
        return out if self.norms is None else self.norms[head.layer].linear(out)

    def hook_name(self, layer: int) -> str:
        """The hook point of a layer's attention output before any norm."""
        return f"blocks.{layer}.{self.output_point}"

    def scale(self, layer: int, attn_out: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample 1"]:
        """The scale by which a layer's attention output is divided; one where no norm follows it."""
        return torch.ones_like(attn_out[..., :1]) if self.norms is None else self.norms[layer].scale(attn_out)

    def _check(self, model: HookedModel) -> None:
        """Move the head outputs of the first layer that writes anything, and follow the change."""
        writes = [bool(held.value.any()) for held in self.projections]
        if not any(writes):
            return
        layer = writes.index(True)
        # Where attention and feed-forward network read the same stream, there is no stream between them
        mid, post = f"blocks.{layer}.hook_resid_mid", resid_name(layer)
        stream = mid if mid in model.hook_dict else post
        tokens, names = probe_tokens(model), [z_name(layer), self.hook_name(layer), stream]
        _, before = run_keeping(model, tokens, names)
        size = float(before[z_name(layer)].abs().max().clamp_min(1e-3))
        shape = (self.n_heads, before[z_name(layer)].shape[-1])
        step = 4 * size * torch.linspace(-1, 1, shape[0] * shape[1], device=tokens.device).reshape(shape)
        _, after = run_keeping(model, tokens, names, z_adders({layer: step}))
        out_before, out_after = (seen[self.hook_name(layer)].float() for seen in (before, after))
        rows = torch.stack([step[head] @ self.W_O(Head(layer, head)).float() for head in range(self.n_heads)])
        if not is_close(out_after - out_before, rows.sum(0).expand_as(out_after), model):
            raise unknown_way("into the residual stream", f"another change than z W_O after layer {layer}'s heads")
        if self.norms is not None:
            out_before, out_after = self.norms[layer](out_before), self.norms[layer](out_after)
        moved = (after[stream] - before[stream]).float()
        if not is_close(moved, self.multiplier * (out_after - out_before), model):
            raise unknown_way(
                "into the residual stream", f"another change than the attention output's in layer {layer}"
            )


def head_output(model: HookedModel, head: Head, z: Float[Tensor, "*sample d_head"]) -> Float[Tensor, "*sample d_model"]:
    r"""What a head's outputs write into the residual stream, $z W_O[h]$ (see :class:`HeadWriter`), in float32.

    Raises:
        RequestError: the head is not in the model.
        LensError: the architecture is not known.
    """
    return HeadWriter.of(model).output(head, z)
