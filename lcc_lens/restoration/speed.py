"""What a machine takes for the parts of a restoration, from short measurements."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.checks import MIX
from lcc_lens.data.registry import fraction_of
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair
from lcc_lens.models.sampling import MOST_AT_ONCE, writing_seconds
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.settings import LOW_RANK, RefitRequest
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training.validation import validation_loss
from lcc_lens.restoration.training_data import n_validation

#: Fewest sequences that a refit is worth, and fewest blocks that training is worth.
FEWEST_REFITTED, FEWEST_TRAINED = 24, 16
#: A forward pass of a validation, with its losses and the dense model's logits, in plain forward passes.
_VALIDATED = 1.5
#: A refit's time per token, in forward passes of one model, and iterations of its solver per linear layer: as measured
#: on SmolLM2-135M.
_REFIT_PASSES, _REFIT_ITERATIONS = 4.4, 42


@dataclass(frozen=True)
class Speed:
    """What one machine takes for one pair, in seconds."""

    read: float
    """Per token of a forward pass of one model."""
    trained: float
    """Per token of an optimiser step, the dense model's pass included."""
    solved: float
    """Per iteration of the refit's solver over all linear layers."""
    loaded: float
    """To load both models."""
    step_written: float = 0.0
    """To sample one more token of a batch of texts, beside the time of each text."""
    text_written: float = 0.0
    """Per text of the batch."""

    def written(self, blocks: int, length: int) -> float:
        """To sample so many texts."""
        return length * (-(-blocks // MOST_AT_ONCE) * self.step_written + blocks * self.text_written)


@dataclass(frozen=True)
class Costs:
    """What the stages of a restoration take, in seconds.

    Args:
        speed: see :func:`measure_speed`.
        length: tokens of a block.
        n_measured: tokens that three models read at the end, to measure recovery.
        self_written: fraction of the training text that the dense model writes first.
        refit_self_written: of the refit's; ``batch_size``: blocks of an optimiser step, as in the settings.
    """

    speed: Speed
    length: int = 512
    n_measured: int = 0
    self_written: float = 0.2
    refit_self_written: float = fraction_of("self", MIX)
    batch_size: int | None = None

    def refit(self, samples: int) -> float:
        """A refit on so many sequences; none takes none."""
        if not samples:
            return 0.0
        written = self._written(self.refit_self_written, samples)
        return refit_seconds(self.speed, samples * self.length) + written

    def train(self, blocks: int) -> float:
        """A training on so many blocks, with its validations and the losses that are measured before and after it."""
        config = TrainConfig(batch_size=self.batch_size)
        n_passes = _VALIDATED * (3 + config.n_steps(blocks) // config.steps_per_validation) + 4
        validated = n_passes * n_validation(blocks) * self.length * self.speed.read
        return blocks * self.length * self.speed.trained + validated

    def write(self, blocks: int) -> float:
        """The dense model's writing of its part of so many blocks to train on."""
        return self._written(self.self_written, blocks)

    @property
    def least_written(self) -> float:
        """The dense model's writing for the smallest refit and the smallest training."""
        return self.write(FEWEST_TRAINED) + self._written(self.refit_self_written, FEWEST_REFITTED)

    def without_writing(self) -> Costs:
        """The costs where the dense model writes nothing."""
        return replace(self, self_written=0.0, refit_self_written=0.0)

    def _written(self, fraction: float, texts: int) -> float:
        return self.speed.written(math.ceil(fraction * texts), self.length)

    def measure(self) -> float:
        """What follows the training."""
        return 3 * self.n_measured * self.speed.read + self.speed.loaded


def measure_speed(pair: Pair, spec: MethodSpec, config: TrainConfig, length: int, loaded: float = 0.0) -> Speed:
    """Time a forward pass, an optimiser step, a product of the refit's solver and sampling, on random tokens."""
    sequences = _random_sequences(pair, length)
    short = replace(
        config, epochs=3, batch_size=len(sequences), validate_every=10**6, checkpoint_every=10**6, patience=None,
        reuse=False,
    )  # fmt: skip
    read = _read_seconds(pair, sequences, config.micro_tokens)
    injection = spec.build(
        Ingredients.of(pair, None, (), sequences=sequences, low_rank=spec.preset.low_rank or LOW_RANK)
    )
    teacher = pair.dense if config.objective.needs_teacher else None
    # the validation after the last step counts to neither
    step = next(itertools.islice(train(pair.pruned, injection, sequences, sequences, short, teacher=teacher), 1, None))
    trained = step.seconds / (len(sequences) * length)
    return Speed(read, trained, _solver_seconds(pair), loaded, *writing_seconds(plain_model(pair.dense)))


def refit_seconds(speed: Speed, n_tokens: int) -> float:
    """Seconds of a refit on so many tokens."""
    return _REFIT_ITERATIONS * speed.solved + _REFIT_PASSES * n_tokens * speed.read


def time_refit(pair: Pair, request: RefitRequest) -> float:
    """Seconds that a refit would take here, from a forward pass on random tokens and a product of its solver."""
    length = fitting_length(request.seq_len, pair.context)
    read = _read_seconds(pair, _random_sequences(pair, length))
    return refit_seconds(Speed(read, 0.0, _solver_seconds(pair), 0.0), request.n_samples * length)


def _random_sequences(pair: Pair, length: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    return [TokenSequence(row, 1) for row in torch.randint(pair.pruned.cfg.d_vocab, (2, length), generator=generator)]


def _read_seconds(pair: Pair, sequences: Sequence[TokenSequence], micro_tokens: int | None = None) -> float:
    """Seconds per token of a forward pass of the dense model, after one to warm up."""
    validation_loss(pair.dense, None, sequences, micro_tokens)
    with timed() as reading:
        validation_loss(pair.dense, None, sequences, micro_tokens)
    return reading() / sum(map(len, sequences))


def _solver_seconds(pair: Pair) -> float:
    """Seconds of one iteration of the refit's solver in every linear layer: a product of weights and second moments."""
    shapes = [(m.d_out, m.d_in) for layer in find_matrices(Checkpoint(pair.pruned_id.path)) for m in layer]
    seconds = {}
    for d_out, d_in in set(shapes):
        weight, moments = (torch.ones(n, d_in, device=device_of(pair.pruned)) for n in (d_out, d_in))
        weight @ moments
        with timed() as taken:
            float((weight @ moments)[0, 0])  # waits for a GPU
        seconds[d_out, d_in] = taken()
    return sum(seconds[shape] for shape in shapes)


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that says, after the block, how many seconds it took."""
    start = end = time.perf_counter()
    yield lambda: end - start
    end = time.perf_counter()
