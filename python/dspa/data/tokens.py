"""Triples as token ids, as TRL makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Message, Text, Triple, _refuse, _shared_length

TokenLists: TypeAlias = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class TokenizedTriple:
    """Token ids of one triple, as the model sees them: `prompt + chosen` and `prompt + rejected`.

    `prompt` [T_x], `chosen` [T_chosen] and `rejected` [T_rejected] hold ids; none is empty. `cut` is the
    number of responses, 0 to 2, that were shortened. The `..._text` masks have the same lengths and are True
    where a token is not one of the tokenizer's special tokens.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: int
    prompt_text: list[bool]
    chosen_text: list[bool]
    rejected_text: list[bool]


def tokenize_triple(
    triple: Triple, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> TokenizedTriple:
    """Tokenise one triple, and shorten its responses at their end to `max_length` tokens with the prompt.

    Text: `tokenizer(prompt)`, then `tokenizer(response, add_special_tokens=False)`; no end token is added.
    Messages: the prompt is what the chat template gives with its generation prompt, a response is what the
    template of the whole conversation adds after that. The prompt is never shortened.

    Errors: `PreferenceError`, with the triple's name, for a tokenizer that ends prompts with a special token
    or has no chat template for messages, for a template that refuses the conversation or whose prompt is not
    the beginning of the whole, for no tokens at all, and for a prompt that leaves no room for a response.
    """
    encode = _encode_text if isinstance(triple.prompt, str) else _encode_messages
    prompt, chosen, rejected = encode(triple, tokenizer)
    for field_name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids:
            advice = "Remove the triple or check the tokenizer."
            raise _refuse(triple.name, f"`{field_name}` gives no tokens", "one token or more", advice)
    special = set(tokenizer.all_special_ids)
    if special.issuperset(prompt):
        raise _refuse(triple.name, "`prompt` gives special tokens only", "a prompt with text", "Remove the triple.")
    if chosen == rejected:
        problem = "`chosen` and `rejected` give the same tokens"
        raise _refuse(triple.name, problem, "responses that differ", "Remove the triple.")
    if max_length is not None and len(prompt) >= max_length:
        problem = f"its prompt of {len(prompt)} tokens leaves no room for a response in {max_length} tokens"
        advice = "Raise max_length or remove the triple; prompts are never shortened."
        raise _refuse(triple.name, problem, f"prompts of at most {max_length - 1} tokens", advice)
    room = None if max_length is None else max_length - len(prompt)
    cut = sum(len(response[:room]) < len(response) for response in (chosen, rejected))
    kept = (prompt, chosen[:room], rejected[:room])
    return TokenizedTriple(*kept, cut, *([token not in special for token in ids] for ids in kept))


def _encode_text(triple: Triple, tokenizer: PreTrainedTokenizerBase) -> TokenLists:
    def ids(text: Text, special: bool) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=special)["input_ids"])

    prompt, bare = ids(triple.prompt, True), ids(triple.prompt, False)
    if prompt[len(prompt) - len(bare) :] != bare:
        problem = f"the tokenizer ends the prompt with {tokenizer.convert_ids_to_tokens(prompt[-1])!r}"
        accepted = "tokenizers that add special tokens only before a text"
        raise _refuse(triple.name, problem, accepted, "Load the tokenizer with add_eos_token=False.")
    return prompt, ids(triple.chosen, False), ids(triple.rejected, False)


def _encode_messages(triple: Triple, tokenizer: PreTrainedTokenizerBase) -> TokenLists:
    if not tokenizer.chat_template:
        problem = "is a conversation, and the tokenizer has no chat template"
        advice = "Set tokenizer.chat_template, take the instruction-tuned model, or write the triple as text."
        raise _refuse(triple.name, problem, "text, or a tokenizer with a chat template", advice)
    messages = cast(list[Message], triple.prompt)
    prompt = _templated(triple.name, tokenizer, messages, generation_prompt=True)

    def continuation(field_name: str, response: Text) -> list[int]:
        conversation = messages + cast(list[Message], response)
        whole = _templated(triple.name, tokenizer, conversation, generation_prompt=False)
        shared = _shared_length(prompt, whole)
        if shared < len(prompt):
            token = tokenizer.convert_ids_to_tokens(prompt[shared])
            problem = (
                f"under the chat template, its prompt is not a prefix of prompt and `{field_name}`: "
                f"they part at token {shared + 1} of the prompt's {len(prompt)}, {token!r}"
            )
            accepted = "conversations and templates where a response only adds to the prompt"
            advice = "End the prompt with the user's turn, correct the template, or remove the triple."
            raise _refuse(triple.name, problem, accepted, advice)
        return whole[shared:]

    return prompt, continuation("chosen", triple.chosen), continuation("rejected", triple.rejected)


def _templated(
    name: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation_prompt: bool
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        problem = f"the chat template refuses its conversation of roles {roles} ({error})"
        advice = "Change the messages or the template, or remove the triple."
        raise _refuse(name, problem, "what the template accepts", advice) from error
    return cast(list[int], cast(Mapping[str, object], encoded)["input_ids"])


def response_tokens(
    triple: Triple, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, chosen and rejected response, as `tokenize_triple` has them, and after a response that is
    plain text and was not cut the tokenizer's end token, where there is room: a model learns that an answer ends.

    A chat template ends its turns itself. Raises `PreferenceError` as `tokenize_triple` does.
    """
    found = tokenize_triple(triple, tokenizer, max_length=max_length)
    end = tokenizer.eos_token_id if isinstance(triple.prompt, str) else None

    def ended(ids: list[int]) -> list[int]:
        full = max_length is not None and len(found.prompt) + len(ids) >= max_length
        return ids if end is None or full or ids[-1] == end else [*ids, end]

    return found.prompt, ended(found.chosen), ended(found.rejected)
