"""Sample texts: what a model writes after prompts without and with steering, and which tokens were edited."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.audit.edits import TextEdits, summarise
from dspa.audit.record import Sample, SampleToken
from dspa.data.messages import Text, content_of
from dspa.data.token_texts import token_pieces
from dspa.evaluate.generation import answer_prompts, check_prompts
from dspa.evaluate.responses import Response
from dspa.models.attachment import Attachable
from dspa.models.layers import base_model
from dspa.steering.dspa import Steering
from dspa.steering.edits import Edit, SteeredText

# Edits per token that are kept. An adapter may move thousands of latents.
N_EDITS = 20


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    attached: Attachable,
    edits_of: Callable[[Sequence[Response]], tuple[Sequence[Edit], Sequence[SteeredText]]],
    prompts: Sequence[Text],
    encode: Callable[[Text], Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[list[Sample], TextEdits]:
    """Let a model answer prompts with and without steering, and record the edits.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        attached: what steers it, attached to it.
        edits_of: returns the edits of a batch of texts that were just written with it, and the texts' lengths, as
            `traced` and `AdapterMoves.of` do.
        prompts: the prompts, texts or messages.
        encode: returns the token ids of a prompt.
        max_new_tokens: largest number of tokens per text; None: as `check_prompts` chooses.
        progress: show a bar.
        options: of sampling, as for `answer_prompts`.

    Returns:
        A sample per prompt, and the edits of all.

    Raises:
        ModelError: as for `answer_prompts`, as is ValueError.
    """
    samples, edits, texts = list[Sample](), list[Edit](), list[SteeredText]()
    encoded = [list(encode(prompt)) for prompt in prompts]
    # All of them, before the first answer.
    options["max_new_tokens"] = check_prompts(base_model(model), encoded, max_new_tokens)
    shown, waiting = list(map(_shown, prompts)), iter(encoded)
    answers = answer_prompts(model, tokenizer, [attached], shown, lambda _: next(waiting), compare=True, **options)
    given = iter(encoded)
    with tqdm(total=len(prompts), unit="prompt", desc="samples", disable=not progress) as bar:
        for batch in answers:
            responses = [Response(next(given), list(answer.ids)) for answer in batch]
            of_batch, lengths = edits_of(responses)
            edits += of_batch
            texts += lengths
            for row, (answer, response) in enumerate(zip(batch, responses, strict=True)):
                own = [edit for edit in of_batch if edit.row == row]
                tokens = _marked(tokenizer, answer.ids, len(response.prompt) - 1, own)
                samples.append(Sample(answer.prompt, answer.base or "", tokens))
            bar.update(len(batch))
    return samples, summarise(edits, texts)


def traced(
    steering: Steering, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Sequence[Response]], tuple[Sequence[Edit], Sequence[SteeredText]]]:
    """Return a function of the latest batch: the edits in the trace of a steering that was made with `record=True`."""
    steering.trace.tokenizer = tokenizer
    return lambda _: ([*steering.trace], [*steering.trace.texts])


def _shown(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(map(content_of, prompt))


def _marked(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], first: int, edits: Iterable[Edit]
) -> list[SampleToken]:
    """Return the tokens of a text, whose first one was predicted at position `first`, with their largest edits."""
    edits_at: dict[int, list[tuple[int, float, float]]] = {
        edit.position - first: heapq.nlargest(
            N_EDITS, zip(edit.latents, edit.before, edit.after, strict=True), key=lambda one: abs(one[2] - one[1])
        )
        for edit in edits
    }
    pieces = token_pieces(tokenizer, ids, special=False)
    return [SampleToken(piece, edits_at.get(n, ())) for n, piece in enumerate(pieces)]
