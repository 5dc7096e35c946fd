"""Entropies of a model's own answers, and the gate that lets a given share of their tokens through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal
from dspa.evaluate.generation import check_prompts, continue_prompts, end_tokens, sampling_arguments
from dspa.evaluate.responses import padded, teacher_forced
from dspa.models.layers import base_model, check_eval
from dspa.schemas import Fraction, check
from dspa.steering.decisions import EntropyGate, top_entropy


@torch.no_grad()
def answer_entropies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    k: int = 10,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[Tensor]:
    """Return the entropies of the logits from which the tokens of a model's answers were chosen, [N] per prompt.

    All that is attached to the model acts, but for gates that read logits, which are refused.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt.
        k: number of logits, as for `EntropyGate`.
        max_new_tokens: largest number of tokens per answer; None: as `check_prompts` chooses.
        temperature: 0 for greedy decoding.
        seed: of sampling.
        batch_size: number of answers that are generated together.
        progress: show a bar.

    Raises:
        ValueError: a prompt without text, or one that leaves no room.
        ModelError: a model in training mode, or a gate that reads logits.
    """
    inner = base_model(model)
    check_eval(inner)
    n_new = check_prompts(inner, prompts, max_new_tokens, special=set(tokenizer.all_special_ids))
    arguments = sampling_arguments(temperature) | {"max_new_tokens": n_new}
    ends, entropies = end_tokens(inner, tokenizer), list[Tensor]()
    torch.manual_seed(seed)
    with tqdm(total=len(prompts), unit="answer", desc="entropies", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = continue_prompts(inner, tokenizer, prompts[start : start + batch_size], ends, **arguments)
            with teacher_forced(inner, batch):
                logits = inner(**padded(inner, batch), use_cache=False).logits
            for row, response in zip(logits, batch, strict=True):
                entropies.append(top_entropy(row[len(response.prompt) - 1 : len(response) - 1], k).cpu())
            bar.update(len(batch))
    return entropies


def gate_of_share(entropies: Sequence[Tensor], share: float, k: int = 10) -> EntropyGate:
    """Return the gate that lets a share of the tokens of answers through, the most undecided.

    The first token of each answer counts among them, and the last entropy of an answer decides of no token.

    Args:
        entropies: of answers, as `answer_entropies` returns them.
        share: share of the tokens.
        k: the number of logits that they are of.

    Raises:
        ValueError: a share that is less than that of the first tokens, or no answers.
    """
    share = check(Fraction, share, ValueError, "`share`")
    n_tokens, n_first = sum(map(len, entropies)), len(entropies)
    if not n_tokens:
        raise refusal(ValueError, "`entropies`", "empty", "those of one answer or more")
    n_open = round(share * n_tokens) - n_first
    if n_open < 0:
        accepted = f"{n_first / n_tokens:.3g} to 1: the first token of each answer is always let through"
        raise refusal(ValueError, "`share`", share, accepted)
    # Halfway between two entropies: generation differs from what measured them in the last bits.
    decisive = torch.cat([row[:-1] for row in entropies]).sort(descending=True).values
    bounds = [math.log(k), *decisive.tolist(), 0.0]
    return EntropyGate(min((bounds[n_open] + bounds[n_open + 1]) / 2, math.log(k)), k)
