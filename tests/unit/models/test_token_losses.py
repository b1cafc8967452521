"""Losses token by token: equal to PyTorch's own, with exact gradients, in every format."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lcc_lens.models.hooked import losses as token_losses
from lcc_lens.models.hooked.losses import token_kl_divergence, token_nll


@pytest.fixture(params=[2, 64])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """Two models' logits of five tokens, and targets; in one chunk and in three."""
    monkeypatch.setattr(token_losses, "_CPU_LOGITS", 11 * request.param)
    generator = torch.Generator().manual_seed(0)
    got, wanted = (4 * torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    return got.requires_grad_(), wanted, torch.randint(11, (5,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_are_exact(logits, temperature: float) -> None:
    got, wanted, targets = logits
    assert gradcheck(lambda x: token_nll(x, targets), got)
    assert gradcheck(lambda x: token_kl_divergence(wanted, x, temperature), got)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_are_pytorch_s_own(logits, dtype: torch.dtype, tolerance: float) -> None:
    got, wanted, targets = logits
    got, wanted = got.detach().to(dtype).requires_grad_(), wanted.to(dtype)
    weights = torch.linspace(0.1, 1, 5)
    ours = token_nll(got, targets), token_kl_divergence(wanted, got, 2.0)
    q, p = (log_softmax(x.float() / 2, dim=-1) for x in (got, wanted))
    theirs = (
        cross_entropy(got.float(), targets, reduction="none"),
        4 * kl_div(q, p, reduction="none", log_target=True).sum(-1),
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, reference, atol=1e-5)
        gradients = [torch.autograd.grad((x * weights).sum(), got, retain_graph=True)[0] for x in (mine, reference)]
        assert gradients[0].dtype == dtype
        assert torch.allclose(gradients[0].float(), gradients[1].float(), rtol=tolerance, atol=1e-3 * tolerance)


def test_no_tokens_and_no_gradient() -> None:
    nothing = torch.zeros(0, 7)
    assert (
        token_nll(nothing, torch.zeros(0, dtype=torch.long)).shape
        == token_kl_divergence(nothing, nothing).shape
        == (0,)
    )
    with torch.inference_mode():
        loss = token_kl_divergence(torch.ones(2, 7), torch.eye(2, 7))
    assert not loss.requires_grad
    assert bool((loss > 0).all())
