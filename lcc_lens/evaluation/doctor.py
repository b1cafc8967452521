"""Test which features work for a model and on this machine, with advice for those that do not."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.config import compute_dtype, default_device, package_version
from lcc_lens.core.errors import LensError
from lcc_lens.core.machine.garbage import uncollected
from lcc_lens.core.machine.memory import release_memory
from lcc_lens.core.machine.wheels import DATA_WHEEL, INSTALL_WHEELS, MODEL_WHEEL
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import Batch
from lcc_lens.evaluation.efficiency.timing import now
from lcc_lens.models.architecture.anatomy import LayerAnatomy, find_anatomies
from lcc_lens.models.architecture.bias_slots import find_slots
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.hooked.activations import Site, TokenPositions, site_widths, visit_sites
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.hooked.fused_attention import default_attention_gap, fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.self_checks import check_tokens
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.loading.hooked import LoadedModel, load_hooked
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.methods.slimgpt import Quota

if TYPE_CHECKING:
    import pandas as pd

from lcc_lens.pruning.output.slicing import allowed_groups, require_sliceable, sliced_config

#: ``no`` is a feature that does not work but can be replaced; ``failed`` a model that nothing here can use.
Verdict = Literal["yes", "no", "failed"]
_WHEELS = tuple(wheel.partition("==")[0] for wheel in (MODEL_WHEEL, DATA_WHEEL))
_PACKAGES = ("torch", "transformers", "transformer-lens", "safetensors", "accelerate", "peft", "gguf", *_WHEELS)
#: Width of the timed matrix products, how many there are at most, and the seconds after which no more follow.
_WIDTH, _REPEATS, _SECONDS = 512, 5, 0.1
_FORMATS = (torch.float32, torch.bfloat16)
_MARK = {"yes": "✓", "no": "–", "failed": "✗"}


@dataclass(frozen=True)
class Finding:
    """One check: its verdict, the result, and advice if there is something to do."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""

    @property
    def row(self) -> list[str]:
        """A row of a table: the name with a mark, and the finding with its advice."""
        text = f"{self.found}; {self.advice}" if self.advice else self.found
        return [f"{_MARK[self.verdict]} {self.name}", text]


@dataclass(frozen=True, repr=False)
class Examination(Shown):
    """All findings on a model and a machine."""

    reference: str
    model: tuple[Finding, ...]
    machine: tuple[Finding, ...]

    def table(self) -> pd.DataFrame:
        """One row per finding: subject (model or machine), name, verdict, found, advice."""
        import pandas as pd

        parts = {"model": self.model, "machine": self.machine}
        return pd.DataFrame({"subject": name, **vars(finding)} for name, part in parts.items() for finding in part)

    def _facts(self) -> dict[str, Any]:
        return dict(finding.row for finding in (*self.model, *self.machine))

    @property
    def is_sound(self) -> bool:
        """Whether the model loads and passes its checks; features with a replacement do not count."""
        return all(finding.verdict != "failed" for finding in (*self.model, *self.machine))


@dataclass(frozen=True)
class Machine:
    """Versions by package (None if not installed), the device and its speed.

    ``gflops`` are billions of operations per second of a matrix product in float32 and bfloat16, the best of a few.
    ``free_bytes`` is the device's free memory, None if unknown.
    """

    python: str
    versions: dict[str, str | None]
    device: str
    dtype: str
    gflops: dict[str, float]
    free_bytes: int | None

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine; the matrix products take a few milliseconds on most."""
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


@uncollected()
def examine(reference: str | Path) -> Examination:
    """Run the checks of loading, try every feature on the model, and look at the machine.

    Features are tried, not looked up in a list of families.

    Args:
        reference: see :func:`lcc_lens.models.loading.references.resolve`.

    Returns:
        The findings. A model that cannot be used is a finding, not an error.

    Example:
        >>> for finding in examine("smollm2").model:  # doctest: +SKIP
        ...     print(*finding.row)
    """
    machine = Machine.here()
    return Examination(str(reference), tuple(_model_findings(reference)), tuple(_machine_findings(machine)))


def _model_findings(reference: str | Path) -> Iterator[Finding]:
    try:
        checkpoint = Checkpoint(resolve(reference))
        n_files, size = len(checkpoint.weight_files), checkpoint.n_bytes
    except LensError as error:
        yield _refusal("files", error, "failed")
        return
    yield Finding("files", "yes", f"{checkpoint.path}, {n_files} of weights, {size / 1e6:,.0f} MB")
    yield from _pruning_findings(checkpoint)
    try:
        loaded = load_hooked(reference)
    except LensError as error:
        yield _refusal("loads under hooks", error, "failed")
        return
    cfg = loaded.model.cfg
    groups = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    heads = f"{cfg.n_layers} layers of {cfg.n_heads} heads of {cfg.d_head}, {groups} key-value heads"
    yield Finding("loads under hooks", "yes", f"logits equal transformers', hook_z acts: {heads}")
    yield from _hook_findings(loaded, checkpoint)
    del loaded
    release_memory()


def _hook_findings(loaded: LoadedModel, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Which features work for a model under hooks."""
    removed = sum(map(len, loaded.removed_heads))
    if removed:
        yield Finding("heads removed", "yes", f"{removed}, whose columns of the output projection are all zero")
    with fused_attention(loaded.model) as is_fused:
        kernels = "the model's own kernels" if is_fused else "step by step: slower, same results"
    if gap := default_attention_gap(loaded.model):
        kernels = f"step by step; transformers' default attention gives other logits, by up to {gap:.2g}"
    yield _tried("scan", lambda: _scanned(loaded.model))
    yield Finding("attention under hooks", "yes" if is_fused else "no", kernels)
    yield _tried("constants in an export", lambda: find_slots(checkpoint, loaded.output_projections).way)
    yield _tried(
        "MLP constants in an export", lambda: find_slots(checkpoint, projection_names(loaded.model, "mlp"), "mlp").way
    )

    def checked(build: Callable[[HookedModel], object], name: str) -> str:
        build(loaded.model)
        return f"{name}, checked"

    yield _tried("logit lens", lambda: checked(Unembedding.of, "final norm and unembedding"))
    yield _tried("head by head", lambda: checked(OutputProjections.of, "output projections"))


