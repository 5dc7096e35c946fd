"""Rankings by register: the two answers of each triple, and two that the model gives without an instruction.

`python -m dspa.demo.smollm2.rankings FOLDER` writes them as JSON Lines, for the map's prompts and the held-out ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.messages import Message, content_of
from dspa.data.triples import Triple, load_triples
from dspa.demo.smollm2.preferences import BATCH_SIZE, FORMAL, REGISTER, sample_answers
from dspa.models.layers import CausalLM

N_SAMPLED = 2
# Batches may draw an empty answer or the same one twice, and are then drawn again.
MAX_DRAWS = 10
# Markers per unit of reward. PRO's exponents are log-probabilities per token times differences of rewards, and vanish
# in its epsilon below -23.
MARKERS = 4.0


def write_rankings(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, part: Literal["map", "heldout"], path: Path, *, seed: int = 0
) -> None:
    """Write the rankings of the register's prompts: a response's reward is its count of the own register / `MARKERS`.

    The same seed gives the same file on one machine and one version of torch.
    """
    triples = list(load_triples(REGISTER.path(part)))
    with path.open("w", encoding="utf-8") as file, tqdm(total=len(triples), unit="prompt", desc=path.name) as bar:
        for start in range(0, len(triples), BATCH_SIZE):
            torch.manual_seed(seed + start)
            for ranking in _rankings(model, tokenizer, triples[start : start + BATCH_SIZE]):
                file.write(json.dumps(ranking) + "\n")
                bar.update()


def _rankings(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, triples: Sequence[Triple]
) -> Iterator[dict[str, Any]]:
    answers = [[content_of(response[0]) for response in (t.chosen, t.rejected)] for t in triples]  # type: ignore[arg-type]
    for _ in range(MAX_DRAWS):
        short = [n for n, texts in enumerate(answers) if len(texts) < 2 + N_SAMPLED]
        if not short:
            break
        prompts: list[list[Message]] = [triples[n].prompt for n in short]  # type: ignore[misc]
        for n, text in zip(short, sample_answers(model, tokenizer, prompts, FORMAL.max_new_tokens), strict=True):
            if text and text not in answers[n]:
                answers[n].append(text)
    for triple, texts in zip(triples, answers, strict=True):
        prompt = content_of(triple.prompt[0])  # type: ignore[arg-type]
        yield {
            "prompt": triple.prompt,
            "responses": [[{"role": "assistant", "content": text}] for text in texts],
            "rewards": [REGISTER.count(prompt, text) / MARKERS for text in texts],
        }


if __name__ == "__main__":
    from dspa.demo.smollm2.model import load

    folder = Path(sys.argv[1])
    for name, part in (("train", "map"), ("heldout", "heldout")):
        write_rankings(*load(), part, folder / f"rankings-{name}.jsonl")  # type: ignore[arg-type]
