"""Count, classify and compare the zeros of checkpoints, reading one tensor at a time from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.progress import track
from lcc_lens.models.architecture.layers import read_config, skeleton
from lcc_lens.models.architecture.linear_maps import STORED_DTYPES, Matrix, find_matrices
from lcc_lens.models.architecture.sparsity_patterns import common_pattern, detect_pattern

#: A fraction of zeros that weights may have by chance, rounding included.
_CHANCE = 0.01


@dataclass(frozen=True)
class MatrixZeros:
    """The zeros of one linear layer's weight inside a decoder layer."""

    name: str
    """The tensor's name in the checkpoint."""
    shape: tuple[int, int]
    """Outputs and inputs, whatever the stored layout."""
    zeros: int
    """Weights that are exactly zero."""
    pattern: str
    """``2:4``, ``4:8``, ``unstructured`` or ``dense``; see
    :func:`lcc_lens.models.architecture.sparsity_patterns.detect_pattern`."""
    zero_rows: int
    """Rows of zeros only: outputs that depend on no input."""
    zero_columns: int
    """Columns of zeros only: inputs that affect no output."""

    @property
    def parameters(self) -> int:
        """Weights in the matrix, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are zero."""
        return self.zeros / self.parameters


@dataclass(frozen=True)
class ZeroPattern:
    """The zeros of a whole checkpoint."""

    path: Path
    """The Hugging Face directory."""
    matrices: tuple[MatrixZeros, ...]
    """The weights of the linear layers inside the decoder layers, in layer order."""
    parameters: int
    """Stored parameters of the model, embeddings, norms and biases included; tied embeddings count once."""
    nonzero_parameters: int
    """Parameters that are not exactly zero."""
    bytes: int
    """Size of the weight files on disk."""
    dtype: str
    """Stored format of the matrices, such as ``bfloat16``; a list if they differ."""
    missing: tuple[str, ...]
    """Parameters for which the checkpoint holds no tensor: loading would fill them with random numbers."""

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights of the linear layers inside the decoder layers."""
        return fraction_of_zeros(self.matrices)

    @property
    def pattern(self) -> str:
        """The strictest pattern that holds in every matrix."""
        return common_pattern({matrix.pattern for matrix in self.matrices})


@dataclass(frozen=True)
class MatrixComparison:
    """How many positions of one matrix are zero in both checkpoints, or in only one."""

    name: str
    both: int
    only_first: int
    only_second: int

    @property
    def is_equal(self) -> bool:
        """Whether the same positions are zero in both."""
        return self.only_first == self.only_second == 0


@dataclass(frozen=True)
class ZeroComparison:
    """The zeros of two checkpoints of the same shape, position by position."""

    matrices: tuple[MatrixComparison, ...]

    @property
    def is_equal(self) -> bool:
        """Whether the same positions are zero in every matrix."""
        return self.equal_matrices == len(self.matrices)

    @property
    def equal_matrices(self) -> int:
        """How many matrices have the same positions zero in both."""
        return sum(matrix.is_equal for matrix in self.matrices)


def fraction_of_zeros(matrices: Sequence[MatrixZeros]) -> float:
    """The fraction of zeros among the weights of some matrices."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.parameters for matrix in matrices)


def matrix_zeros(path: Path) -> tuple[MatrixZeros, ...]:
    """Count the zeros of the linear layers inside a checkpoint's decoder layers (see :func:`zero_pattern`)."""
    matrices = [matrix for layer in find_matrices(Checkpoint(path)) for matrix in layer]
    return tuple(_matrix_zeros(matrix.name, matrix.read()) for matrix in track(matrices, len(matrices), "zeros"))


def refuse_swapped(dense: Path, pruned: Path) -> None:
    """Refuse two models of other sizes, or in the wrong order: the dense one has more zeros, or fewer weights.

    Zeros and weights are those of the middle layer.

    Raises:
        RequestError: says which model has the zeros, or how the two differ.
    """
    try:
        shapes = [_shape(path) for path in (dense, pruned)]
        sizes, fractions = zip(*(_middle_layer(Checkpoint(path)) for path in (dense, pruned)), strict=True)
    except RequestError:  # such as fused experts, whose zeros are not counted
        return
    other = "name the model that this one was pruned from"
    if shapes[0][1:] != shapes[1][1:]:
        got = " and ".join(
            f"{path} ({kind} of {n_layers} layers, {width} wide)"
            for path, (kind, n_layers, width) in zip((dense, pruned), shapes, strict=True)
        )
        raise RequestError(f"expected two models of the same shape, got {got}; {other}")
    if _is_swapped(sizes, fractions):
        helps = shapes[0] == shapes[1] and not _is_swapped(sizes[::-1], fractions[::-1])
        raise RequestError(
            f"expected the dense model before the pruned one, got {dense} with {fractions[0]:.0%} zeros in "
            f"{sizes[0]:,} weights of a layer, and {pruned} with {fractions[1]:.0%} in {sizes[1]:,}; "
            f"{'swap them' if helps else other}"
        )


