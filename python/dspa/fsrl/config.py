"""The settings of an FSRL adapter and of its training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, field, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field, StrictFloat

from dspa.errors import refusal
from dspa.schemas import Accepts, Flag, NonNegative, OneOf, Positive, PositiveInt, Seed32, Text, schema

if TYPE_CHECKING:
    from dspa.data.triples import Example, Source

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")
# The losses, and the settings that only some of them have.
LOSSES = ("simpo", "dpo", "pro")
OF_LOSSES = {
    "beta": ("simpo", "dpo"),
    "gamma_beta_ratio": ("simpo",),
    "sft_weight": ("pro",),
    "plain": ("pro",),
}
USUAL_BETA = {"simpo": 10.0, "dpo": 0.1}
Lambda: TypeAlias = Annotated[NonNegative, Accepts("a finite number >= 0 (lambda; published: 0.02)")]
Warmup: TypeAlias = Annotated[StrictFloat, Field(ge=0, lt=1), Accepts("a fraction of the steps, from 0 to below 1")]


@schema
class FSRLConfig:
    """Settings of an adapter `v = act(h W_a + b_a)` on an SAE's latents; the defaults are the published ones.

    The activations are "soft_threshold" (sign(u) max(|u| - threshold, 0)), "relu", and "jumprelu" (u where
    u > threshold). The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: an invalid activation, a negative l1, a threshold or bandwidth that is not above 0.
    """

    activation: Annotated[str, OneOf(ACTIVATIONS)] = field(
        default="soft_threshold",
        metadata={"help": "Activation function that makes the vector v of an adapter sparse.", "choices": ACTIVATIONS},
    )
    initial_threshold: Positive = field(
        default=1e-6,
        metadata={"help": "First threshold of every latent, and bound of the first W_a, which is uniform within it."},
    )
    l1: Lambda = field(
        default=2e-2,
        metadata={
            "help": "Weight lambda of the sparsity penalty in the loss, the mean L1 norm of v per response token."
        },
    )
    bandwidth: Positive = field(
        default=1e-3,
        metadata={"help": "Bandwidth of the straight-through estimate by which a JumpReLU's thresholds learn."},
    )
    seed: Seed32 = field(default=0, metadata={"help": "Seed of the adapter's first weights."})


@schema
class TrainingConfig:
    """Settings of a training by AdamW with betas (0.9, 0.98); the defaults are the published ones.

    The model computes in the dtype that it was loaded in, published: bfloat16. The adapter is trained in fp32. The
    losses are "simpo" (arXiv 2405.14734), "dpo" (arXiv 2305.18290), whose reference is the model without the adapter,
    and "pro" (arXiv 2306.17492), which learns from rankings. Each epoch leaves out the triples or rankings that do not
    fill a micro-batch for every process, other ones each time. The metadata of each field hold its help, and its
    choices where it has some.

    Raises:
        ValueError: an invalid loss, a setting of another loss, a number out of its range, a micro-batch that does not
            divide the batch.
    """

    loss: Annotated[str, OneOf(LOSSES)] = field(
        default="simpo",
        metadata={
            "help": "Preference loss. pro learns from rankings, whose rows have a prompt, responses and rewards.",
            "choices": LOSSES,
        },
    )
    beta: Positive | None = field(
        default=None, metadata={"help": "Beta of the loss, by default 10 for simpo and 0.1 for dpo."}
    )
    gamma_beta_ratio: NonNegative = field(
        default=0.5, metadata={"help": "SimPO's margin gamma, as a fraction of beta."}
    )
    sft_weight: NonNegative = field(
        default=0.05,
        metadata={"help": "Weight of PRO's SFT term, the best response's log-probability times (responses - 1)^2."},
    )
    plain: Flag = field(
        default=False,
        metadata={
            "help": "Compute PRO with T = 1 in place of differences of rewards. Responses without rewards are then "
            "taken to be in order, the best first."
        },
    )
    lr: Positive = field(
        default=5e-5, metadata={"help": "Peak learning rate, after the warm-up and before a cosine decay."}
    )
    warmup: Warmup = field(
        default=0.01, metadata={"help": "Fraction of the steps over which the learning rate rises from 0."}
    )
    max_grad_norm: Positive = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    batch_size: PositiveInt = field(
        default=32, metadata={"help": "Triples or rankings per step of the optimizer, over all processes."}
    )
    micro_batch_size: PositiveInt = field(default=2, metadata={"help": "Triples or rankings per pass of a process."})
    epochs: Positive = field(default=1.0, metadata={"help": "Number of passes over the data; may be a fraction."})
    max_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Optimizer steps after which to stop, if `epochs` do not end before."}
    )
    max_length: PositiveInt = field(
        default=1024,
        metadata={
            "help": "Tokens of prompt and response together to which a response is cut, at most the model's context."
        },
    )
    gradient_checkpointing: Flag = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    seed: Seed32 = field(default=0, metadata={"help": "Seed of the order of the data."})
    checkpoint_every: PositiveInt = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    eval_every: PositiveInt = field(
        default=100, metadata={"help": "Optimizer steps between two evaluations on the held-out data."}
    )
    log_every: PositiveInt = field(default=10, metadata={"help": "Optimizer steps between two entries of the log."})
    report_to: Text = field(
        default="none",
        metadata={"help": "Tracker to log to, of those that transformers supports, such as wandb or tensorboard."},
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            losses = OF_LOSSES.get(setting.name, LOSSES)
            value = getattr(self, setting.name)
            if self.loss not in losses and value != setting.default:
                got, accepted = f"{value} for `loss` {self.loss}", f"none, except for {' and '.join(losses)}"
                raise refusal(ValueError, f"`{setting.name}`", got, accepted, "Leave it out.")
        self.accumulation(1)
        _check_tracker(self.report_to)

    @property
    def preference_beta(self) -> float:
        """`beta` of SimPO or DPO, or the usual one of the loss."""
        return USUAL_BETA[self.loss] if self.beta is None else self.beta

    @property
    def noun(self) -> str:
        """The kind of example that the loss learns from, "triple" or "ranking"."""
        return "ranking" if self.loss == "pro" else "triple"

    def load(self, source: Source) -> Iterator[Example]:
        """Read what the loss learns from, by `load_triples` or `load_rankings`."""
        from dspa.data.triples import load_rankings, load_triples

        return load_rankings(source, plain=self.plain) if self.loss == "pro" else load_triples(source)

    def recorded(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        settings = {name: value for name, value in asdict(self).items() if self.loss in OF_LOSSES.get(name, LOSSES)}
        return settings | ({"beta": self.preference_beta} if "beta" in settings else {})

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
