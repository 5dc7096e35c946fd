"""The settings of an FSRL adapter and of its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dspa.errors import refusal

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")
# The loss and its usual beta.
LOSSES = {"simpo": 10.0, "dpo": 0.1}
ABOVE_0 = ("beta", "lr", "max_grad_norm", "epochs")
WHOLE = ("batch_size", "micro_batch_size", "max_steps", "max_length", "checkpoint_every", "eval_every", "log_every")
SEEDS = "a whole number from 0 to 2**32 - 1"


@dataclass(frozen=True)
class FSRLConfig:
    """Settings of an adapter `v = act(h W_a + b_a)` on an SAE's latents; the defaults are the published ones.

    The activations are "soft_threshold" (sign(u) max(|u| - threshold, 0)), "relu", and "jumprelu" (u where
    u > threshold). The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: an invalid activation, a negative l1, a threshold or bandwidth that is not above 0.
    """

    activation: str = field(
        default="soft_threshold",
        metadata={"help": "Activation function that makes the vector v of an adapter sparse.", "choices": ACTIVATIONS},
    )
    initial_threshold: float = field(
        default=1e-6,
        metadata={"help": "First threshold of every latent, and bound of the first W_a, which is uniform within it."},
    )
    l1: float = field(
        default=2e-2,
        metadata={
            "help": "Weight lambda of the sparsity penalty in the loss, the mean L1 norm of v per response token."
        },
    )
    bandwidth: float = field(
        default=1e-3,
        metadata={"help": "Bandwidth of the straight-through estimate by which a JumpReLU's thresholds learn."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the adapter's first weights."})

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise refusal(ValueError, "`activation`", repr(self.activation), ", ".join(ACTIVATIONS))
        for name in ("initial_threshold", "bandwidth", "l1"):
            value = getattr(self, name)
            is_finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_finite or value < 0 or (value == 0 and name != "l1"):
                least = "a finite number >= 0 (lambda; published: 0.02)" if name == "l1" else "a finite number > 0"
                raise refusal(ValueError, f"`{name}`", repr(value), least)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise refusal(ValueError, "`seed`", repr(self.seed), SEEDS)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training by AdamW with betas (0.9, 0.98); the defaults are the published ones.

    The model computes in the dtype that it was loaded in, published: bfloat16. The adapter is trained in fp32. The
    losses are "simpo" (arXiv 2405.14734) and "dpo" (arXiv 2305.18290), whose reference is the model without the
    adapter. Each epoch leaves out the triples that do not fill a micro-batch for every process, other ones each time.
    The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: an invalid loss, a number out of its range, a micro-batch that does not divide the batch.
    """

    loss: str = field(default="simpo", metadata={"help": "Preference loss.", "choices": tuple(LOSSES)})
    beta: float | None = field(
        default=None, metadata={"help": "Beta of the loss, by default 10 for simpo and 0.1 for dpo."}
    )
    gamma_beta_ratio: float = field(default=0.5, metadata={"help": "SimPO's margin gamma, as a fraction of beta."})
    lr: float = field(
        default=5e-5, metadata={"help": "Peak learning rate, after the warm-up and before a cosine decay."}
    )
    warmup: float = field(
        default=0.01, metadata={"help": "Fraction of the steps over which the learning rate rises from 0."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    batch_size: int = field(default=32, metadata={"help": "Triples per step of the optimizer, over all processes."})
    micro_batch_size: int = field(default=2, metadata={"help": "Triples per forward pass of a process."})
    epochs: float = field(default=1.0, metadata={"help": "Number of passes over the triples; may be a fraction."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps after which to stop, if `epochs` do not end before."}
    )
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Tokens of prompt and response together to which a response is cut, at most the model's context."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the triples."})
    checkpoint_every: int = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    eval_every: int = field(
        default=100, metadata={"help": "Optimizer steps between two evaluations on the held-out triples."}
    )
    log_every: int = field(default=10, metadata={"help": "Optimizer steps between two entries of the log."})
    report_to: str = field(
        default="none",
        metadata={"help": "Tracker to log to, of those that transformers supports, such as wandb or tensorboard."},
    )

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise refusal(ValueError, "`loss`", repr(self.loss), ", ".join(LOSSES))
        for name in ABOVE_0:
            self._check(name, (int, float), lambda value: 0 < value < math.inf, "a finite number > 0")
        for name in WHOLE:
            self._check(name, int, lambda value: value >= 1, "a whole number >= 1")
        self._check("seed", int, lambda value: 0 <= value < 2**32, SEEDS)
        self._check("gamma_beta_ratio", (int, float), lambda value: 0 <= value < math.inf, "a finite number >= 0")
        self._check("warmup", (int, float), lambda value: 0 <= value < 1, "a fraction of the steps, from 0 to below 1")
        self.accumulation(1)
        _check_tracker(self.report_to)

    def _check(self, name: str, kind: Any, is_valid: Callable[[Any], bool], accepted: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("beta", "max_steps"):
            return
        if not isinstance(value, kind) or isinstance(value, bool) or not is_valid(value):
            raise refusal(ValueError, f"`{name}`", repr(value), accepted)

    @property
    def preference_beta(self) -> float:
        """`beta`, or the usual one of the loss."""
        return LOSSES[self.loss] if self.beta is None else self.beta

    def accumulation(self, processes: int) -> int:
        """Return the number of forward passes per process and step of the optimizer.

        Raises:
            ValueError: a `batch_size` that is not a multiple of what the processes read at once.
        """
        together = self.micro_batch_size * processes
        if self.batch_size % together:
            parts = f"`micro_batch_size` {self.micro_batch_size}"
            if processes > 1:
                parts += f" x {processes} processes"
            raise refusal(
                ValueError,
                "`batch_size`",
                f"{self.batch_size}, which {parts} does not divide",
                f"a multiple of {together}",
            )
        return self.batch_size // together


def _check_tracker(name: str) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    trackers = ["none", *get_available_reporting_integrations()]
    if name not in trackers:
        raise refusal(
            ValueError, "`report_to`", repr(name), ", ".join(trackers), "Other trackers have to be installed first."
        )
