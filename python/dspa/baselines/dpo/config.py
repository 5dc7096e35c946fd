"""The settings of DPO."""

from __future__ import annotations

from dataclasses import field

from dspa.baselines.settings import TrainingSettings
from dspa.schemas import Flag, Fraction, Positive, PositiveInt, schema


@schema
class DPOSettings(TrainingSettings):
    """Settings of a training with DPO by AdamW; epochs, learning rate and beta are the published ones.

    The metadata of each field hold its help.

    Raises:
        ValueError: a number out of its range, a micro-batch that does not divide the batch.
    """

    lora: Flag = field(
        default=False,
        metadata={
            "help": "Train a LoRA on all linear layers, or all weights. A LoRA needs a higher learning rate, such as "
            "1e-4."
        },
    )
    beta: Positive = field(default=0.1, metadata={"help": "Weight of the distance to the model before the training."})
    lr: Positive = field(default=5e-6, metadata={"help": "Peak learning rate, before a linear decay."})
    warmup: Fraction = field(
        default=0.0, metadata={"help": "Fraction of the steps over which the learning rate rises from 0."}
    )
    epochs: Positive = field(default=1.0, metadata={"help": "Number of passes over the triples; may be a fraction."})
    batch_size: PositiveInt = field(
        default=32, metadata={"help": "Triples per step of the optimizer, over all processes."}
    )
    micro_batch_size: PositiveInt = field(default=2, metadata={"help": "Triples per forward pass of a process."})
    max_length: PositiveInt = field(
        default=1024, metadata={"help": "Tokens of prompt and response together to which a response is cut."}
    )
    gradient_checkpointing: Flag = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    rank: PositiveInt = field(default=16, metadata={"help": "Rank of the LoRA."})
    lora_alpha: PositiveInt = field(default=32, metadata={"help": "Alpha of the LoRA."})
