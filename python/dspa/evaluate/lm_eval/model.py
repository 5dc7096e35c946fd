"""A steered model for lm-evaluation-harness. Importing this needs the package lm-eval."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.errors import ModelError, refusal
from dspa.evaluate.compare.prompts import with_prefix
from dspa.evaluate.generation import unsteered_prompts
from dspa.evaluate.responses import Response, teacher_forced
from dspa.models.attachment import Attachment
from dspa.models.layers import CausalLM, base_model
from dspa.steering.dspa import Steering, attached_steerings

# As the harness gives them: texts of context and continuation, and their token ids.
TokenizedRequest: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class Contexts:
    """Different contexts of a task, and those that were unsteered or cut.

    Attributes:
        seen: texts of all contexts.
        unsteered: those that selected no latent to edit, so that what follows them is the base model's.
        cut: those whose beginning was left out for want of room in the model's positions.
    """

    seen: set[str] = field(default_factory=set)
    unsteered: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)


@register_model("dspa")
class SteeredLM(HFLM):  # type: ignore[misc]
    """A causal language model for lm-evaluation-harness, with all that is attached to it.

    The context of a request is the prompt, and its continuation the response. DSPA chooses its latents from the tokens
    of the context, and edits from the last of them on.

    Args:
        pretrained: a transformers causal language model in evaluation mode. What is attached to it may change later.
        tokenizer: the model's tokenizer. It stays as it is.
        prefix: an instruction before every context, placed as `dspa compare` does.
        chat: True if the harness is told to apply the chat template, which then gets the prefix as a system message.
        batch_size: number of sequences per pass.
        settings: further arguments of the harness' `HFLM`, such as `max_length`.

    Attributes:
        contexts: what became of the contexts so far, by the name of their task.

    Raises:
        ValueError: a `batch_size` that is not a whole number.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix: str = "",
        chat: bool = False,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise refusal(ValueError, "`batch_size`", repr(batch_size), "a whole number >= 1")
        # The harness gives it a padding token.
        own = copy.deepcopy(tokenizer)
        super().__init__(pretrained=base_model(pretrained), tokenizer=own, batch_size=batch_size, **settings)
        self.prefix, self.chat = prefix, chat
        self.contexts: dict[str, Contexts] = {}
        self._now, self._special = Contexts(), set(own.all_special_ids)
        self._batch: list[str] = []

    @property
    def steerings(self) -> list[Steering]:
        """Those attached to the model."""
        return attached_steerings(self.model)

    # What the harness calls

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and True where greedy decoding would write it."""
        with_prefix = self._with_prefix(requests)
        result: list[tuple[float, bool]] = super().loglikelihood(with_prefix, disable_tqdm=disable_tqdm)
        self._count(with_prefix)
        return result

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context.

        Raises:
            ModelError: a tokenizer without an end token, at which the harness cuts texts.
        """
        if self.eot_token_id is None:
            advice = "Set tokenizer.eos_token."
            raise refusal(ModelError, "The tokenizer", "without an end token", "one that has one, to write", advice)
        with_prefix = self._with_prefix(requests)
        result: list[str] = super().generate_until(with_prefix, disable_tqdm=disable_tqdm)
        self._count(with_prefix)
        return result

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts.

        Raises:
            ModelError: a prefix, or something attached that acts from the end of a prompt on. There is no prompt.
        """
        for request in requests:
            _check_whole_texts(request.task_name, self.model, self.prefix)
        result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return result

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, with the prefix as a system message before it.

        Raises:
            ValueError: this was made without `chat`, and would put a prefix before the text, too.
        """
        if not self.chat:
            raise refusal(ValueError, "`chat`", False, "True, as the harness applies the chat template")
        messages: Any = with_prefix([dict(message) for message in chat_history], self.prefix)
        return str(super().apply_chat_template(messages, add_generation_prompt))

    # Contexts

    def _with_prefix(self, requests: Sequence[Instance]) -> list[Instance]:
        """Return the requests, with the prefix before contexts that are no conversations."""
        if not self.prefix or self.chat:
            return list(requests)
        changed = [copy.copy(request) for request in requests]
        for request in changed:
            context, *others = request.arguments
            request.arguments = (with_prefix(context, self.prefix), *others)
        return changed

    def _count(self, requests: Sequence[Instance]) -> None:
        for request in requests:
            of_task, context = self.contexts.setdefault(request.task_name, Contexts()), request.args[0]
            of_task.seen.add(context)
            for name in ("unsteered", "cut"):
                if context in getattr(self._now, name):
                    getattr(of_task, name).add(context)
        self._now = Contexts()

    def _check_prompts(self, prompts: Iterable[Sequence[int]]) -> None:
        """Raise `ModelError` for a prompt without text, from which nothing can be chosen."""
        if self.steerings and any(self._special.issuperset(prompt) for prompt in prompts):
            got, accepted = "empty", "one with text, from which DSPA chooses latents"
            advice = "Leave out the task, or the metric that scores continuations without context, for maps."
            raise refusal(ModelError, "A context", got, accepted, advice)

    def _note_unsteered(self, contexts: Sequence[str]) -> None:
        """Note which contexts of the latest call selected nothing."""
        if steerings := self.steerings:
            flags = zip(contexts, unsteered_prompts(steerings), strict=True)
            self._now.unsteered.update(context for context, empty in flags if empty)

    # Passes

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return log-probabilities as `HFLM` does, in the same batches, with the end of each context known.

        One pass is enough for continuations of a context that differ in their last token alone. `HFLM` also shares it
        with those of another context whose tokens together are the same. There, other tokens are steered.
        """
        shared: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            shared.setdefault((tuple(context), tuple(continuation[:-1])), []).append(n)

        def longest_first(numbers: list[int]) -> tuple[int, list[int]]:
            _, context, continuation = requests[numbers[0]]
            return -len(context + continuation), context + continuation

        waiting, answers = iter(sorted(shared.values(), key=longest_first)), dict[int, tuple[float, bool]]()
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            while batch := list(islice(waiting, override_bs or self.batch_size)):
                for numbers, scores in zip(batch, self._scores([requests[n] for n, *_ in batch]), strict=True):
                    greedy = scores.argmax(dim=-1)
                    for n in numbers:
                        text, _, continuation = requests[n]
                        ids = torch.tensor(continuation, device=scores.device)
                        taken = scores.gather(1, ids[:, None]).squeeze(1)
                        answers[n] = (float(taken.sum()), bool((greedy == ids).all()))
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answers[n])
                    bar.update(len(numbers))
        return [answers[n] for n in range(len(requests))]

    def _scores(self, requests: Sequence[TokenizedRequest]) -> list[Tensor]:
        """Return the log-probabilities of all tokens at the places of each continuation, [its length, d_vocab]."""
        texts = ["" if text is None else text[0] for text, _, _ in requests]
        rows = [self._fitting(*request) for request in requests]
        self._check_prompts(row.prompt for row in rows)
        # The last token predicts nothing. Zeros after the end, and no mask, as in `HFLM`.
        inputs = pad_sequence([torch.tensor((row.prompt + row.ids)[:-1]) for row in rows], batch_first=True)
        with teacher_forced(self.model, rows):
            logits = self._model_call(inputs.to(self.device))
        self._note_unsteered(texts)
        kept = (one[len(row.prompt) - 1 : len(row) - 1] for one, row in zip(logits, rows, strict=True))
        return [log_softmax(one, dim=-1, dtype=self.softmax_dtype) for one in kept]

    def _fitting(self, text: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Response:
        """Return a context and its continuation, without the beginning of what is too long for the model."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            got = f"of {len(continuation)} tokens" + (f" ({text[1][:60]!r})" if text else "")
            raise refusal(ValueError, "A continuation", got, f"1 to {self.max_length}, the positions of the model")
        if text is not None and len(context) > room:
            self._now.cut.add(text[0])
        return Response(context[-room:], continuation)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of contexts, padded, and their mask, [B, T] each, without the beginning of the longest."""
        # The harness encodes contexts in the order in which it then generates.
        self._batch = list(strings)
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        room = left_truncate_len or ids.shape[1]
        self._now.cut.update(text for text, length in zip(strings, mask.sum(dim=1), strict=True) if length > room)
        return ids[:, -room:], mask[:, -room:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        mask = settings["attention_mask"].bool()
        self._check_prompts(row[kept].tolist() for row, kept in zip(context, mask, strict=True))
        output: Tensor = super()._model_generate(context, max_length, stop, **settings)
        self._note_unsteered(self._batch)
        return output


def check_tasks(tasks: Iterable[Task], model: CausalLM, prefix: str) -> None:
    """Raise `ModelError` for a task in which what is attached to a model, or a prefix, has no meaning."""
    for task in tasks:
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            _check_whole_texts(task.task_name, model, prefix)


def _check_whole_texts(task: str, model: CausalLM, prefix: str) -> None:
    """Raise `ModelError` for what depends on where a prompt ends: a text as a whole has none."""
    bounded = any(other.keywords for other in Attachment.of(model).attached)
    if bounded or prefix:
        got = "one that acts from the end of a prompt on" if bounded else "an instruction before the prompt"
        accepted = "the base model, a tuned one, an adapter, or a vector that is added to all tokens"
        advice = "Leave out the task for this method."
        raise refusal(
            ModelError, f"A method for {task}, which scores whole texts without prompts,", got, accepted, advice
        )
