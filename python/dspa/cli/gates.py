"""Options of a gate: which tokens of an answer a method acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dspa.cli.options import FILES, Options, changed, messages_of_options
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.data.messages import Text
    from dspa.steering.decisions import EntropyGate, Gate

# Options that each gate takes besides those of all.
TAKEN = {
    "none": (),
    "entropy": ("--gate-threshold", "--gate-share", "--gate-top", "--gate-prompts"),
    "random": ("--gate-share", "--gate-seed"),
    "first": ("--gate-tokens",),
}


@dataclass(frozen=True)
class GateOptions:
    """Which tokens of an answer are steered."""

    gate: str = field(
        default="none",
        metadata={
            "help": "Tokens of an answer to steer.",
            "choices": {
                "none": "all",
                "entropy": "those before which the model was undecided",
                "random": "a random share",
                "first": "the first ones",
            },
        },
    )
    gate_threshold: float | None = field(
        default=None,
        metadata={"help": "Entropy in nats from which on the model counts as undecided; by default 1.", "min": 0},
    )
    gate_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of tokens that a random gate steers. For an entropy gate, in place of a threshold, the one "
            "that steers this share of the model's answers to `gate_prompts`.",
            "min": 0,
            "max": 1,
        },
    )
    gate_prompts: Path | None = field(
        default=None, metadata={"help": f"Prompts for `gate_share`: text, one per line, or {FILES} with `prompt`."}
    )
    gate_top: int = field(default=10, metadata={"help": "Number of logits whose entropy is taken.", "min": 2})
    gate_tokens: int | None = field(default=None, metadata={"help": "Number of first tokens.", "min": 1})
    gate_seed: int = field(default=0, metadata={"help": "Seed of a random gate.", "min": 0})
    gate_complement: bool = field(
        default=False, metadata={"help": "Steer the tokens that the gate leaves out instead."}
    )

    def __post_init__(self) -> None:
        given = [name for name in changed(self) if name not in ("--gate", *TAKEN[self.gate])]
        if self.gate != "none":
            given = [name for name in given if name != "--gate-complement"]
        if given:
            takers = [
                name for name, taken in TAKEN.items() if given[0] in (*taken, "--gate-complement") and name != "none"
            ]
            raise refusal(ValueError, given[0], f"given with --gate {self.gate}", f"--gate {' or '.join(takers)}")
        for gate, value, option in (("random", self.gate_share, "share"), ("first", self.gate_tokens, "tokens")):
            if self.gate == gate and value is None:
                raise refusal(ValueError, f"--gate {gate}", f"without --gate-{option}", "both")
        if self.gate == "entropy":
            if (self.gate_share is None) != (self.gate_prompts is None):
                accepted = "both, or a --gate-threshold"
                raise refusal(ValueError, "One of --gate-share and --gate-prompts", "missing", accepted)
            if self.gate_share is not None and self.gate_threshold is not None:
                raise refusal(ValueError, "--gate-share", "given with --gate-threshold", "one of them")
            self._by_entropy()

    def _by_entropy(self) -> EntropyGate:
        """Return the gate of a threshold."""
        from dspa.steering.decisions import EntropyGate

        with messages_of_options({"threshold": "--gate-threshold"}):
            return EntropyGate(1.0 if self.gate_threshold is None else self.gate_threshold, self.gate_top)

    def prompts(self) -> list[Text] | None:
        """Return the prompts for the share, None without them.

        Raises:
            ValueError: a file without prompts.
        """
        from dspa.data.prompts import read_prompt_file

        return None if self.gate_prompts is None else read_prompt_file("--gate-prompts", self.gate_prompts)

    def made(
        self,
        model: Any,
        tokenizer: Any,
        *,
        chat: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
        max_new_tokens: int | None,
    ) -> Gate | None:
        """Return the gate, None for none. A share of undecided tokens is measured on the model's greedy answers.

        Args:
            model: the model, to which nothing is attached.
            tokenizer: its tokenizer.
            chat: put prompts that are text into the chat template, as a user's turn.
            chat_template_kwargs: values of the chat template's variables by name, for conversations.
            max_new_tokens: largest number of tokens per answer.
        """
        from dspa.cli.tables import print_line
        from dspa.steering.decisions import FirstTokens, RandomGate

        made: Gate
        if self.gate == "none":
            return None
        if self.gate == "random":
            assert self.gate_share is not None
            made = RandomGate(self.gate_share, self.gate_seed)
        elif self.gate == "first":
            assert self.gate_tokens is not None
            made = FirstTokens(self.gate_tokens)
        elif (prompts := self.prompts()) is not None:
            from dspa.evaluate.compare.prompts import encode
            from dspa.evaluate.entropies import answer_entropies, gate_of_share

            assert self.gate_share is not None
            template: dict[str, Any] = {"chat": chat, "chat_template_kwargs": chat_template_kwargs}
            ids = [encode(tokenizer, prompt, "", **template) for prompt in prompts]
            entropies = answer_entropies(model, tokenizer, ids, k=self.gate_top, max_new_tokens=max_new_tokens)
            made = gate_of_share(entropies, self.gate_share, self.gate_top)
            print_line(f"The gate's threshold is {made.threshold:.6g} nats.")
        else:
            made = self._by_entropy()
        return made.complemented() if self.gate_complement else made


Gates = Annotated[GateOptions, Options("Gate")]
