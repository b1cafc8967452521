"""Efficiency report of models: their sparsity, whether their zeros agree, their size and their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcc_lens.core.config import compute_dtype, default_device, package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, ranged
from lcc_lens.core.reading import convert, read_json
from lcc_lens.core.showing import Record
from lcc_lens.evaluation.efficiency.compression import compressed_size, matrix_sizes
from lcc_lens.evaluation.efficiency.timing import DECODE_PROMPT, SpeedConfig, measure_speed, require_context
from lcc_lens.evaluation.evaluate import unique_names
from lcc_lens.models.architecture.sparsity_patterns import shown_pattern
from lcc_lens.models.architecture.zeros import ZeroPattern, compare_zeros, zero_pattern
from lcc_lens.models.loading.provenance import pruned_to
from lcc_lens.models.loading.references import resolve

if TYPE_CHECKING:
    import pandas as pd

Entry = dict[str, Any]
#: Entries of a model that are columns of the table, and times, whose medians are.
_COLUMNS = ("sparsity", "pattern", "parameters", "nonzero_parameters", "bytes", "bytes_zstd", "dtype")
_TIMES = ("prefill_ms", "decode_ms")
_AGAIN = "make it again with lcc-lens report"


class EfficiencyReport(Record):
    """The contents of ``report.json``."""

    def table(self) -> pd.DataFrame:
        """One row per model: sparsity, pattern, parameters, bytes and, where it was timed, the median milliseconds."""
        import pandas as pd

        return pd.DataFrame(
            {
                "model": name, **{key: model[key] for key in _COLUMNS},
                **{key: None if model[key] is None else model[key]["median"] for key in _TIMES},
            }
            for name, model in self["models"].items()
        )  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        return {
            name: f"{model['sparsity']:.1%} zeros ({shown_pattern(model['pattern'], model.get('pattern_asked'))}), "
            f"{model['parameters']:,} parameters, {model['bytes'] / 1e6:.1f} MB, {model['bytes_zstd'] / 1e6:.1f} MB "
            "compressed"
            for name, model in self["models"].items()
        }


@dataclass(frozen=True)
class _Matrix:
    sparsity: float


@dataclass(frozen=True)
class _Model:
    sparsity: float
    pattern: str
    bytes: int
    bytes_zstd: int
    matrices: dict[str, _Matrix]


@dataclass(frozen=True)
class _Report:
    models: dict[str, _Model]
    ratios: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    machine: dict[str, Any]
    zero_patterns: dict[str, Any]


def read_report(path: Path) -> dict[str, Any]:
    """The contents of a ``report.json``.

    Raises:
        RequestError: no file, or one of another layout.
    """
    contents = read_json(path, dict[str, Any], _AGAIN)
    convert(contents, _Report, str(path), _AGAIN)
    return contents


@ranged
def report(
    references: Sequence[str | Path],
    *,
    latency: bool = True,
    repeats: Count = 15,
    prompt_tokens: Count = 256,
    new_tokens: Count = 24,
) -> EfficiencyReport:
    """The contents of ``report.json``: zeros, sizes and times of models, compared with the first one.

    Zeros and sizes are read from the files, one tensor at a time. To measure times in interleaved rounds, all models
    are in memory at once, in plain transformers and in the same number format.

    Args:
        references: model references (see :func:`lcc_lens.models.loading.references.resolve`), the dense one best first.
        latency: load the models and time them; otherwise every time is ``None`` and ``ratios`` is empty.
        repeats: timed rounds.
        prompt_tokens: tokens of the forward pass that ``prefill_ms`` times.
        new_tokens: tokens generated one by one that ``decode_ms`` averages over, after a prompt of 16.

    Returns:
        ``models`` by name; ``ratios`` of each model's times to the first model's, formed within each round;
        ``zero_patterns``, every model with zeros against the first of them; ``settings``, ``machine``, ``version``.
        Times are in milliseconds, medians with intervals as
        :func:`lcc_lens.evaluation.efficiency.timing.median_interval` gives them, sizes in bytes.

    Raises:
        RequestError: no model or one that cannot be read, a number below one, or more tokens than a model takes.
        LensError: a weight is NaN or infinite.

    Example:
        >>> report(["smollm2", "out/wanda50"])["models"]["wanda50"]["sparsity"]  # doctest: +SKIP
        0.5
    """
    if not references:
        raise RequestError("expected at least one model, got none; name some, the dense one first")
    config = SpeedConfig(repeats, prompt_tokens, new_tokens)
    paths = dict(zip(unique_names(references), map(resolve, references), strict=True))
    if latency:
        require_context(paths, config.longest)
    zeros = {name: zero_pattern(path) for name, path in paths.items()}
    models = {
        name: {"reference": str(reference), **_file_entry(zeros[name])}
        for name, reference in zip(paths, references, strict=True)
    }
    return EfficiencyReport(
        models=models,
        ratios=_add_times(models, paths, config) if latency else {},
        zero_patterns=compare_patterns(zeros),
        settings={"latency": latency, **vars(config), "decode_prompt_tokens": DECODE_PROMPT},
        machine=_machine(),
        version=package_version(),
    )


def compare_patterns(zeros: Mapping[str, ZeroPattern]) -> Entry:
    """Compare the zeros of every pruned model with those of the first pruned one, position by position.

    Returns:
        ``reference``, the name of the first model that is not dense (``None`` where all are), and ``models``: for each
        other one ``is_equal``, counts of matrices and positions and the matrices that differ, or a ``note`` that says
        why nothing is compared (it is dense, or of another shape).
    """
    reference = next((name for name, pattern in zeros.items() if pattern.pattern != "dense"), None)
    others = [name for name in zeros if reference is not None and name != reference]
    return {
        "reference": reference,
        "models": {name: _comparison(zeros[reference], zeros[name]) for name in others if reference is not None},
    }


def _comparison(first: ZeroPattern, second: ZeroPattern) -> Entry:
    if second.pattern == "dense":
        return {"note": "it is dense: no zeros to compare"}
    try:
        compared = compare_zeros(first.path, second.path)
    except RequestError as refusal:
        return {"note": str(refusal)}
    positions = ("both", "only_first", "only_second")
    return {
        "is_equal": compared.is_equal,
        "matrices": len(compared.matrices),
        "equal_matrices": compared.equal_matrices,
        **{key: sum(getattr(matrix, key) for matrix in compared.matrices) for key in positions},
        "different": {m.name: {key: getattr(m, key) for key in positions} for m in compared.matrices if not m.is_equal},
    }


def _file_entry(zeros: ZeroPattern) -> Entry:
    """A model's entry from its files alone, with times yet to be filled in."""
    sizes = matrix_sizes(zeros.path)
    return {
        "path": str(zeros.path),
        "sparsity": zeros.sparsity,
        "pattern": zeros.pattern,
        "pattern_asked": pruned_to(zeros.path),
        "parameters": zeros.parameters,
        "nonzero_parameters": zeros.nonzero_parameters,
        "missing_parameters": list(zeros.missing),
        "bytes": zeros.bytes,
        "bytes_zstd": compressed_size(zeros.path),
        "dtype": zeros.dtype,
        "loads_in_transformers": None,
        "prefill_ms": None,
        "decode_ms": None,
        "prefill_semi_structured_ms": None,
        "semi_structured_note": "not run: times were not requested" if zeros.pattern == "2:4" else None,
        "matrices": {
            matrix.name: {
                "shape": list(matrix.shape), "zeros": matrix.zeros, "sparsity": matrix.sparsity,
                "pattern": matrix.pattern, "zero_rows": matrix.zero_rows, "zero_columns": matrix.zero_columns,
                "bytes": sizes[matrix.name][0], "bytes_zstd": sizes[matrix.name][1],
            }
            for matrix in zeros.matrices
        },
    }  # fmt: skip


def _add_times(models: dict[str, Entry], paths: Mapping[str, Path], config: SpeedConfig) -> Entry:
    """Add measured times to the models' entries and return the ratios."""
    two_of_four = [name for name, entry in models.items() if entry["pattern"] == "2:4"]
    speed = measure_speed(paths, config, semi_structured=two_of_four)
    for name, times in speed.milliseconds.items():
        models[name] |= {f"{kind}_ms": summary for kind, summary in times.items()}
        models[name] |= {"loads_in_transformers": True, "semi_structured_note": speed.notes.get(name)}
    return speed.ratios


def _machine() -> Entry:
    """The device and versions that the times were measured with."""
    import transformers

    device = default_device()
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
