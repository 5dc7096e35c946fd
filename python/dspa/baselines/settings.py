"""The settings that all trainings of baselines have."""

from __future__ import annotations

from dataclasses import field

from dspa.errors import refusal
from dspa.schemas import PositiveInt, Seed32, schema


@schema
class TrainingSettings:
    """Settings of batches, checkpoints and the log."""

    batch_size: PositiveInt = field(
        default=64, metadata={"help": "Examples per step of the optimizer, over all processes."}
    )
    micro_batch_size: PositiveInt = field(default=2, metadata={"help": "Examples per forward pass of a process."})
    max_length: PositiveInt = field(
        default=768,
        metadata={"help": "Tokens of instruction, prompt and response together to which a response is cut."},
    )
    seed: Seed32 = field(default=42, metadata={"help": "Seed of the order of the examples, and of all that is drawn."})
    checkpoint_every: PositiveInt = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    log_every: PositiveInt = field(default=10, metadata={"help": "Optimizer steps between two entries of the log."})

    def __post_init__(self) -> None:
        self.accumulation(1)

    def accumulation(self, processes: int) -> int:
        """Return the number of forward passes per process and step of the optimizer.

        Raises:
            ValueError: a `batch_size` that is not a multiple of what the processes read at once.
        """
        together = self.micro_batch_size * processes
        if self.batch_size % together:
            got = f"{self.batch_size}, and {processes} processes read {together} examples at once"
            raise refusal(ValueError, "`batch_size`", got, f"a multiple of {together}")
        return self.batch_size // together
