"""The settings of training an SAE."""

from __future__ import annotations

import math
from dataclasses import field, replace
from typing import Annotated

from dspa.errors import refusal
from dspa.schemas import Accepts, Flag, NonNegative, Positive, PositiveInt, Seed, schema

# Training and reports leave out tokens with more than this many times the median norm, by default. The first tokens of
# texts that SmolLM2-135M reads have 5 to 7 times the median norm at layer 8, and 100 times at layer 20.
MAX_NORM_RATIO = 4.0
RATIO = "a finite number >= 1, or 0"

# The learning rate by default: the published one for this width, which falls as 1 / sqrt(d_sae) (Gao et al. 2024), and
# what short trainings need above it. Measured at 76 and 244 steps, d_sae 2048: 3e-3 beat 1e-3, and 1e-2 at 76 steps.
REFERENCE_LR, REFERENCE_D_SAE, REFERENCE_STEPS, MAX_LR = 3e-4, 16_384, 3000, 5e-3


@schema
class SAETrainingConfig:
    """Settings of training an SAE; the metadata of each field hold its help.

    The first token of a text is a massive outlier that would rule loss and explained variance. In Gemma models and
    others it is a special token, and these are left out by default. In models without a BOS token, as Qwen's, it is any
    token, which its norm shows. SAELens keeps both by default. The file is read in its order, so a sorted file should
    be shuffled first.

    Raises:
        ValueError: a number that is out of range, or fewer tokens than a batch.
    """

    n_tokens: PositiveInt = field(
        default=50_000_000,
        metadata={"help": "Number of tokens to train on, in whole batches (a shorter file is read several times)."},
    )
    batch_size: PositiveInt = field(default=4096, metadata={"help": "Tokens per step."})
    lr: Positive | None = field(
        default=None,
        metadata={
            "help": "Highest learning rate, reached after a warm-up and kept until a final decay. By default 3e-4 * "
            "sqrt(16384 / d_sae), for a new SAE of fewer than 3000 steps times sqrt(3000 / steps), and at most 5e-3."
        },
    )
    dead_feature_window: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Steps without activity after which a latent is dead, and trained to explain errors. By default a "
            "tenth of the steps."
        },
    )
    max_length: PositiveInt = field(
        default=1024, metadata={"help": "Tokens to read per document, at most the context of the model."}
    )
    exclude_special_tokens: Flag = field(
        default=True, metadata={"help": "Leave special tokens out of the training and of the reports."}
    )
    max_norm_ratio: Annotated[NonNegative, Accepts(RATIO)] = field(
        default=MAX_NORM_RATIO,
        metadata={
            "help": "Leave tokens with more than this many times the median norm out of the training and of the "
            f"reports. 0 trains on all, and reports leave out those with more than {MAX_NORM_RATIO:.0f} times."
        },
    )
    held_out_tokens: PositiveInt = field(
        default=16_384,
        metadata={"help": "Number of tokens to report on, in the first documents of the file, never trained on."},
    )
    buffer_tokens: PositiveInt = field(
        default=65_536, metadata={"help": "Tokens that are shuffled together, in memory."}
    )
    batch_tokens: PositiveInt = field(default=8192, metadata={"help": "Padded tokens per forward pass of the model."})
    checkpoint_every: PositiveInt = field(default=500, metadata={"help": "Steps between two checkpoints."})
    seed: Seed = field(
        default=0, metadata={"help": "Seed of the order of the tokens, and of the weights of a new SAE."}
    )

    def __post_init__(self) -> None:
        # Below 1, most rows or all of them would be left out.
        if 0 < self.max_norm_ratio < 1:
            raise refusal(ValueError, "`max_norm_ratio`", self.max_norm_ratio, RATIO)
        if self.n_tokens < self.batch_size:
            raise refusal(
                ValueError,
                "`n_tokens`",
                self.n_tokens,
                f"one batch ({self.batch_size}) or more",
                "Lower `batch_size`, or train for longer.",
            )

    @property
    def n_steps(self) -> int:
        """Number of whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size

    @property
    def n_first_batches(self) -> int:
        """Number of batches by which a training decides how to begin: those of as many tokens as are held out."""
        return max(1, self.held_out_tokens // self.batch_size)

    def resolved(self, d_sae: int, *, new: bool) -> SAETrainingConfig:
        """Return these settings with the numbers that the default rules give.

        Args:
            d_sae: number of latents.
            new: True for a new SAE, False for one that is fine-tuned.
        """
        short = max(1.0, REFERENCE_STEPS / self.n_steps) if new else 1.0
        return replace(
            self,
            lr=self.lr or min(MAX_LR, REFERENCE_LR * math.sqrt(REFERENCE_D_SAE / d_sae * short)),
            dead_feature_window=self.dead_feature_window or max(1, self.n_steps // 10),
        )
