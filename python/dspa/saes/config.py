"""How to train an SAE."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SAETrainingConfig:
    """How to train.

    Attributes:
        n_tokens: rows to train on, rounded down to whole batches; the file is read again where it holds fewer.
        batch_size: rows a step.
        lr: Adam's rate, warmed up over the first twentieth of the steps, and decayed to 0 over the last fifth.
        dead_feature_window: steps without activity after which a latent is dead, and trained to explain errors.
        max_length: tokens of a document that are read, or the model's context where that is shorter.
        exclude_special_tokens: train and report on other tokens alone. The first token, in Gemma models and others, is
            a massive outlier that would rule loss and explained variance; SAELens keeps it unless told otherwise.
        held_out_tokens: documents at the start of the file with so many tokens are never trained on.
        buffer_tokens: rows that are shuffled together, and held in memory. The file is read in its order, so a file
            that is sorted should be shuffled first.
        batch_tokens: padded tokens a forward pass of the model.
        checkpoint_every: steps.
        seed: of the order of the rows, and of the weights of a new SAE.

    Raises:
        ValueError: a number that is too small, or fewer tokens than a batch.
    """

    n_tokens: int = 50_000_000
    batch_size: int = 4096
    lr: float = 3e-4
    dead_feature_window: int = 1000
    max_length: int = 1024
    exclude_special_tokens: bool = True
    held_out_tokens: int = 16_384
    buffer_tokens: int = 65_536
    batch_tokens: int = 8192
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in ("seed", "exclude_special_tokens")):
                raise ValueError(f"`{name}` is {value!r}; accepted: numbers above 0.")
        if self.n_tokens < self.batch_size:
            raise ValueError(
                f"`n_tokens` is {self.n_tokens}; accepted: one batch ({self.batch_size}) or more. Lower batch_size, or "
                "train for longer."
            )

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size
