"""Token ids of triples and rankings, as TRL makes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from dspa.data.messages import Message, check_different
from dspa.data.templates import apply_template, unread_names
from dspa.data.token_texts import shared_length
from dspa.data.triples import Example, Triple
from dspa.errors import ChatTemplateError, PreferenceError, refusal

# Rule of the place where a text's prompt ends. Earlier versions tokenized prompt and response "apart".
BOUNDARY = "joint"

# Those of a prompt, and of each response to it.
TokenLists: TypeAlias = tuple[list[int], ...]


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
    (prompt, chosen, rejected), cut = _tokenize(triple, tokenizer, max_length, chat_template_kwargs)
    special = set(tokenizer.all_special_ids)
    text = ([token not in special for token in ids] for ids in (prompt, chosen, rejected))
    return TokenizedTriple(prompt, chosen, rejected, cut, *text)


def _tokenize(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    end: str = "",
) -> tuple[TokenLists, int]:
    """Return the ids of a prompt and of its responses, and the number of responses that were cut.

    The text of a response that does not end with `end` gets it. For the rest, see `tokenize_triple`.
    """
    prompt, *responses = _encode(example, tokenizer, chat_template_kwargs or {}, end)
    by_name = dict(zip(example.named_responses, responses, strict=True))
    for field_name, ids in {"prompt": prompt, **by_name}.items():
        if not ids:
            what = f"{example.name}: `{field_name}`"
            advice = (
                "Remove the example. If it is text: it follows the prompt at once, so begin a new word with a space."
            )
            raise refusal(PreferenceError, what, "empty after tokenization", "one token or more", advice)
    if set(tokenizer.all_special_ids).issuperset(prompt):
        what, got = f"{example.name}: `prompt`", "nothing but special tokens"
        raise refusal(PreferenceError, what, got, "a prompt with text", "Remove the example.")
    check_different(example.name, by_name, " after tokenization")
    if max_length is not None and len(prompt) >= max_length:
        got = f"{len(prompt)} tokens long, which leaves no room for a response in {max_length} tokens"
        accepted = f"prompts of at most {max_length - 1} tokens"
        advice = "Raise `max_length` or remove the example; prompts are never shortened."
        raise refusal(PreferenceError, f"{example.name}: `prompt`", got, accepted, advice)
    room = None if max_length is None else max_length - len(prompt)
    cut = sum(len(response[:room]) < len(response) for response in responses)
    return (prompt, *(response[:room] for response in responses)), cut


def _encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], end: str
) -> Iterator[list[int]]:
    """Yield the ids of the prompt, then those of each response."""
    if isinstance(example.prompt, str):
        if kwargs:
            got = f"text, and {dict(kwargs)} is for the chat template of conversations"
            advice = "Leave `chat_template_kwargs` out, or write the example as messages."
            raise refusal(PreferenceError, example.name, got, "a conversation", advice)
        texts = cast(list[str], [*example.named_responses.values()])
        wholes = [example.prompt + text + ("" if text.endswith(end) else end) for text in texts]
        prompt, *encoded = (cast(list[int], tokenizer(text)["input_ids"]) for text in (example.prompt, *wholes))
    else:
        prompt, *encoded = _encode_messages(example, tokenizer, kwargs)
    boundary = min(shared_length(prompt, whole) for whole in encoded)
    yield prompt[:boundary]
    for whole in encoded:
        yield whole[boundary:]


def _encode_messages(example: Example, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> TokenLists:
    """Return the ids of the prompt, and those of the conversation with each response."""
    if not tokenizer.chat_template:
        got, accepted = "a conversation, and the tokenizer has no chat template", "text, or a tokenizer that has one"
        advice = "Set tokenizer.chat_template, use the instruction-tuned model, or write the example as text."
        raise refusal(PreferenceError, example.name, got, accepted, advice)
    if unread := unread_names(tokenizer, example.chat_template_kwargs):
        warnings.warn(
            f"`chat_template_kwargs` of the data set {', '.join(unread)}, which the chat template does not read.",
            stacklevel=2,
        )
    render = partial(_apply_template, example, tokenizer, {**kwargs, **example.chat_template_kwargs})
    messages = cast(list[Message], example.prompt)
    prompt, wholes = render(messages, add_generation_prompt=True), []
    for field_name, response in example.named_responses.items():
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
            advice = "End the prompt with the user's turn, set the template's variables, or remove the example."
            what = f"{example.name}: under the chat template, its prompt"
            raise refusal(PreferenceError, what, got, accepted, advice)
        wholes.append(whole)
    return prompt, *wholes


def _apply_template(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    messages: list[Message],
    *,
    tokenize: bool = True,
    add_generation_prompt: bool = False,
) -> Any:
    """Return the ids of messages of an example under the chat template, or their text without `tokenize`."""
    options: dict[str, Any] = {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt, **kwargs}
    try:
        encoded = apply_template(tokenizer, messages, tools=example.tools, return_dict=True, **options)
    except ChatTemplateError as error:
        roles = [message["role"] for message in messages]
        got = f"a conversation of roles {roles}"
        advice = f"{error} Change the messages or the template, or remove the example."
        raise refusal(PreferenceError, example.name, got, "what the template accepts", advice) from error
    return cast(Mapping[str, object], encoded)["input_ids"] if tokenize else encoded


def response_tokens(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenLists:
    """Return the token ids of a prompt and of each response to train a model on: chosen and rejected, or of a ranking.

    They are those of `tokenize_triple`. Before that, text responses get the tokenizer's end token, as in TRL, so that a
    model learns where an answer ends. A chat template ends its turns itself.

    Args:
        example: text or messages.
        tokenizer: as for `tokenize_triple`.
        max_length: as for `tokenize_triple`.
        chat_template_kwargs: as for `tokenize_triple`.

    Raises:
        PreferenceError: as `tokenize_triple` does.
    """
    ids, _ = _tokenize(example, tokenizer, max_length, chat_template_kwargs, tokenizer.eos_token or "")
    return ids
