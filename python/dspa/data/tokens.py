"""Token ids of triples, as TRL makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Message, Text, Triple, shared_length
from dspa.errors import PreferenceError, refusal

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
    triple: Triple, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> TokenizedTriple:
    """Tokenize one triple, and cut its responses at their end so that each fits `max_length` with the prompt.

    Text becomes `tokenizer(prompt)` and `tokenizer(response, add_special_tokens=False)`, without an end token. Of
    messages, the prompt is what the chat template gives with its generation prompt, and a response is what the
    template of the whole conversation adds after that.

    Args:
        triple: text or messages.
        tokenizer: the model's tokenizer, with a chat template where triples are messages.
        max_length: tokens of prompt and response together. The prompt is never shortened. Default: no limit.

    Raises:
        PreferenceError: the tokenizer ends prompts with a special token or lacks a chat template; the template refuses
            the conversation, or its prompt is not the beginning of the whole; a part has no tokens; the prompt leaves
            no room for a response. The message names the triple.
    """
    encode = _encode_text if isinstance(triple.prompt, str) else _encode_messages
    prompt, chosen, rejected = encode(triple, tokenizer)
    for field_name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids:
            what, advice = f"{triple.name}: `{field_name}`", "Remove the triple or check the tokenizer."
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
        advice = "Raise max_length or remove the triple; prompts are never shortened."
        raise refusal(PreferenceError, f"{triple.name}: `prompt`", got, accepted, advice)
    room = None if max_length is None else max_length - len(prompt)
    cut = sum(len(response[:room]) < len(response) for response in (chosen, rejected))
    kept = (prompt, chosen[:room], rejected[:room])
    return TokenizedTriple(*kept, cut, *([token not in special for token in ids] for ids in kept))


def _encode_text(triple: Triple, tokenizer: PreTrainedTokenizerBase) -> TokenLists:
    """Return the ids of prompt, chosen and rejected text."""

    def ids(text: Text, special: bool) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=special)["input_ids"])

    prompt, bare = ids(triple.prompt, True), ids(triple.prompt, False)
    if prompt[len(prompt) - len(bare) :] != bare:
        got = f"one that ends the prompt with {tokenizer.convert_ids_to_tokens(prompt[-1])!r}"
        accepted = "tokenizers that add special tokens only before a text"
        advice = "Load the tokenizer with add_eos_token=False."
        raise refusal(PreferenceError, f"{triple.name}: the tokenizer", got, accepted, advice)
    return prompt, ids(triple.chosen, False), ids(triple.rejected, False)


def _encode_messages(triple: Triple, tokenizer: PreTrainedTokenizerBase) -> TokenLists:
    """Return the ids of prompt, chosen and rejected messages."""
    if not tokenizer.chat_template:
        got, accepted = "a conversation, and the tokenizer has no chat template", "text, or a tokenizer that has one"
        advice = "Set tokenizer.chat_template, use the instruction-tuned model, or write the triple as text."
        raise refusal(PreferenceError, triple.name, got, accepted, advice)
    messages = cast(list[Message], triple.prompt)
    prompt = _apply_template(triple.name, tokenizer, messages, generation_prompt=True)

    def continuation(field_name: str, response: Text) -> list[int]:
        conversation = messages + cast(list[Message], response)
        whole = _apply_template(triple.name, tokenizer, conversation, generation_prompt=False)
        shared = shared_length(prompt, whole)
        if shared < len(prompt):
            token = tokenizer.convert_ids_to_tokens(prompt[shared])
            got = (
                f"not a prefix of prompt and `{field_name}`: they part at token {shared + 1} of the prompt's "
                f"{len(prompt)}, {token!r}"
            )
            accepted = "conversations and templates where a response only adds to the prompt"
            advice = "End the prompt with the user's turn, correct the template, or remove the triple."
            what = f"{triple.name}: under the chat template, its prompt"
            raise refusal(PreferenceError, what, got, accepted, advice)
        return whole[shared:]

    return prompt, continuation("chosen", triple.chosen), continuation("rejected", triple.rejected)


def _apply_template(
    name: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation_prompt: bool
) -> list[int]:
    """Return the ids of messages under the chat template; errors call them `name`."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        got = f"a conversation of roles {roles}, which the chat template refuses ({error})"
        advice = "Change the messages or the template, or remove the triple."
        raise refusal(PreferenceError, name, got, "what the template accepts", advice) from error
    return cast(list[int], cast(Mapping[str, object], encoded)["input_ids"])


def response_tokens(
    triple: Triple, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Return the token ids of prompt, chosen and rejected response to train a model on.

    They are those of `tokenize_triple`. A response that is plain text and was not cut also gets the tokenizer's end
    token, where there is room, so that a model learns where an answer ends. A chat template ends its turns itself.

    Args:
        triple: as for `tokenize_triple`.
        tokenizer: as for `tokenize_triple`.
        max_length: as for `tokenize_triple`.

    Raises:
        PreferenceError: as `tokenize_triple` does.
    """
    tokens = tokenize_triple(triple, tokenizer, max_length=max_length)
    end = tokenizer.eos_token_id if isinstance(triple.prompt, str) else None

    def with_end(ids: list[int]) -> list[int]:
        full = max_length is not None and len(tokens.prompt) + len(ids) >= max_length
        return ids if end is None or full or ids[-1] == end else [*ids, end]

    return tokens.prompt, with_end(tokens.chosen), with_end(tokens.rejected)
