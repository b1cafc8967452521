"""Forward passes with a model's own attention give what TransformerLens' stepwise attention gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, family

from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.fused_attention import can_fuse, fused_attention
from lcc_lens.models.hooked.hooks import logits_at, z_adders, z_name, z_readers
from lcc_lens.models.hooked.self_checks import OTHER_KERNELS

#: GPT-2's output projection is not read under its own forward; fused kernels leave Gemma 2's soft cap out.
STEPWISE = {"gpt2", "gemma2"}
TOKENS = torch.randint(1, 257, (3, 40), generator=torch.Generator().manual_seed(0))


def seen_by(run: Any, model: Any, tokens: torch.Tensor = TOKENS) -> list[torch.Tensor]:
    """Logits and all head outputs, bare and with an edit in the first layer."""
    found: list[torch.Tensor] = []
    n_layers, shape = int(model.cfg.n_layers), (int(model.cfg.n_heads), int(model.cfg.d_head))
    for edits in ([], z_adders({0: torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)})):
        with torch.inference_mode():
            logits = run(model, tokens, [*edits, *z_readers(range(n_layers), lambda _, z: found.append(z.clone()))])
        found.append(logits)
    return found


def stepwise(model: Any, tokens: torch.Tensor, hooks: list[Any]) -> Any:
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_equals_the_stepwise_run(name: str, tmp_path: Path) -> None:
    model = family(name, tmp_path)
    assert can_fuse(model) == (name not in STEPWISE)
    expected, got = seen_by(stepwise, model), seen_by(forward, model)
    assert len(got) == 2 * (3 + 1)
    assert not torch.allclose(expected[3], expected[7], atol=0.01)  # the edit counts
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_pattern_is_computed(pair: Any) -> None:
    fired: list[bool] = []
    with fused_attention(pair.pruned) as is_fused:
        look = ("blocks.0.attn.hook_pattern", lambda p, hook: fired.append(True))
        pair.pruned.run_with_hooks(TOKENS, fwd_hooks=[look])
    assert is_fused
    assert not fired


def test_gradients_are_the_same(pair: Any) -> None:
    gradients = []
    for run in (stepwise, forward):
        constant = torch.zeros(pair.n_heads, pair.d_head, requires_grad=True)
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        logits = run(pair.pruned, TOKENS, [*z_adders({1: constant}), *logits_at(pair.pruned, mask)])
        logits.float().logsumexp(-1).sum().backward()
        gradients.append(constant.grad)
    assert gradients[0].abs().max() > 0.1
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_who_looks_inside_attention_sees_it(tmp_path: Path) -> None:
    model = family("llama", tmp_path)
    assert can_fuse(model)
    patterns: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: patterns.append(p))]):
        watched = forward(model, TOKENS, [])
    assert torch.allclose(patterns[0].sum(-1), torch.ones(3, 5, 40), atol=1e-5)
    assert torch.allclose(forward(model, TOKENS, []), watched, rtol=1e-4, atol=1e-5)
    assert len(patterns) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(pair: Any, fails: bool) -> None:
    attention = pair.pruned.blocks[0].attn

    def look(z: torch.Tensor, hook: Any) -> None:
        assert pair.pruned.original_model.config._attn_implementation == "sdpa"
        if fails:
            raise KeyError("stop")

    try:
        forward(pair.pruned, TOKENS, [(z_name(0), look)])
    except KeyError:
        assert fails
    assert pair.pruned.original_model.config._attn_implementation == "eager"
    assert "forward" not in attention.__dict__
    _, cache = pair.pruned.run_with_cache(TOKENS)
    assert cache["blocks.0.attn.hook_pattern"].shape == (3, 5, 40, 40)


def test_kernels_that_give_something_else_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama", tmp_path)
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 1.01 * kernel(*args, **kwargs)
    )
    assert not can_fuse(model)
    assert torch.equal(forward(model, TOKENS, []), stepwise(model, TOKENS, []))


def test_rounding_that_later_layers_magnify_counts_for_nothing(tmp_path: Path) -> None:
    """Sharp attention in bfloat16: every layer gives the same on the same inputs, and yet the logits come apart."""
    model = family("llama", tmp_path)
    model.original_model.to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    with torch.no_grad():
        for name, weight in model.original_model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(4)
    expected, got = (run(model, TOKENS, [])[0].float() for run in (stepwise, forward))
    assert can_fuse(model)
    assert float((got - expected).norm()) > OTHER_KERNELS.coarse * float(expected.norm())
