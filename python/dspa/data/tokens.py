"""Token ids of triples, as TRL makes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from dspa.data.templates import apply_template, unread_names
from dspa.data.token_texts import shared_length
from dspa.data.triples import Message, Triple
from dspa.errors import ChatTemplateError, PreferenceError, refusal

# Rule of the place where a text's prompt ends. Earlier versions tokenized prompt and response "apart".
BOUNDARY = "joint"

TokenLists: TypeAlias = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class TokenizedTriple:
    """Token ids of one triple, as the model sees them: `prompt + chosen` and `prompt + rejected`.

    Attributes:
        prompt, chosen, rejected: ids [T_prompt], [T_chosen] and [T_rejected], none of them empty.
        cut: number of responses that were shortened, 0 to 2.
        prompt_text, chosen_text, rejected_text: masks of the same lengths, True where a token is not one of the
            tokenizer's special tokens.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: int
    prompt_text: list[bool]
    chosen_text: list[bool]
    rejected_text: list[bool]


def tokenize_triple(
    triple: Triple,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedTriple:
    """Tokenize one triple, and cut its responses at their end so that each fits `max_length` with the prompt.

    The ids are those of TRL's `DPOTrainer`, without the end token that it adds to text (`response_tokens` adds it).
    Prompt and response are tokenized as one text, `tokenizer(prompt + response)`, so that the tokens are those of the
    text. Messages are tokenized as the chat template renders them: the prompt with its generation prompt, the whole
    conversation without.

    The prompt is the longest beginning that its own tokens share with those of both wholes. It ends where the prompt's
    text ends, except where a token reaches across that place. Such a token begins the response, and what it replaces
    is no part of the prompt. So both responses continue the same prompt.

    Args:
        triple: text or messages.
        tokenizer: the model's tokenizer, with a chat template where triples are messages.
        max_length: tokens of prompt and response together. The prompt is never shortened. Default: no limit.
        chat_template_kwargs: values of the chat template's variables by name. Those of the triple come first.

    Raises:
        PreferenceError: text with `chat_template_kwargs`; the tokenizer lacks a chat template; the template refuses the
            conversation, or its prompt is not the beginning of the whole; a part has no tokens; the prompt leaves no
            room for a response. The message names the triple.
    """
    prompt, chosen, rejected = _encode(triple, tokenizer, chat_template_kwargs or {})
    for field_name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids:
            what = f"{triple.name}: `{field_name}`"
            advice = (
                "Remove the triple. If it is text: it follows the prompt at once, so begin a new word with a space."
            )
            raise refusal(PreferenceError, what, "empty after tokenization", "one token or more", advice)
    special = set(tokenizer.all_special_ids)
    if special.issuperset(prompt):
        what, got = f"{triple.name}: `prompt`", "nothing but special tokens"
        raise refusal(PreferenceError, what, got, "a prompt with text", "Remove the triple.")
    if chosen == rejected:
        what, got = f"{triple.name}: `chosen`", "equal to `rejected` after tokenization"
        raise refusal(PreferenceError, what, got, "responses that differ", "Remove the triple.")
    if max_length is not None and len(prompt) >= max_length:
        got = f"{len(prompt)} tokens long, which leaves no room for a response in {max_length} tokens"
        accepted = f"prompts of at most {max_length - 1} tokens"
        advice = "Raise `max_length` or remove the triple; prompts are never shortened."
        raise refusal(PreferenceError, f"{triple.name}: `prompt`", got, accepted, advice)
    room = None if max_length is None else max_length - len(prompt)
    cut = sum(len(response[:room]) < len(response) for response in (chosen, rejected))
    kept = (prompt, chosen[:room], rejected[:room])
    return TokenizedTriple(*kept, cut, *([token not in special for token in ids] for ids in kept))


def _encode(triple: Triple, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> TokenLists:
    """Return the ids of prompt, chosen and rejected response."""
    if isinstance(triple.prompt, str):
        if kwargs:
            got = f"text, and {dict(kwargs)} is for the chat template of conversations"
            advice = "Leave `chat_template_kwargs` out, or write the triple as messages."
            raise refusal(PreferenceError, triple.name, got, "a conversation", advice)
        texts = (triple.prompt, triple.prompt + cast(str, triple.chosen), triple.prompt + cast(str, triple.rejected))
        prompt, *wholes = (cast(list[int], tokenizer(text)["input_ids"]) for text in texts)
    else:
        prompt, *wholes = _encode_messages(triple, tokenizer, kwargs)
    boundary = min(shared_length(prompt, whole) for whole in wholes)
    return prompt[:boundary], wholes[0][boundary:], wholes[1][boundary:]


def _encode_messages(triple: Triple, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> TokenLists:
    """Return the ids of the prompt, and those of the conversation with either response."""
    if not tokenizer.chat_template:
        got, accepted = "a conversation, and the tokenizer has no chat template", "text, or a tokenizer that has one"
        advice = "Set tokenizer.chat_template, use the instruction-tuned model, or write the triple as text."
        raise refusal(PreferenceError, triple.name, got, accepted, advice)
    if unread := unread_names(tokenizer, triple.chat_template_kwargs):
        warnings.warn(
            f"`chat_template_kwargs` of the data set {', '.join(unread)}, which the chat template does not read.",
            stacklevel=2,
        )
    render = partial(_apply_template, triple, tokenizer, {**kwargs, **triple.chat_template_kwargs})
    messages = cast(list[Message], triple.prompt)
    prompt, wholes = render(messages, add_generation_prompt=True), []
    for field_name, response in (("chosen", triple.chosen), ("rejected", triple.rejected)):
        conversation = messages + cast(list[Message], response)
        whole = render(conversation)
        shared = shared_length(prompt, whole)
        # Tokens can differ where the text does not: one may reach from the prompt into the response.
        if shared < len(prompt) and not render(conversation, tokenize=False).startswith(
            render(messages, add_generation_prompt=True, tokenize=False)
        ):
            token = tokenizer.convert_ids_to_tokens(prompt[shared])
            got = (
                f"not a prefix of prompt and `{field_name}`: they part at token {shared + 1} of the prompt's "
                f"{len(prompt)}, {token!r}"
            )
            accepted = "conversations and templates where a response only adds to the prompt"
            advice = "End the prompt with the user's turn, set the template's variables, or remove the triple."
            what = f"{triple.name}: under the chat template, its prompt"
            raise refusal(PreferenceError, what, got, accepted, advice)
        wholes.append(whole)
    return prompt, wholes[0], wholes[1]


def _apply_template(
    triple: Triple,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    messages: list[Message],
    *,
    tokenize: bool = True,
    add_generation_prompt: bool = False,
) -> Any:
    """Return the ids of messages of a triple under the chat template, or their text without `tokenize`."""
    options: dict[str, Any] = {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt, **kwargs}
    try:
        encoded = apply_template(tokenizer, messages, tools=triple.tools, return_dict=True, **options)
    except ChatTemplateError as error:
        roles = [message["role"] for message in messages]
        got = f"a conversation of roles {roles}"
        advice = f"{error} Change the messages or the template, or remove the triple."
        raise refusal(PreferenceError, triple.name, got, "what the template accepts", advice) from error
    return cast(Mapping[str, object], encoded)["input_ids"] if tokenize else encoded


def response_tokens(
    triple: Triple,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenLists:
    """Return the token ids of prompt, chosen and rejected response to train a model on.

    They are those of `tokenize_triple`. Before that, text responses get the tokenizer's end token, as in TRL, so that a
    model learns where an answer ends. A chat template ends its turns itself.

    Args:
        triple: as for `tokenize_triple`.
        tokenizer: as for `tokenize_triple`.
        max_length: as for `tokenize_triple`.
        chat_template_kwargs: as for `tokenize_triple`.

    Raises:
        PreferenceError: as `tokenize_triple` does.
    """
    end = tokenizer.eos_token
    if isinstance(triple.prompt, str) and end:
        chosen, rejected = (
            text if text.endswith(end) else text + end for text in cast(list[str], [triple.chosen, triple.rejected])
        )
        triple = replace(triple, chosen=chosen, rejected=rejected)
    tokens = tokenize_triple(triple, tokenizer, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
    return tokens.prompt, tokens.chosen, tokens.rejected
