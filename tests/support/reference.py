"""The paper's mathematics again, slowly and plainly: one example, one head at a time, no streaming, no batching."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def head_outputs(directory: Path, sequences: list[Tensor], n_heads: int) -> list[Tensor]:
    """The input of every output projection, ``[pos, layer, head, d_head]`` per sequence, from a plain model."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].clone()))
    results = []
    for tokens in sequences:
        seen.clear()
        with torch.no_grad():
            model(tokens[None])
        results.append(torch.stack([z.unflatten(-1, (n_heads, -1)) for z in seen], dim=1))
    return results


def layer_outputs(directory: Path, sequences: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The MLP's post-activation and the residual stream after every layer, ``[pos, layer, 1, width]`` per sequence."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    mlp: list[Tensor] = []
    resid: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: mlp.append(inputs[0][0].clone()))
        layer.register_forward_hook(
            lambda module, inputs, output: resid.append((output[0] if isinstance(output, tuple) else output)[0].clone())
        )
    results = []
    for tokens in sequences:
        mlp.clear()
        resid.clear()
        with torch.no_grad():
            model(tokens[None])
        results.append(tuple(torch.stack(site, dim=1)[:, :, None] for site in (mlp, resid)))
    return [mlp for mlp, _ in results], [resid for _, resid in results]


def lost_component(differences: Tensor, rank: int) -> Tensor:
    """Eqs. 3 and 4 for one head: the SVD of stacked differences ``[n, d_head]`` and the mean coefficients."""
    u, s, vt = torch.linalg.svd(differences.double(), full_matrices=False)
    component = torch.zeros(differences.shape[1], dtype=torch.float64)
    for i in range(rank):
        component += (s[i] * u[:, i]).mean() * vt[i]
    return component


def probe_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, epochs: int
) -> tuple[float, Tensor]:
    """One head's probe as published: a linear layer, sigmoid, binary cross-entropy, full-batch Adam at 1e-2."""
    layer = nn.Linear(train[0].shape[1], 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.copy_(bias[None])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.BCELoss()(torch.sigmoid(layer(train[0])).squeeze(-1), train[1].float()).backward()
        optimizer.step()
    predicted = torch.sigmoid(layer(test[0])).squeeze(-1) >= 0.5
    return float((predicted == test[1]).float().mean()), layer.weight.detach()[0]