def _is_swapped(sizes: Sequence[int], fractions: Sequence[float]) -> bool:
    """Whether the first model of two has more zeros than the second, or fewer weights."""
    return fractions[0] > fractions[1] + _CHANCE or sizes[0] < sizes[1]


def _shape(path: Path) -> tuple[str, int | None, int | None]:
    """A model's architecture, its number of layers, and the width of its residual stream."""
    config = read_config(path).get_text_config()
    return config.model_type, *(getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))


def _middle_layer(checkpoint: Checkpoint) -> tuple[int, float]:
    """How many weights the middle layer's matrices have, and the fraction of them that is zero."""
    plan = find_matrices(checkpoint)
    weights = [matrix.read() for matrix in plan[len(plan) // 2]]
    size = sum(weight.numel() for weight in weights)
    return size, sum(int((weight == 0).sum()) for weight in weights) / size


def zero_pattern(path: Path) -> ZeroPattern:
    """Count the zeros of any checkpoint: sharded or not, in any float format, with tied embeddings or not.

    No model runs; the weights are read from disk, with one tensor in memory at a time.

    Args:
        path: a local Hugging Face directory with safetensors.

    Raises:
        RequestError: the checkpoint is unreadable, quantised, or of an architecture that is not supported.

    Example:
        >>> zero_pattern(Path("out/wanda50")).sparsity  # doctest: +SKIP
        0.5
    """
    checkpoint = Checkpoint(path)
    matrices = matrix_zeros(path)
    stored, missing = _stored_parameters(checkpoint)
    dtypes = {checkpoint.tensors[matrix.name].dtype for matrix in matrices}
    parameters, zeros = (sum(getattr(matrix, name) for matrix in matrices) for name in ("parameters", "zeros"))
    for name in stored - {matrix.name for matrix in matrices}:
        tensor = checkpoint.read(name)
        parameters, zeros = parameters + tensor.numel(), zeros + int((tensor == 0).sum())
    return ZeroPattern(
        path=path,
        matrices=matrices,
        parameters=parameters,
        nonzero_parameters=parameters - zeros,
        bytes=checkpoint.n_bytes,
        dtype=", ".join(sorted(str(STORED_DTYPES[dtype]).removeprefix("torch.") for dtype in dtypes)),
        missing=missing,
    )


def compare_zeros(first: Path, second: Path) -> ZeroComparison:
    """Compare the zeros of two checkpoints position by position, two tensors in memory at a time.

    Args:
        second: another one, with matrices of the same names and shapes.
    """
    ours, theirs = ({m.name: m for layer in find_matrices(Checkpoint(path)) for m in layer} for path in (first, second))
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise RequestError(
            f"expected matrices of the same names in {first} and {second}, got {alone[0]} in only one; "
            "compare two versions of the same model"
        )
    return ZeroComparison(tuple(_compare(ours[name], theirs[name]) for name in ours))


def _matrix_zeros(name: str, rows: Float[Tensor, "out in"]) -> MatrixZeros:
    zeros = rows == 0
    n_rows, n_columns = int(zeros.all(dim=1).sum()), int(zeros.all(dim=0).sum())
    return MatrixZeros(name, (len(rows), rows.shape[1]), int(zeros.sum()), detect_pattern(rows), n_rows, n_columns)


def _compare(first: Matrix, second: Matrix) -> MatrixComparison:
    ours, theirs = first.read() == 0, second.read() == 0
    if ours.shape != theirs.shape:
        raise RequestError(
            f"expected {first.name} of the same shape in both, got {tuple(ours.shape)} and {tuple(theirs.shape)}; "
            "compare models of one shape (a sliced model's matrices are smaller)"
        )
    counts = (int(where.sum()) for where in (ours & theirs, ours & ~theirs, theirs & ~ours))
    return MatrixComparison(first.name, *counts)


def _stored_parameters(checkpoint: Checkpoint) -> tuple[set[str], tuple[str, ...]]:
    """The names of the tensors that hold the model's parameters, each once, and of the parameters that none holds.

    Tied embeddings that are stored twice, and buffers such as GPT-2's causal mask, add no parameters.
    """
    model = skeleton(checkpoint.path, read_config(checkpoint.path))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = dict(model.named_parameters(remove_duplicate=False))
    stored: dict[int, str] = {}
    for name in checkpoint.tensors:
        # Saved from the base model, as the original GPT-2 is, a checkpoint's names lack the base model's prefix.
        parameter = known.get(name, known.get(prefix + name))
        if parameter is not None:
            stored.setdefault(id(parameter), name)
    missing = tuple(name for name, parameter in model.named_parameters() if id(parameter) not in stored)
    return set(stored.values()), missing
