"""The prompts of a call of `generate()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspa.errors import ModelError
from dspa.models.layers import CausalLM, check_context
from dspa.models.reading import cache_in

# Tensors of a call of generate() that this package understands. Token types are the same for all text.
PROMPT_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts as a model gets them.

    Attributes:
        inputs: input_ids [B, T] or inputs_embeds [B, T, d_in].
        mask: [B, T] bool, True at prompt tokens.
        positions: position_ids of the tokens in the model [B, T].
    """

    inputs: dict[str, Any]
    mask: Tensor
    positions: Tensor

    @property
    def last_position(self) -> Tensor:
        """Position of each prompt's last token [B]."""
        return self.positions.where(self.mask, 0).amax(dim=1)


def generate_prompts(model: CausalLM, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompts:
    """Return the prompts of `generate(inputs, *args, **kwargs)`.

    Raises:
        ModelError: prompts that cannot be read with certainty.
    """
    foreign = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in PROMPT_TENSORS]
    if foreign:
        raise ModelError(
            f"generate() got {', '.join(foreign)}. Steering selects from the text of a prompt; accepted tensors: "
            f"{', '.join(PROMPT_TENSORS)}."
        )
    tokens = inputs if inputs is not None else kwargs.get("input_ids")
    name, whole = "input_ids", tokens
    if kwargs.get("inputs_embeds") is not None:
        name, whole = "inputs_embeds", kwargs["inputs_embeds"]
    if whole is None or whole.dim() < 2 or 0 in whole.shape[:2]:
        shape = None if whole is None else list(whole.shape)
        raise ModelError(f"The prompt is empty ({name}: {shape}). Steering selects from a prompt: pass one.")
    mask = kwargs.get("attention_mask")
    if mask is None:
        _check_unpadded(tokens, [kwargs, kwargs.get("generation_config"), *args[:1], model.generation_config])
        mask = torch.ones(whole.shape[:2], dtype=torch.bool)
    mask = mask.to(whole.device).bool()
    _check_prompt(model, whole.shape[1], mask, cache_in(kwargs))
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return Prompts(inputs={name: whole}, mask=mask, positions=positions.to(whole.device))


def _check_unpadded(tokens: Tensor | None, settings: list[Any]) -> None:
    """Raise if generate() would take tokens for padding: the padding token is that of the first setting with one."""
    for setting in settings:
        pad = setting.get("pad_token_id") if isinstance(setting, dict) else getattr(setting, "pad_token_id", None)
        if pad is not None:
            break
    else:
        return
    if tokens is not None and bool((tokens == int(pad)).any()):
        raise ModelError(
            "A prompt holds the padding token and there is no attention_mask, so it is not known where the prompt "
            "begins. Pass the mask: generate(**tokenizer(prompts, padding=True, return_tensors='pt'))."
        )


def _check_prompt(model: CausalLM, length: int, mask: Tensor, cache: Any) -> None:
    cached = int(cache.get_seq_length()) if cache is not None else 0
    if mask.dim() != 2 or mask.shape[1] != length or cached >= length:
        raise ModelError(
            f"generate() got {length} tokens, an attention_mask of shape {list(mask.shape)} and a cache of {cached} "
            "tokens. What is steered is selected from the whole conversation: pass all its input_ids with a 2-D "
            "attention_mask. Tokens in the cache are still not computed again."
        )
    if not bool(mask.any(dim=1).all()):
        raise ModelError(f"Prompt {int((~mask.any(dim=1)).nonzero()[0])} of the batch is empty (all padding).")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ModelError("A prompt is padded on the right. Set tokenizer.padding_side = 'left' before generating.")
    check_context(model, int(mask.sum(dim=1).max()))
