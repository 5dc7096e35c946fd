"""Preference triples that SmolLM2 writes itself: under contrasting instructions, which are then removed.

As RAHF contrasts a preferred and a dispreferred instruction (ACL 2024, acl-long.572, section 3.1). An instruction is a
system message and three turns that show the style. An answer is kept if it has the markers of its style, so that the
triples of a preference differ in what its markers count. `python -m dspa.demo.smollm2.preferences FOLDER` writes the
files that the package ships.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.config import SteeringConfig
from dspa.data.messages import Message
from dspa.data.prompts import tokenize_prompt
from dspa.demo.smollm2 import markers
from dspa.demo.smollm2.prompts import ASSETS, is_formal, letters, questions, split_tasks
from dspa.evaluate.generation import continue_prompts, decode, end_tokens
from dspa.models.layers import CausalLM
from dspa.schemas import read_json

N_MAP, N_HELD_OUT, N_HELD_OUT_TASKS = 250, 100, 30
# Batches of prompts without one triple after which styles are taken to be out of the model's reach.
MAX_BATCHES = 50
BATCH_SIZE = 32
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 1.0}


@dataclass(frozen=True)
class Style:
    """A way to answer.

    Attributes:
        instruction: the system message that asks for it.
        shown: turns that show it, question and answer.
        accepts: decides on an answer.
        max_new_tokens: largest number of tokens of an answer.
    """

    instruction: str
    shown: tuple[tuple[str, str], ...]
    accepts: Callable[[str], bool]
    max_new_tokens: int

    def messages(self, prompt: str) -> list[Message]:
        """Return a prompt under the instruction."""
        shown = [
            {"role": role, "content": text}
            for turn in self.shown
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return [{"role": "system", "content": self.instruction}, *shown, {"role": "user", "content": prompt}]


def _style(name: str, accepts: Callable[[str], bool]) -> Style:
    record = read_json(ASSETS / "styles.json", ValueError)[name]
    shown = tuple((question, answer) for question, answer in record["shown"])
    return Style(record["instruction"], shown, accepts, record["max_new_tokens"])


WARM = _style("warm", lambda answer: markers.count_warm(answer) >= 1 and markers.warm_and_structured("", answer) >= 3)
CURT = _style(
    "curt",
    lambda answer: not markers.count_warm(answer) and not markers.count_list_lines(answer) and "!" not in answer,
)
FORMAL = _style("formal", lambda answer: markers.register_balance(answer, "formal") >= 2)
CASUAL = _style("casual", lambda answer: markers.register_balance(answer, "casual") >= 2)


@dataclass(frozen=True)
class Preference:
    """A preference between two styles.

    Attributes:
        name: name of its files.
        wish: what is preferred, in a sentence.
        prompts: return a number of prompts about tasks, by a seed.
        chosen: the style that a prompt prefers.
        rejected: the other one.
        counted: name of what is counted in an answer; more is preferred.
        count: counts it, by prompt and answer.
        instruction: asks the base model for it.
        config: a setting of DSPA that suits SAEs of 2048 latents (docs/smollm2.md says how it was chosen).
    """

    name: str
    wish: str
    prompts: Callable[[list[str], int, int], list[str]]
    chosen: Callable[[str], Style]
    rejected: Callable[[str], Style]
    counted: str
    count: Callable[[str, str], float]
    instruction: str
    config: SteeringConfig

    def path(self, part: Literal["map", "heldout"]) -> Path:
        """Return the file of its triples for the map, or of the held-out ones."""
        return ASSETS / f"{self.name}-{part}.jsonl"


WARMTH = Preference(
    "warmth",
    "An answer should be warm and structured rather than curt.",
    questions,
    lambda _: WARM,
    lambda _: CURT,
    "warm words and list lines",
    markers.warm_and_structured,
    "Be warm, and answer in a numbered list.",
    SteeringConfig(alpha=0.5, k_diff=32),
)
REGISTER = Preference(
    "register",
    "A formal letter should get a formal answer, and a casual one a casual answer.",
    lambda tasks, n, seed: [letter.text for letter in letters(tasks, n, seed)],
    lambda prompt: FORMAL if is_formal(prompt) else CASUAL,
    lambda prompt: CASUAL if is_formal(prompt) else FORMAL,
    "markers of its register",
    markers.own_register,
    "Answer formal letters formally and casual ones casually.",
    SteeringConfig(alpha=0.5, k_diff=32),
)
PREFERENCES = (WARMTH, REGISTER)


def write_triples(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, preference: Preference, folder: Path, *, seed: int = 0
) -> None:
    """Write the triples for the map and the held-out ones, about other tasks, as JSON Lines.

    The same seed gives the same files on one machine and one version of torch.
    """
    learned, held_out = split_tasks(N_HELD_OUT_TASKS, seed)
    for name, tasks, n in (("map", learned, N_MAP), ("heldout", held_out, N_HELD_OUT)):
        path = folder / f"{preference.name}-{name}.jsonl"
        with path.open("w", encoding="utf-8") as file, tqdm(total=n, unit="triple", desc=path.name) as bar:
            for triple in _triples(model, tokenizer, preference, tasks, n, seed):
                file.write(json.dumps(triple) + "\n")
                file.flush()
                bar.update()


def _triples(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, preference: Preference, tasks: list[str], n: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield `n` triples of different prompts; a prompt whose answers are not both accepted is asked again later.

    Raises:
        RuntimeError: no more answers are accepted.
    """
    waiting, accepted, n_written = preference.prompts(tasks, 2 * n, seed), dict[tuple[str, bool], str](), 0
    n_without = 0
    for attempt in count():
        if n_without == MAX_BATCHES:
            raise RuntimeError(
                f"{n_without} batches of prompts gave no triple of {preference.name!r}: the model's answers lack "
                "the markers of its styles. Change the instructions, the turns that show them, or the rules."
            )
        batch = waiting[:BATCH_SIZE]
        torch.manual_seed(seed + attempt)
        for side, style_of in ((True, preference.chosen), (False, preference.rejected)):
            asked = [prompt for prompt in batch if (prompt, side) not in accepted]
            for style in dict.fromkeys(map(style_of, asked)):
                prompts = [prompt for prompt in asked if style_of(prompt) == style]
                for prompt, answer in zip(prompts, _answers(model, tokenizer, style, prompts), strict=True):
                    if len(answer.split()) >= 5 and style.accepts(answer) and not markers.repeats(answer):
                        accepted[prompt, side] = answer
        complete = [prompt for prompt in batch if {(prompt, True), (prompt, False)} <= accepted.keys()]
        for prompt in complete[: n - n_written]:
            yield {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": accepted[prompt, True]}],
                "rejected": [{"role": "assistant", "content": accepted[prompt, False]}],
            }
        n_written += len(complete)
        n_without = 0 if complete else n_without + 1
        if n_written >= n:
            return
        waiting = waiting[len(batch) :] + [prompt for prompt in batch if prompt not in complete]


def _answers(model: CausalLM, tokenizer: PreTrainedTokenizerBase, style: Style, prompts: Sequence[str]) -> list[str]:
    """Return one answer to each prompt in a style, up to its last whole sentence."""
    return sample_answers(model, tokenizer, [style.messages(prompt) for prompt in prompts], style.max_new_tokens)


def sample_answers(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[Message]], max_new_tokens: int
) -> list[str]:
    """Return one answer to each conversation, up to its last whole sentence."""
    ids = [tokenize_prompt(tokenizer, messages, chat=True) for messages in conversations]
    arguments = {"max_new_tokens": max_new_tokens, **SAMPLING}
    responses = continue_prompts(model, tokenizer, ids, end_tokens(model, tokenizer), **arguments)
    return [_whole_sentences(decode(tokenizer, response.ids)) for response in responses]


def _whole_sentences(text: str) -> str:
    """Return a text up to its last whole sentence or clause, or as it is if it has none."""
    ended = re.match(r"(?s).*[.!?,](?=\s|$)", text.strip())
    return ended[0] if ended else text.strip()


if __name__ == "__main__":
    from dspa.demo.smollm2.model import load

    for wanted in PREFERENCES:
        write_triples(*load(), wanted, Path(sys.argv[1]))
