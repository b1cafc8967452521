"""The way from a residual stream to logits: the final norm, the unembedding and what follows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lcc_lens.core.heads import Head, check_heads
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.copied_weights import WeightLocation, copied_projection_names, copied_weights
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer, logit_transform, plain_norm
from lcc_lens.models.hooked.hooks import HookedModel, resid_name, z_adders, z_name
from lcc_lens.models.hooked.offloading import device_of, require_in_memory
from lcc_lens.models.hooked.self_checks import (
    OTHER_OPERATIONS,
    check_tokens,
    is_close,
    run_with_activations,
    unsupported,
)

#: Rows of the vocabulary that are multiplied at once: a large one in float32 need not fit beside the model.
_VOCABULARY_BLOCK = 16_384
_Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Unembedding:
    r"""A model's own way from a residual vector to logits: $f(a \cdot (W_U\,\mathrm{norm}(x) + b_U))$.

    $a$ is the architecture's logit multiplier and $f$ its soft cap, if any; TransformerLens' adapter has both as one
    function of the logits (``transform``), whose slope at zero is $a$ (``multiplier``). All in float32.

    Example:
        >>> readout = Unembedding.of(pair.pruned)  # doctest: +SKIP
        >>> readout.logits(resid).argmax(-1)  # doctest: +SKIP
    """

    norm: Norm
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]
    transform: Callable[[Tensor], Tensor]
    multiplier: float

    @classmethod
    def of(cls, model: HookedModel) -> Unembedding:
        """Take the final norm, the unembedding and what follows it from a hooked model, and check them.

        Raises:
            LensError: the logits computed from the last residual stream are not the model's own.
        """
        bridge, d_model = cast("Any", model), int(model.cfg.d_model)
        if is_hooked_transformer(model):
            norm, transform = plain_norm(bridge.ln_final, bridge.cfg.eps), logit_transform(model)
            weight, bias = bridge.unembed.W_U.detach().T, bridge.unembed.b_U
            return cls._checked(model, norm, weight, bias, transform)
        try:
            norm, unembed = bridge.ln_final.original_component, bridge.unembed.original_component
            transform = bridge.adapter.apply_output_logits_transform
            if tuple(unembed.weight.shape[1:]) != (d_model,):
                raise unsupported("to the logits", f"an unembedding of shape {tuple(unembed.weight.shape)}")
        except AttributeError as error:
            raise unsupported("to the logits", str(error)) from error
        return cls._checked(model, norm, unembed.weight.detach(), getattr(unembed, "bias", None), transform)

    @classmethod
    def _checked(
        cls, model: HookedModel, norm: nn.Module, weight: Tensor, bias: Tensor | None, transform: _Transform
    ) -> Unembedding:
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        small = torch.tensor(1e-4, dtype=torch.float64)  # a soft cap is a straight line there
        norm_parts = Norm.of(norm, int(model.cfg.d_model), device_of(model))
        readout = cls(norm_parts, weight, bias.float(), transform, float(transform(small) / small))
        readout._check(model)
        return readout

    def logits(self, resid: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        """All logits of residual vectors, each normalised by itself (Eq. 6)."""
        normed = self.norm(resid)
        blocks = [normed @ block.float().T for block in self.weight.split(_VOCABULARY_BLOCK)]
        return self.transform(torch.cat(blocks, dim=-1) + self.bias)

    def logits_of(
        self, resid: Float[Tensor, "*example vector d_model"], tokens: Int[Tensor, "*example choice"]
    ) -> Float[Tensor, "*example vector choice"]:
        """The logits of chosen tokens only, every example's own; the rest of the vocabulary is not computed."""
        rows = self.weight[tokens].float()
        return self.transform(self.norm(resid) @ rows.transpose(-1, -2) + self.bias[tokens][..., None, :])

    def project(self, normed: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        r"""$a W_U x$ of vectors that are normalised already: no norm, no bias, no soft cap, hence linear."""
        blocks = [normed @ block.float().T for block in self.weight.split(_VOCABULARY_BLOCK)]
        return self.multiplier * torch.cat(blocks, dim=-1)

    def direct(
        self,
        components: Float[Tensor, "component d_model"],
        at: Float[Tensor, "example d_model"],
        tokens: Int[Tensor, "example choice"],
    ) -> Float[Tensor, "example component choice"]:
        r"""What components of a residual stream add to the logits of chosen tokens, the norm's scale held fixed.

        $a W_U[token]\,(g \odot Cx) / s$ with $s$ the scale at the actual stream. Linear, so that components add up: the
        soft cap, which comes after, is left out, and so are the bias and the norm's shift, which no component makes.

        Args:
            at: the actual residual stream before the final norm.
        """
        rows = self.weight[tokens].float()
        return (
            self.multiplier * (self.norm.linear(components) @ rows.transpose(-1, -2)) / self.norm.scale(at)[..., None]
        )

    def _check(self, model: HookedModel) -> None:
        tokens, last = check_tokens(model), resid_name(int(model.cfg.n_layers) - 1)
        run, seen = run_with_activations(model, tokens, [last])
        resid, expected = seen[last].float(), run.float()
        got = self.logits(resid)
        if got.shape != expected.shape or not is_close(got, expected, OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported("to the logits", "other logits than the model's own")
        frozen = self.norm.linear(resid) / self.norm.scale(resid) + self.norm.shift
        if not is_close(frozen, self.norm(resid), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported("to the logits", f"a final norm ({type(self.norm.module).__name__}) of another kind")


@dataclass(frozen=True)
class OutputProjections:
    r"""How a model's heads write into its residual stream: $z \mapsto m\,g \odot C(z W_O[h]) / s$.

    In most architectures this is $z W_O[h]$. Granite multiplies by a constant $m$; Gemma 2 and OLMo 2 normalise the
    attention output before adding it, whose scale $s$ belongs to all heads of a layer together: :meth:`output` leaves
    it at one (the final norm takes out most of it anyway) and :meth:`scale` reads it off.
    """

    projections: tuple[WeightLocation, ...]
    norms: tuple[Norm, ...] | None
    multiplier: float
    n_heads: int
    output_point: str = "attn.o.hook_out"

    @classmethod
    def of(cls, model: HookedModel) -> OutputProjections:
        """Take the output projections and what follows them from a hooked model, and check them.

        Raises:
            LensError: a change of a head's output reaches the residual stream in another way.
        """
        bridge, d_model, device = cast("Any", model), int(model.cfg.d_model), device_of(model)
        if is_hooked_transformer(model):
            held = copied_weights(model)
            copies = tuple(held[name] for name in copied_projection_names(model, "z"))
            copied = cls(copies, None, 1.0, int(model.cfg.n_heads), "hook_attn_out")
            copied._check(model)
            return copied
        try:
            modules = tuple(block.attn.o.original_component for block in bridge.blocks)
            projections = tuple(WeightLocation(module, "weight", is_transposed(module)) for module in modules)
            # getattr() of a bridge falls through to transformers' module, which may call another norm by this name
            posts = [block._modules.get("ln1_post") for block in bridge.blocks]
        except AttributeError as error:
            raise unsupported("into the residual stream", str(error)) from error
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
        tokens, names = check_tokens(model), [z_name(layer), self.hook_name(layer), stream]
        _, before = run_with_activations(model, tokens, names)
        size = float(before[z_name(layer)].abs().max().clamp_min(1e-3))
        shape = (self.n_heads, before[z_name(layer)].shape[-1])
        step = 4 * size * torch.linspace(-1, 1, shape[0] * shape[1], device=tokens.device).reshape(shape)
        _, after = run_with_activations(model, tokens, names, z_adders({layer: step}))
        out_before, out_after = (seen[self.hook_name(layer)].float() for seen in (before, after))
        rows = torch.stack([step[head] @ self.W_O(Head(layer, head)).float() for head in range(self.n_heads)])
        if not is_close(out_after - out_before, rows.sum(0).expand_as(out_after), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported("into the residual stream", f"another change than z W_O after layer {layer}'s heads")
        if self.norms is not None:
            out_before, out_after = self.norms[layer](out_before), self.norms[layer](out_after)
        moved = (after[stream] - before[stream]).float()
        if not is_close(moved, self.multiplier * (out_after - out_before), OTHER_OPERATIONS, model.cfg.dtype):
            raise unsupported(
                "into the residual stream", f"another change than the attention output's in layer {layer}"
            )


def head_output(model: HookedModel, head: Head, z: Float[Tensor, "*sample d_head"]) -> Float[Tensor, "*sample d_model"]:
    r"""What a head's outputs write into the residual stream, $z W_O[h]$ (see :class:`OutputProjections`), in float32.

    Raises:
        RequestError: the head is not in the model.
        LensError: the architecture is not known.
    """
    return OutputProjections.of(model).output(head, z)


@dataclass(frozen=True)
class Norm:
    r"""A normalisation taken apart: $\mathrm{norm}(x) = g \odot Cx / s(x) + t$.

    $g$ is the gain, $t$ the shift, $C$ the identity (RMS) or the removal of the mean (LayerNorm), $s(x)$ the scale,
    the only part that is not linear. All are measured on a float32 copy of the model's own module, so that gains held
    as $1 + w$ and the like need not be known.
    """

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    is_centred: bool

    @classmethod
    def of(cls, module: nn.Module, d_model: int, device: torch.device) -> Norm:
        """Measure a normalisation module with vectors whose normalised form is known."""
        module = copy.deepcopy(module).float()
        # Mean zero and no entry zero: RMS and LayerNorm agree on it; large, so that epsilon does not count
        ripple = 1e3 * (1.0 - 2.0 * (torch.arange(d_model, device=device) % 2))
        if d_model % 2:
            ripple[-3:] = 1e3 * torch.tensor([1.0, 1.0, -2.0], device=device)
        with torch.no_grad():
            shift = module(torch.zeros_like(ripple))
            gain = (module(ripple) - shift) / ripple * ripple.square().mean().sqrt()
            constant = module(torch.ones_like(ripple)) - shift
        return cls(module, gain, shift, bool(constant.abs().max() < 1e-3 * gain.abs().max()))

    def __call__(self, x: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_model"]:
        """Normalise as the model does, in float32."""
        with torch.no_grad():
            return cast("Tensor", self.module(x.float()))

    def linear(self, x: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_model"]:
        r"""The linear part alone, $g \odot Cx$: what a vector adds before it is divided by the scale."""
        x = x.float()
        return self.gain * (x - x.mean(-1, keepdim=True) if self.is_centred else x)

    def scale(self, at: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample 1"]:
        r"""The scale $s$ at given vectors, from the module's own output: $|gCx|^2 / (gCx \cdot (norm(x) - t))$."""
        linear = self.linear(at)
        return linear.square().sum(-1, keepdim=True) / (linear * (self(at) - self.shift)).sum(-1, keepdim=True)
