"""Models larger than memory: decoder layers on disk, or sharded over processes, and loaded when they compute.

Accelerate loads layers from disk module by module: a hook reads a module's weights from the checkpoint's safetensors
before its forward pass and frees them after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lcc_lens.core.config import DeviceMap
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.processes import in_step, n_processes, process_device
from lcc_lens.models.hooked.hooks import HookedModel


def placement(path: Path, device: torch.device, device_map: DeviceMap | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that place the weights; empty if all go to one device.

    Args:
        device_map: ``auto`` lets accelerate spread the model over all GPUs, memory and disk as it fits; ``disk`` leaves
            every decoder layer on disk.
    """
    from lcc_lens.models.architecture.layers import (  # which load models themselves
        decoder_layers,
        read_config,
        skeleton,
    )

    if device_map is None:
        return {}
    if device_map == "auto":
        return {"device_map": "auto"}
    config = read_config(path)
    model = skeleton(path, config)
    layers, _ = decoder_layers(model, config)
    return {"device_map": dict(_places(model, "", layers, str(device)))}


def _places(module: nn.Module, name: str, layers: str, device: str) -> Iterator[tuple[str, str]]:
    """The place of each module: every decoder layer on disk, everything else on the device."""
    for child, part in module.named_children():
        place = f"{name}.{child}".lstrip(".")
        if place == layers:
            yield from ((f"{place}.{i}", "disk") for i in range(len(cast("nn.ModuleList", part))))
        elif layers.startswith(f"{place}."):
            yield from _places(part, place, layers, device)
        else:
            yield place, device


def entry_device(model: nn.Module) -> torch.device:
    """The device of a model's input tokens: that of its first weights in memory."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def each_parameter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, once; parameters on disk are read one by one."""
    seen: set[int] = set()
    for place, module in model.named_modules():
        hook = _offloading_hook(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                value = hook.weights_map[name] if hook is not None and parameter.is_meta else parameter
                yield f"{place}.{name}".lstrip("."), value


def weight_in_memory(module: nn.Module) -> Tensor:
    """A module's weight, read from disk if it is offloaded."""
    weight, hook = module.get_parameter("weight"), _offloading_hook(module)
    value: Tensor = hook.weights_map["weight"] if hook is not None and weight.is_meta else weight
    return value


def require_in_memory(model: nn.Module, purpose: str) -> None:
    """Refuse a model with layers on disk, for a purpose that needs weights outside a forward pass."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RequestError(
            f"expected all weights in memory for {purpose}, got layers on disk; load the model without a device map"
        )


def bring_in(layer: nn.Module) -> bool:
    """Load a layer's weights into memory to stay; returns whether any were on disk."""
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    offloaded = [(module, hook) for module in layer.modules() if (hook := _offloading_hook(module)) is not None]
    for module, hook in offloaded:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                set_module_tensor_to_device(module, name, hook.execution_device, value=hook.weights_map[name])
    if offloaded:
        remove_hook_from_module(layer, recurse=True)
    return bool(offloaded)


def shard_layers(model: HookedModel) -> None:
    """Shard the weights of every decoder layer over the processes that were launched together (FSDP2).

    A process holds all weights of a layer only while it computes, so all processes must run the same passes: call
    :func:`lcc_lens.analysis.scan.scan.scan` without a run directory in each of them, and save one result.

    Args:
        model: a hooked model, loaded on the CPU; it ends up on the device of this process.

    Reference:
        Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if n_processes() == 1:
        raise RequestError("expected several processes to shard a model over, got one; start them by accelerate launch")
    bridge = cast("Any", model)
    require_in_memory(bridge.original_model, "dividing a model among processes")
    device = process_device()
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in bridge.blocks:
        # each layer is the first of its own tree, whose whole weights torch would keep after the first pass
        fully_shard(block.original_component, mesh=mesh, reshard_after_forward=True)
    bridge.original_model.to(device)
    for block in bridge.blocks:  # first outside inference mode, whose tensors no gradient could pass later
        block.original_component.unshard()
        block.original_component.reshard()


def is_sharded(model: HookedModel) -> bool:
    """Whether :func:`shard_layers` divided the model's layers."""
    return any(hasattr(module, "reshard") for module in cast("nn.Module", model).modules())  # torch's FSDPModule


def in_step_if_sharded(*models: HookedModel) -> AbstractContextManager[None]:
    """Within the block all processes run the same passes if :func:`shard_layers` divided one of the models."""
    return in_step() if any(map(is_sharded, models)) else nullcontext()


def _offloading_hook(module: nn.Module) -> Any:
    """Accelerate's hook that loads a module's weights; None if they are in memory."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def device_of(model: HookedModel) -> torch.device:
    """The device of a hooked model's input tokens."""
    return entry_device(cast("nn.Module", model))
