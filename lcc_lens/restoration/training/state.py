"""The state of a training run, saved atomically for resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, write_sealed
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.data.batches import TokenSequence
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.config import TrainConfig

CHECKPOINT = "checkpoint.safetensors"
_BUCKET = 8  # sequences are sorted by length within this many batches: less padding, still a random order


class TrainingState:
    """State of a run: parameters, optimiser, schedule, position, best so far."""

    def __init__(self, injection: Injection, config: TrainConfig, *, n_sequences: int, identity: str) -> None:
        self.injection, self.config = injection, config
        self.n_sequences = n_sequences
        self.identity = fingerprint(config, n_sequences, identity)
        self.rates = learning_rates(injection, config.lr)
        groups = [
            {"params": [n for n in part.parameters() if n.requires_grad], "lr": rate}
            for part, rate in zip(_trained_parts(injection), self.rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.n_steps = config.n_steps(n_sequences)
        self.step = self.n_worse = 0
        self.first_loss = self.best_loss = math.inf
        self.best = self._parameters()

    def remaining_batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        """The batches of all epochs in their fixed order, from the current step on."""
        order = [
            batch for epoch in range(self.config.epochs)
            for batch in epoch_batches(sequences, self.config.examples_per_step, self.config.seed + epoch)
        ]  # fmt: skip
        yield from order[self.step :]

    def begin_step(self) -> float:
        """Set the learning rates of the next step, with linear decay to zero after the last; returns the first."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - self.step / self.n_steps)
        return float(self.optimizer.param_groups[0]["lr"])

    def keep_best(self, loss: float) -> bool:
        """Store the current parameters if their loss is the lowest so far; returns whether it is."""
        self.n_worse += 1
        if not loss < self.best_loss:
            return False
        self.best_loss, self.best, self.n_worse = loss, self._parameters(), 0
        return True

    def restore_best(self) -> None:
        """Put the best parameters back into the injection."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.best[name])

    def save(self, run: Path) -> None:
        """Write one atomic file, after the last step of the best alone; only the first of several processes does."""
        if not is_first_process():
            return
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        if self.step < self.n_steps:
            tensors |= {f"now.{name}": value for name, value in self._parameters().items()}
            for name, parameter in self._trained():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"adam.{name}.{key}"] = value
        losses = {"first_loss": repr(self.first_loss), "best_loss": repr(self.best_loss)}
        record = {"step": str(self.step), "n_worse": str(self.n_worse), **losses, "identity": self.identity}
        write_sealed(run / CHECKPOINT, tensors, record)

    def load(self, run: Path | None) -> None:
        """Continue from the checkpoint."""
        if run is None or not (run / CHECKPOINT).exists():
            raise RequestError(f"expected a checkpoint to resume in {run}, got none; start without --resume")
        try:
            tensors, record = read_sealed(run / CHECKPOINT)
        except RequestError as error:
            raise RequestError(f"{error}, or start without --resume") from error
        if record.get("identity") != self.identity:
            raise RequestError(
                f"expected a checkpoint of the same models, data, heads and settings in {run}, got another run's; "
                "repeat its settings or start without --resume"
            )
        self.step, self.best_loss = int(record["step"]), float(record["best_loss"])
        self.n_worse = int(record.get("n_worse", "0"))
        self.first_loss = float(record.get("first_loss", "inf"))
        self.best = {name: tensors[f"best.{name}"] for name, _ in self._trained()}
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(tensors.get(f"now.{name}", self.best[name]))
                self.optimizer.state[parameter] = {  # moments on the parameter's device, the step count on the CPU
                    key.rsplit(".", 1)[1]: value.to(parameter.device) if value.ndim else value
                    for key, value in tensors.items()
                    if key.startswith(f"adam.{name}.")
                }

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.injection.named_parameters() if value.requires_grad]


def learning_rates(injection: Injection, lr: float | None) -> list[float]:
    """The learning rates of the parts that train: their own, or scaled so that the first one's is ``lr``."""
    rates = [part.default_lr for part in _trained_parts(injection)]
    scale = 1.0 if lr is None or not rates else lr / rates[0]
    return [rate * scale for rate in rates]


def _trained_parts(injection: Injection) -> list[Injection]:
    return [part for part in injection.parts if part.n_trained]


def epoch_batches(sequences: Sequence[TokenSequence], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches: random order, but similar lengths together so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    grouped: list[list[int]] = []
    for start in range(0, len(order), batch_size * _BUCKET):
        bucket = sorted(order[start : start + batch_size * _BUCKET], key=lambda i: len(sequences[i]))
        grouped += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [grouped[i] for i in torch.randperm(len(grouped), generator=generator).tolist()]
