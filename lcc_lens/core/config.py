"""Settings from environment variables: cache folder, device, number format, kind of hooks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.machine.processes import n_processes, process_device

if TYPE_CHECKING:
    import torch

#: Where to put weights that do not fit on one device; see :func:`lcc_lens.models.hooked.offloading.placement`.
DeviceMap = Literal["auto", "disk"]
DTYPES = ("float32", "bfloat16", "float16")
#: TransformerLens' kinds of hooked models: hooks on transformers' model, or a model class of its own.
HookKind = Literal["bridge", "hooked-transformer"]


def package_version() -> str:
    """The installed version of lcc_lens, which every artefact records."""
    try:
        return version("lcc-lens")
    except PackageNotFoundError:
        return "0+unknown"


def cache_dir() -> Path:
    """The folder for converted models and prepared data: ``LCC_LENS_CACHE``, else the platform's user cache."""
    import platformdirs

    named = os.environ.get("LCC_LENS_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("lcc_lens"))


def default_device() -> torch.device:
    """The device to compute on: ``LCC_LENS_DEVICE``, else CUDA if there is a GPU, else the CPU.

    With several processes (see :mod:`lcc_lens.core.machine.processes`) each has its own GPU.
    """
    import torch

    named = os.environ.get("LCC_LENS_DEVICE")
    if named:
        try:
            device = torch.device(named)
            torch.zeros(1, device=device).item()
        except Exception as error:  # of a type that depends on how torch was built
            raise RequestError(
                f"expected LCC_LENS_DEVICE to be a device of this machine, got {named!r} ({first_line(error)}); name "
                "another, such as cpu"
            ) from error
        return device
    if n_processes() > 1:
        return process_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_device_map() -> DeviceMap | None:
    """The device map ``LCC_LENS_DEVICE_MAP``; None puts all weights on the device to compute on."""
    named = os.environ.get("LCC_LENS_DEVICE_MAP")
    if named and named not in get_args(DeviceMap):
        raise RequestError(f"expected LCC_LENS_DEVICE_MAP to be {' or '.join(get_args(DeviceMap))}, got {named!r}")
    return cast("DeviceMap", named) if named else None


@contextmanager
def placed(device_map: DeviceMap | None) -> Iterator[None]:
    """Use this device map for models that are loaded inside the block without one of their own."""
    before = os.environ.get("LCC_LENS_DEVICE_MAP")
    if device_map is not None:
        os.environ["LCC_LENS_DEVICE_MAP"] = device_map
    try:
        yield
    finally:
        if device_map is not None:
            os.environ.pop("LCC_LENS_DEVICE_MAP")
        if before is not None:
            os.environ["LCC_LENS_DEVICE_MAP"] = before


def bound_kernel_cache() -> None:
    """Let oneDNN keep 64 compiled kernels instead of 1,024, unless ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` is set.

    On a CPU oneDNN compiles a kernel for each new batch shape, and 1,024 of them take hundreds of MiB. A training step
    needs about twenty, the same ones in every layer. The setting only works before the first computation, so commands
    call this, not functions.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def compute_dtype(device: torch.device) -> torch.dtype:
    """The format of model weights and activations during computation.

    ``LCC_LENS_DTYPE``, else bfloat16 if the hardware multiplies it natively (CUDA from Ampere on; CPUs with AVX512-BF16
    or AMX), else float32: emulated bfloat16 is several times slower. Statistics and trained parameters are always
    float32 or wider.
    """
    import torch

    named = os.environ.get("LCC_LENS_DTYPE")
    if named:
        if named not in DTYPES:
            raise RequestError(f"expected LCC_LENS_DTYPE to be one of {', '.join(DTYPES)}, got {named!r}")
        dtype: torch.dtype = getattr(torch, named)
        return dtype
    return torch.bfloat16 if _is_bf16_fast(device) else torch.float32


def tokens_per_pass(device: torch.device) -> int:
    """The default number of padded tokens per forward pass: more on a GPU, which small passes leave idle."""
    return 1024 if device.type == "cpu" else 4096


def hook_kind() -> HookKind:
    """The kind of hooked model to make: ``LCC_LENS_HOOKS``, else ``bridge``.

    ``hooked-transformer`` needs TransformerLens 3.
    """
    kind = os.environ.get("LCC_LENS_HOOKS") or "bridge"
    if kind not in get_args(HookKind):
        raise RequestError(f"expected LCC_LENS_HOOKS to be one of {', '.join(get_args(HookKind))}, got {kind!r}")
    return cast("HookKind", kind)


def _is_bf16_fast(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
