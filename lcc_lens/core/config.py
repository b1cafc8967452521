"""Where things are kept and which device and number format computations use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from lcc_lens.core.errors import RequestError
from lcc_lens.core.processes import n_processes, process_device

if TYPE_CHECKING:
    import torch

#: Where a model's weights go that do not all go to one device; see :func:`lcc_lens.models.hooked.offloading.placement`.
DeviceMap = Literal["auto", "disk"]
DTYPES = ("float32", "bfloat16", "float16")
#: TransformerLens' kinds of hooked models: hooks on transformers' own model, or its own copy of the model.
HookKind = Literal["bridge", "hooked-transformer"]


def package_version() -> str:
    """The installed version of lcc_lens, as written into every artefact."""
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
    """The device to compute on: ``LCC_LENS_DEVICE``, else CUDA where there is one, else the CPU.

    Of several processes (see :mod:`lcc_lens.core.processes`) each has its own.
    """
    import torch

    named = os.environ.get("LCC_LENS_DEVICE")
    if named:
        try:
            return torch.device(named)
        except RuntimeError as error:
            raise RequestError(f"expected LCC_LENS_DEVICE to be a torch device, got {named!r}") from error
    if n_processes() > 1:
        return process_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_device_map() -> DeviceMap | None:
    """Where weights go: ``LCC_LENS_DEVICE_MAP``, else all to the device to compute on."""
    named = os.environ.get("LCC_LENS_DEVICE_MAP")
    if named and named not in get_args(DeviceMap):
        raise RequestError(f"expected LCC_LENS_DEVICE_MAP to be {' or '.join(get_args(DeviceMap))}, got {named!r}")
    return cast("DeviceMap", named) if named else None


@contextmanager
def placed(device_map: DeviceMap | None) -> Iterator[None]:
    """Let models that are loaded inside the block have this device map where they are not given one."""
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
    """Keep fewer of oneDNN's kernels, unless ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` says how many.

    It compiles one for each new shape of a batch on a CPU and keeps 1,024, which grow to hundreds of MiB; those of the
    last few shapes serve as well (a training step alone needs some twenty, again in every layer). Has an effect only
    before the first computation, so commands call it, not functions.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def compute_dtype(device: torch.device) -> torch.dtype:
    """The format of model weights and activations during computation.

    bfloat16 where the hardware multiplies it natively (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX),
    float32 elsewhere: an emulated bfloat16 is several times slower than float32. ``LCC_LENS_DTYPE`` overrides.
    Statistics and trained parameters are float32 or wider whatever this returns.
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
    """Padded tokens of one pass where nobody says how many: more on a GPU, which small passes leave idle."""
    return 1024 if device.type == "cpu" else 4096


def hook_kind() -> HookKind:
    """Which kind of hooked model is made of a checkpoint: ``LCC_LENS_HOOKS``, else ``bridge``.

    ``hooked-transformer`` needs TransformerLens 3.

    Raises:
        RequestError: another word.
    """
    named = os.environ.get("LCC_LENS_HOOKS") or "bridge"
    for kind in get_args(HookKind):
        if named == kind:
            return cast("HookKind", kind)
    raise RequestError(f"expected LCC_LENS_HOOKS to be one of {', '.join(get_args(HookKind))}, got {named!r}")


def _is_bf16_fast(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
