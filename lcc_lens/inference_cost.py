"""What restorations cost at inference: the pruned model with biases for constants, and with adapters beside weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lcc_lens.baselines.adapters import adapted
from lcc_lens.entries import ADAPTERS, Entry
from lcc_lens.errors import RequestError
from lcc_lens.export import find_slots
from lcc_lens.injections import uses_components
from lcc_lens.latency import DECODE_PROMPT, interleaved, median_interval, spread_tokens, time_decode, time_prefill
from lcc_lens.models import load_plain
from lcc_lens.pruning.layers import is_linear
from lcc_lens.speed import SpeedConfig

#: What a result looks like at inference, beside the adapters' names.
PLAIN, BIASES = "pruned", "biases"


def served_as(entry: Entry) -> str:
    """How a merged entry runs: as the ``pruned`` model does (changed weights), with ``biases``, or with an adapter."""
    if entry.method in ADAPTERS:
        return entry.method
    has_constants = entry.method is not None and (entry.method == "lofit" or uses_components(entry.method))
    return BIASES if has_constants else PLAIN


def inference_costs(
    path: Path,
    output_projections: tuple[str, ...],
    kinds: Collection[str],
    *,
    rank: int = 8,
    config: SpeedConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Time plain models side by side, in interleaved rounds; values do not matter to the time, shapes do.

    Args:
        path: the pruned model's directory.
        output_projections: plain names of its attention output projections.
        kinds: what :func:`served_as` gives; ``pruned`` is always timed.
        rank: of adapters.
        config: what is timed.

    Returns:
        By kind ``prefill_ms`` and ``decode_ms`` (per token), and ``prefill_ratio`` and ``decode_ratio`` to the pruned
        model's of the same round, each a median with its interval. Kinds that the architecture cannot carry are left
        out.
    """
    config = config or SpeedConfig()
    models: dict[str, nn.Module] = {}
    for kind in dict.fromkeys([PLAIN, *kinds]):
        try:
            models[kind] = _served(path, output_projections, kind, rank)
        except RequestError:
            continue
    embedding = cast("Any", models[PLAIN]).get_input_embeddings()
    n_vocab, device = embedding.weight.shape[0], embedding.weight.device
    prompt, start = (spread_tokens(n, n_vocab, device) for n in (config.prompt_tokens, DECODE_PROMPT))
    jobs: dict[str, dict[str, Callable[[], float]]] = {
        "prefill": {kind: functools.partial(time_prefill, model, prompt) for kind, model in models.items()},
        "decode": {
            kind: functools.partial(time_decode, model, start, config.new_tokens) for kind, model in models.items()
        },
    }
    found: dict[str, dict[str, Any]] = {kind: {} for kind in models}
    for job, timed in jobs.items():
        durations = interleaved(timed, config.repeats, job)
        for kind, values in durations.items():
            ratios = [value / base for value, base in zip(values, durations[PLAIN], strict=True)]
            found[kind] |= {f"{job}_ms": median_interval(values), f"{job}_ratio": median_interval(ratios)}
    return found


def _served(path: Path, output_projections: tuple[str, ...], kind: str, rank: int) -> Any:
    model = load_plain(path)
    if kind == BIASES:
        slots = find_slots(path, output_projections)
        modules = dict(model.named_modules())
        for name in {*slots.biases, *slots.zero_biases}:
            module: Any = modules.get(name.removesuffix(".bias"))  # none where the export would split a fused map
            if module is not None and module.bias is None:
                size = next(iter(slots.zero_biases.get(name, (module.weight.shape[0],))))
                module.bias = nn.Parameter(torch.zeros(size).to(module.weight), requires_grad=False)
    elif kind in ADAPTERS:
        adapter, targets = ADAPTERS[kind]
        names = [n for n, m in model.named_modules() if is_linear(m) and n.rsplit(".", 1)[-1] in targets]
        adapted(model, names, kind=adapter, rank=rank, seed=0)
        for layer in model.modules():  # as served: in the model's own format
            for name, number in layer.named_parameters(recurse=False):
                if number.dtype != model.dtype:
                    setattr(layer, name, nn.Parameter(number.data.to(model.dtype), requires_grad=False))
    return model
