"""What an adapter is, and how strongly it is kept sparse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The loss and its usual beta.
LOSSES = {"simpo": 10.0, "dpo": 0.1}
ABOVE_0 = ("beta", "lr", "max_grad_norm", "epochs")
WHOLE = ("batch_size", "micro_batch_size", "max_steps", "max_length", "checkpoint_every", "eval_every", "log_every")

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")


@dataclass(frozen=True)
class FSRLConfig:
    """An adapter `v = act(h W_a + b_a)` on the latents of an SAE; the defaults are the published settings.

    Attributes:
        activation: "soft_threshold" (sign(u) max(|u| - threshold, 0)), "relu", or "jumprelu" (u where u > threshold).
        initial_threshold: the threshold of every latent at the start; W_a starts uniform within plus and minus this.
        l1: lambda, the weight of the mean over response tokens of sum_j |v_j|, in the loss.
        bandwidth: of the straight-through estimate by which a JumpReLU's thresholds learn.
        seed: of the start of W_a.

    Raises:
        ValueError: another activation, a negative l1, a threshold or bandwidth that is not above 0.
    """

    activation: str = "soft_threshold"
    initial_threshold: float = 1e-6
    l1: float = 2e-2
    bandwidth: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}.")
        for name in ("initial_threshold", "bandwidth", "l1"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "l1"):
                least = "a finite number >= 0 (lambda; published: 0.02)" if name == "l1" else "a finite number > 0"
                raise ValueError(f"`{name}` is {value!r}; accepted: {least}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` is {self.seed!r}; accepted: a whole number from 0 to 2**32 - 1.")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, by AdamW with betas (0.9, 0.98) and a cosine schedule; the defaults are the published settings.

    The model computes in the dtype that it was loaded in, published: bfloat16. The adapter is trained in fp32.

    Attributes:
        loss: "simpo" (arXiv 2405.14734) or "dpo" (arXiv 2305.18290), whose reference is the model without the adapter.
        beta: of the loss; None for 10 (simpo) or 0.1 (dpo).
        gamma_beta_ratio: SimPO's margin, as a part of beta.
        lr: the highest rate.
        warmup: part of the steps over which the rate rises, from 0 at the first step.
        max_grad_norm: to which gradients are clipped.
        batch_size: triples a step of the optimizer, over all processes.
        micro_batch_size: triples a forward pass of a process. Of an epoch, those are left out that fill no such
            batch for every process: others in every epoch.
        epochs: passes over the triples, of which the last may be a part.
        max_steps: stop after so many steps of the optimizer, whatever `epochs` says.
        max_length: tokens of prompt and response, from which on responses are cut; the model's positions where those
            are fewer.
        gradient_checkpointing: run layers again in the backward pass, rather than keep what they computed.
        seed: of the order of the triples.
        checkpoint_every, eval_every, log_every: steps.
        report_to: a tracker that transformers knows ("wandb", "tensorboard"), or "none".

    Raises:
        ValueError: another loss, a number out of its range, a micro-batch that does not divide the batch.
    """

    loss: str = "simpo"
    beta: float | None = None
    gamma_beta_ratio: float = 0.5
    lr: float = 5e-5
    warmup: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 32
    micro_batch_size: int = 2
    epochs: float = 1.0
    max_steps: int | None = None
    max_length: int = 1024
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    eval_every: int = 100
    log_every: int = 10
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` is {self.loss!r}; accepted: {', '.join(LOSSES)}.")
        for name in ABOVE_0:
            self._check(name, (int, float), lambda value: 0 < value < math.inf, "a finite number > 0")
        for name in WHOLE:
            self._check(name, int, lambda value: value >= 1, "a whole number >= 1")
        self._check("seed", int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
        self._check("gamma_beta_ratio", (int, float), lambda value: 0 <= value < math.inf, "a finite number >= 0")
        self._check("warmup", (int, float), lambda value: 0 <= value < 1, "a part of the steps, from 0 to below 1")
        self.accumulation(1)
        _check_tracker(self.report_to)

    def _check(self, name: str, kind: Any, right: Callable[[Any], bool], accepted: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("beta", "max_steps"):
            return
        if not isinstance(value, kind) or isinstance(value, bool) or not right(value):
            raise ValueError(f"`{name}` is {value!r}; accepted: {accepted}.")

    @property
    def preference_beta(self) -> float:
        """`beta`, or the usual one of the loss."""
        return LOSSES[self.loss] if self.beta is None else self.beta

    def accumulation(self, processes: int) -> int:
        """Forward passes of each of so many processes a step of the optimizer.

        Raises `ValueError` where `batch_size` is no whole number of them.
        """
        together = self.micro_batch_size * processes
        if self.batch_size % together:
            parts = f"micro_batch_size {self.micro_batch_size}" + (f" x {processes} processes" if processes > 1 else "")
            raise ValueError(
                f"`batch_size` is {self.batch_size}, which {parts} does not divide; accepted: a multiple of {together}."
            )
        return self.batch_size // together


def _check_tracker(name: str) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = ["none", *get_available_reporting_integrations()]
    if name not in known:
        raise ValueError(f"`report_to` is {name!r}; accepted here: {', '.join(known)}. Others have to be installed.")
