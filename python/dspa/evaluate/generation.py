"""Generation after prompts, in batches: steered, and without steering to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from dspa.data.token_texts import token_pieces
from dspa.errors import ModelError, refusal
from dspa.evaluate.responses import Response
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, base_model, context_length, device_of
from dspa.steering.dspa import Steering, attached_steerings
from dspa.steering.gates import first_steered
from dspa.steering.joint import JointSteering
from dspa.steering.recorded import Recorded, attached_recorders

# Tokens per text where no number is given and the model has room for them.
MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Answer:
    """The text that a steered model wrote after one prompt.

    Attributes:
        prompt: the prompt.
        text: the text, without special tokens.
        base: what the model wrote with nothing attached, if that was asked for.
        edited: ranges of characters of `text` whose tokens were predicted from an edited residual, from the trace of a
            `Steering`.
        ids: token ids of `text`, with its end token.
    """

    prompt: str
    text: str
    base: str | None = None
    edited: tuple[tuple[int, int], ...] = ()
    ids: tuple[int, ...] = ()


def answer_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    attached: Sequence[Attachable | JointSteering],
    prompts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 1,
    compare: bool = False,
    stream: bool = False,
) -> Iterator[list[Answer]]:
    """Yield what a steered model writes after prompts, in their order, batch by batch.

    Greedy texts are those of one prompt at a time, as far as rounding goes. Prompts are read as they are needed, and
    one batch is held at a time.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        attached: all that steers, attached to the model. Traces are cleared before each batch.
        prompts: the prompts.
        encode: returns the token ids of a prompt.
        max_new_tokens: largest number of tokens per text; None: as `check_prompts` chooses for each batch.
        temperature: 0 for greedy decoding. Otherwise the draws depend on `batch_size`.
        top_p: as in a `GenerationConfig`; None for the model's own.
        seed: seed of the draws. The n-th prompt, if it is the first of a batch, is drawn with `seed + n`.
        batch_size: number of texts that are generated together.
        compare: also return what the model writes with nothing attached, and which tokens were edited.
        stream: print a text while it is generated. Needs a `batch_size` of 1.

    Raises:
        ModelError: something that is not attached, or a prompt for which nothing is steered.
        ValueError: as `check_prompts`, a `batch_size` that is no whole number, or beams to compare.
    """
    inner = base_model(model)
    for attachable in attached:
        attachable.check_attached(inner)
    if batch_size < 1 or (stream and batch_size > 1):
        raise refusal(ValueError, "`batch_size`", batch_size, "1 to stream" if stream else "a whole number >= 1")
    if compare and (beams := _n_beams(inner)) > 1:
        raise refusal(ValueError, "`num_beams` of the model's generation config", beams, "1 to compare texts")
    steerings, recorders = attached_steerings(inner), attached_recorders(inner)
    arguments = sampling_arguments(temperature, top_p)
    special = set(tokenizer.all_special_ids) if steerings else set()
    ends, start, waiting = end_tokens(inner, tokenizer), 0, iter(prompts)
    while batch_of_texts := list(islice(waiting, batch_size)):
        batch = [encode(prompt) for prompt in batch_of_texts]
        arguments["max_new_tokens"] = check_prompts(inner, batch, max_new_tokens, first=start, special=special)
        for recorder in recorders:
            recorder.trace.clear()
        torch.manual_seed(seed + start)
        streamer = _Streamer(tokenizer, steerings, start) if stream else None
        texts = continue_prompts(inner, tokenizer, batch, ends, **arguments, streamer=streamer)
        _check_steered(steerings, start)
        if _n_beams(inner) == 1:
            _end_traces(recorders, texts)
        base: list[Response | None] = [None] * len(batch)
        if compare:
            with ExitStack() as disabled:
                for attachable in attached:
                    disabled.enter_context(attachable.disabled())
                torch.manual_seed(seed + start)
                base = [*continue_prompts(inner, tokenizer, batch, ends, **arguments)]
        yield [
            Answer(
                prompt=prompt,
                text=decode(tokenizer, text.ids),
                base=None if unsteered is None else decode(tokenizer, unsteered.ids),
                edited=edited_characters(tokenizer, text.ids, _edited_tokens(text, recorders, row)) if compare else (),
                ids=tuple(text.ids),
            )
            for row, (prompt, text, unsteered) in enumerate(zip(batch_of_texts, texts, base, strict=True))
        ]
        start += len(batch)


def _n_beams(model: CausalLM) -> int:
    return model.generation_config.num_beams or 1


def _end_traces(recorders: Sequence[Recorded], texts: Sequence[Response]) -> None:
    """Note in the traces where the texts of a batch end."""
    last_prompt = torch.tensor([len(text.prompt) - 1 for text in texts])
    for recorder in recorders:
        if recorder.record:
            firsts = first_steered(last_prompt, recorder.positions).tolist()
            # The last token of a text predicted none of it.
            numbers = [max(0, len(text) - 1 - first) for text, first in zip(texts, firsts, strict=True)]
            recorder.trace.end(firsts, numbers)


def sampling_arguments(temperature: float, top_p: float | None = None) -> dict[str, Any]:
    """Return the arguments of `generate()` that mean greedy decoding (a temperature of 0) or sampling.

    Raises:
        ValueError: a number that is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise refusal(ValueError, "`temperature`", temperature, "a finite number >= 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise refusal(ValueError, "`top_p`", top_p, "a number above 0, up to 1")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature} | ({} if top_p is None else {"top_p": top_p})


def check_prompts(
    model: CausalLM,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int | None,
    *,
    special: Collection[int] = (),
    first: int = 0,
) -> int:
    """Return the largest number of tokens per text, for which all prompts leave room.

    Args:
        model: the model.
        prompts: token ids of each prompt.
        max_new_tokens: the number that was asked for; None: 200, or as many as the longest prompt leaves room for.
        special: tokens that are no text.
        first: number of the first prompt, from 0. Messages count from 1.

    Raises:
        ValueError: a prompt without text, or one that leaves no room.
    """
    special, context, longest, length = set(special), context_length(model), 0, 0
    for number, prompt in enumerate(prompts, start=first + 1):
        if special.issuperset(prompt):
            got = "nothing but special tokens" if prompt else "without tokens"
            raise refusal(ValueError, f"Prompt {number}", got, "a prompt with text")
        if len(prompt) > length:
            longest, length = number, len(prompt)
    if max_new_tokens is None:
        max_new_tokens = MAX_NEW_TOKENS if context is None else max(1, min(MAX_NEW_TOKENS, context - length))
    if context is not None and length + max_new_tokens > context:
        raise refusal(
            ValueError,
            f"Prompt {longest} with `max_new_tokens`, {length} + {max_new_tokens},",
            f"{length + max_new_tokens} tokens",
            f"up to {context}, the model's positions",
            "Shorten the prompt or lower `max_new_tokens`.",
        )
    return max_new_tokens


def continue_prompts(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    **arguments: Any,
) -> list[Response]:
    """Return prompts with what the model writes next, up to and including the first end token.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt, none empty. They run together, padded on the left.
        ends: the `end_tokens`.
        arguments: further arguments of `generate()`.
    """
    pad = padding_token(tokenizer, ends)
    width = max(map(len, prompts))
    rows = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = device_of(model.get_input_embeddings())
    output: Tensor = model.generate(rows.to(device), attention_mask=mask.to(device), pad_token_id=pad, **arguments)
    texts = []
    for prompt, ids in zip(prompts, output[:, width:].tolist(), strict=True):
        last = next((n for n, token in enumerate(ids, start=1) if token in ends), len(ids))
        texts.append(Response(list(prompt), ids[:last]))
    return texts


def padding_token(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int:
    """Return the token with which prompts are padded, the smallest end token where the tokenizer has none."""
    pad: int | None = tokenizer.pad_token_id
    return min(ends, default=0) if pad is None else pad


def end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of token ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class _Streamer(TextStreamer):
    """A streamer that prints nothing of a text that is not steered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, steerings: Sequence[Steering], number: int) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._steerings, self._number = steerings, number

    def put(self, value: Tensor) -> None:
        """Print what is new. The prompt comes first, after its plan was made."""
        _check_steered(self._steerings, self._number)
        super().put(value)  # type: ignore[no-untyped-call]


def _check_steered(steerings: Sequence[Steering], start: int) -> None:
    """Raise `ModelError` if a prompt selected nothing to edit, so that its text is the base model's."""
    empty = unsteered_prompts(steerings)
    if any(empty):
        raise ModelError(
            f"Prompt {start + empty.index(True) + 1} selects no latent to edit, so that its text would be unsteered: "
            "the rows of the map for its latents are 0 where this mode and scoring look. Remove the prompt, or change "
            "`mode`, `scoring` or the map."
        )


def unsteered_prompts(steerings: Sequence[Steering]) -> list[bool]:
    """Return True for each prompt of the latest call in which no Steering selected a latent.

    Nothing is returned before the first call, and without a Steering.
    """
    plans = [steering.plan for steering in steerings if steering.plan is not None]
    empty = [(plan.slots < 0).all(dim=1).tolist() for plan in plans]
    return [all(row) for row in zip(*empty, strict=True)]


def edited_characters(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], edited: Collection[int]
) -> tuple[tuple[int, int], ...]:
    """Return the ranges of characters of a text whose tokens were predicted from an edited residual, neighbours joined.

    Args:
        tokenizer: the model's tokenizer.
        ids: token ids of the text.
        edited: numbers of these tokens, from 0.
    """
    ranges, start, pending = list[tuple[int, int]](), 0, False
    for n, piece in enumerate(token_pieces(tokenizer, ids, special=False)):
        pending |= n in edited
        if piece:
            end = start + len(piece)
            if pending:
                ranges.append((ranges.pop()[0] if ranges and ranges[-1][1] == start else start, end))
            start, pending = end, False
    return tuple(ranges)


def _edited_tokens(response: Response, recorders: Sequence[Recorded], row: int) -> set[int]:
    """Return the numbers of a response's tokens that were predicted from an edited residual, by the traces.

    Args:
        response: prompt and response.
        recorders: what steered it. Their traces hold its edits.
        row: its row in the batch.
    """
    first = len(response.prompt) - 1
    return {edit.position - first for recorder in recorders for edit in recorder.trace if edit.row == row}
