"""Rankings: several responses to one prompt, with a reward each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspa.data.messages import Text, check_example, type_name
from dspa.errors import PreferenceError, refusal

UNNAMED = "ranking"
# The names that data sets have for responses and their rewards, the first one ours, and for those of a pair.
NAMES = {"responses": "rewards", "all_generated_responses": "all_rm_scores"}
PAIRED = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
REWARDS = "one finite number per response"


@dataclass(frozen=True)
class Ranking:
    """A prompt, two or more responses to it in any order, and a reward of each, larger for a better one.

    Attributes:
        prompt: text, or a list of messages `{"role": ..., "content": ...}`.
        responses: all text, or all lists of messages, as the prompt. They hold only what follows the prompt.
        rewards: one number per response. Some may be equal, but not all.
        name: what errors call the ranking, such as "ranked.jsonl line 12". Comparisons ignore it.
        tools: JSON schemas of functions, for the chat template. None without tools.
        chat_template_kwargs: values of the chat template's variables by name.

    Raises:
        PreferenceError: fewer than two responses, rewards of another number, that are not finite or all equal, or
            what a `Triple` refuses.
    """

    prompt: Text
    responses: Sequence[Text]
    rewards: Sequence[float]
    name: str = field(default=UNNAMED, compare=False)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `PreferenceError` for invalid fields."""
        if len(self.responses) < 2:
            got, accepted = f"{len(self.responses)} of them", "two or more"
            raise refusal(PreferenceError, f"{self.name}: `responses`", got, accepted, "Remove the example.")
        check_example(self.name, self.prompt, self.named_responses, self.tools, self.chat_template_kwargs)
        what = f"{self.name}: `rewards`"
        if len(self.rewards) != len(self.responses):
            got = f"{len(self.rewards)} numbers for {len(self.responses)} responses"
            raise refusal(PreferenceError, what, got, REWARDS, "Add or remove some.")
        for number, reward in enumerate(self.rewards):
            if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
                raise refusal(PreferenceError, f"{self.name}: `rewards[{number}]`", repr(reward)[:60], REWARDS)
        if len(set(self.rewards)) == 1:
            got = f"all {self.rewards[0]}, which prefers nothing"
            raise refusal(PreferenceError, what, got, "two different ones or more", "Remove the example.")

    @property
    def named_responses(self) -> dict[str, Text]:
        """The responses by what errors call them."""
        return {f"responses[{number}]": response for number, response in enumerate(self.responses)}

    @property
    def extremes(self) -> tuple[Text, Text]:
        """The best response and the worst one, of equal ones the first."""
        best, worst = (self.rewards.index(reward) for reward in (max(self.rewards), min(self.rewards)))
        return self.responses[best], self.responses[worst]


def is_ranking(entry: Mapping[str, Any]) -> bool:
    """Return True for a raw entry with a list of responses."""
    return any(name in entry for name in NAMES)


def parse_ranking(name: str, entry: Mapping[str, Any], prompt: Text | None, tools: Any, *, plain: bool) -> Ranking:
    """Return the validated ranking of a raw entry that `is_ranking`.

    Args:
        name: what errors call it.
        entry: the entry.
        prompt: its prompt, None where it has none.
        tools: its tools.
        plain: accept responses without rewards, from the best to the worst.

    Raises:
        PreferenceError: an invalid ranking.
    """
    key = next(name for name in NAMES if name in entry)
    responses, rewards = entry[key], entry.get(NAMES[key])
    if prompt is None:
        raise refusal(PreferenceError, name, "without 'prompt'", f"an object with 'prompt' and '{key}'", "Add it.")
    if not isinstance(responses, list):
        got, accepted = f"of type {type_name(responses)}", "a list of texts, or of lists of messages"
        raise refusal(PreferenceError, f"{name}: `{key}`", got, accepted, "Convert it.")
    if rewards is None:
        rewards = falling_rewards(name, NAMES[key], len(responses), plain=plain)
    if not isinstance(rewards, list):
        raise refusal(
            PreferenceError, f"{name}: `{NAMES[key]}`", f"of type {type_name(rewards)}", REWARDS, "Convert it."
        )
    if isinstance(prompt, list):
        # A text after messages is the assistant's.
        responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    return Ranking(prompt, responses, rewards, name, tools, entry.get("chat_template_kwargs", {}))


def falling_rewards(name: str, key: str, n: int, *, plain: bool) -> list[float]:
    """Return rewards of `n` responses without any, which fall from the first to the last.

    Raises:
        PreferenceError: not `plain`.
    """
    if not plain:
        advice = "Add them. PRO also takes responses without, from the best to the worst, with `plain`."
        raise refusal(PreferenceError, name, f"without '{key}'", f"'{key}', {REWARDS}", advice)
    return [float(n - place) for place in range(n)]
