"""What this machine offers: versions, device, number format and how fast it multiplies."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from lcc_lens.core.config import compute_dtype, default_device, package_version

_PACKAGES = ("torch", "transformers", "transformer-lens", "safetensors", "accelerate", "peft", "gguf")
_WIDTH, _REPEATS = 768, 5


@dataclass(frozen=True)
class Machine:
    """Versions by package (None where it is not installed), and what computes.

    ``gflops`` are billions of operations per second of a matrix product in float32 and bfloat16, the best of a few;
    ``free_bytes`` the device's free memory, None where it cannot be told.
    """

    python: str
    versions: dict[str, str | None]
    device: str
    dtype: str
    gflops: dict[str, float]
    free_bytes: int | None

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine; the products take a few milliseconds on most."""
        device = default_device()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        return cls(
            python=platform.python_version(),
            versions={"lcc-lens": package_version(), **{package: _version(package) for package in _PACKAGES}},
            device=f"{device} ({name})",
            dtype=str(compute_dtype(device)).removeprefix("torch."),
            gflops={str(dtype).removeprefix("torch."): _speed(device, dtype) for dtype in _FORMATS},
            free_bytes=_free_bytes(device),
        )


_FORMATS = (torch.float32, torch.bfloat16)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(_WIDTH, _WIDTH, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        _finish(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _WIDTH**3 / best / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        return None