def _scanned(model: HookedModel) -> str:
    """Read every site of every layer, as a scan does."""
    widths, tokens = site_widths(model), check_tokens(model)
    lengths = torch.tensor([tokens.shape[1]] * len(tokens))
    batch = Batch(tokens.cpu(), lengths, torch.ones_like(lengths), tuple(range(len(tokens))))
    read: list[tuple[Site, int]] = []
    places = dict.fromkeys(widths, TokenPositions.all_tokens(batch))
    visit_sites(model, tokens, places, lambda site, layer, activation: read.append((site, layer)))
    expected = len(widths) * int(model.cfg.n_layers)
    if len(read) != expected:
        raise LensError(f"expected {expected} activations, got {len(read)}; this architecture is not supported")
    return ", ".join(f"{site} ({width} wide)" for site, width in widths.items())


def _pruning_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Which pruners take the checkpoint, judged by names and shapes."""
    plan = []

    def matrices() -> str:
        plan.extend(find_matrices(checkpoint))
        return f"{sum(map(len, plan))} matrices in {len(plan)} layers"

    anatomies: list[LayerAnatomy] = []

    def structure() -> str:
        anatomies.extend(find_anatomies(checkpoint.path, plan))
        first = anatomies[0]
        return f"{first.attention.n_groups} groups of {first.heads_per_group} heads, {first.mlp.n_groups} neurons"

    yield _tried("magnitude, wanda, sparsegpt", matrices)
    if plan:
        yield _tried("slimgpt (heads, neurons)", structure)
    if anatomies:
        yield _tried("slimgpt --sliced", lambda: _slicing(checkpoint.path, anatomies))


def _slicing(path: Path, anatomies: Sequence[LayerAnatomy]) -> str:
    groups = sorted(allowed_groups(path, anatomies[0]) - {0})
    quota = Quota(groups[0] if groups else 0, 1)
    require_sliceable(path, anatomies, quota, sliced_config(path, anatomies[0], quota))
    return "the configuration holds fewer heads and neurons" if groups else "neurons alone: no smaller number of heads"


def _machine_findings(machine: Machine) -> Iterator[Finding]:
    installed = {name: number for name, number in machine.versions.items() if number}
    versions = ", ".join(f"{name} {number}" for name, number in installed.items())
    yield Finding("versions", "yes", f"Python {machine.python}, {versions}")
    if "peft" not in installed:
        yield Finding("LoRA and DoRA", "no", "peft is not installed", "pip install 'lcc-lens[baselines]'")
    if absent := [wheel for wheel in _WHEELS if wheel not in installed]:
        yield Finding("embedded model and data", "no", f"{' and '.join(absent)} not installed", INSTALL_WHEELS)
    cuda = "" if torch.cuda.is_available() or not torch.version.cuda else "; torch's CUDA build sees no GPU"
    free = "" if machine.free_bytes is None else f", {machine.free_bytes / 2**30:.1f} GiB free"
    yield Finding("device", "yes", f"{machine.device}{free}{cuda}")
    speeds = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in machine.gflops.items())
    yield _format_finding(machine, speeds)


def _format_finding(machine: Machine, speeds: str) -> Finding:
    """The number format of computations, and whether the other one would be faster."""
    other = {"float32": "bfloat16", "bfloat16": "float32"}.get(machine.dtype)
    found = f"computes in {machine.dtype}; {speeds}"
    if other is None or machine.gflops[other] < 1.5 * machine.gflops[machine.dtype]:
        return Finding("number format", "yes", found)
    return Finding("number format", "no", found, f"LCC_LENS_DTYPE={other} may be faster here")


def _tried(name: str, action: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "yes", action())
    except LensError as error:
        return _refusal(name, error, "no")


def _refusal(name: str, error: LensError, verdict: Verdict) -> Finding:
    found, _, advice = str(error).partition("; ")
    return Finding(name, verdict, found, advice)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Billions of operations per second of a matrix product; bfloat16 is so slow on some that one product is enough."""
    matrix = torch.ones(_WIDTH, _WIDTH, device=device, dtype=dtype)
    best, begin = float("inf"), now(device)
    for _ in range(_REPEATS):
        start = now(device)
        torch.mm(matrix, matrix)
        best = min(best, now(device) - start)
        if now(device) - begin > _SECONDS:
            break
    return 2 * _WIDTH**3 / best / 1e9


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        return None
