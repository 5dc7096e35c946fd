"""The prompts of a call of `generate()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspa.errors import ModelError, refusal
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
        positions: position_ids of the tokens in the model [B, T], 0 at padding.
        n_cached: number of columns that the cache of the call holds already.
        residuals: unsteered residuals [B, T, d_in] at the outputs of the layers that were read, by layer.
    """

    inputs: dict[str, Any]
    mask: Tensor
    positions: Tensor
    n_cached: int = 0
    residuals: dict[int, Tensor] = field(default_factory=dict)

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
    if whole is not None and not isinstance(whole, Tensor):
        raise refusal(ModelError, f"`{name}`", f"a {type(whole).__name__}", "a tensor, [B, T] or [B, T, d_in]")
    if whole is None or whole.dim() < 2 or 0 in whole.shape[:2]:
        shape = None if whole is None else list(whole.shape)
        raise ModelError(f"The prompt is empty ({name}: {shape}). Steering selects from a prompt: pass one.")
    mask = kwargs.get("attention_mask")
    if mask is None:
        _check_unpadded(tokens, [kwargs, kwargs.get("generation_config"), *args[:1], model.generation_config])
        mask = torch.ones(whole.shape[:2], dtype=torch.bool)
    mask = token_mask(mask.to(whole.device))
    cache = cache_in(kwargs)
    n_cached = int(cache.get_seq_length()) if cache is not None else 0
    _check_prompt(model, whole.shape[1], mask, n_cached)
    return Prompts({name: whole}, mask, token_positions(kwargs.get("position_ids"), mask), n_cached)


def token_mask(mask: Tensor) -> Tensor:
    """Return an attention mask as bool.

    Raises:
        ModelError: anything but 0 and 1.
    """
    if not bool(((mask == 0) | (mask == 1)).all()):
        wrong = mask[(mask != 0) & (mask != 1)][0].item()
        raise refusal(
            ModelError, "A number of `attention_mask`", wrong, "1 at a token, 0 at padding, in two dimensions"
        )
    return mask.bool()


def token_positions(positions: Tensor | None, mask: Tensor) -> Tensor:
    """Return the positions of tokens [B, T], 0 at padding.

    Args:
        positions: position_ids [B, T] or [1, T], or None to count the tokens of each row.
        mask: [B, T] bool, True at tokens.

    Raises:
        ModelError: positions of another shape or kind, or that do not rise from token to token in a row.
    """
    if positions is None:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if (
        positions.shape not in (mask.shape, (1, mask.shape[1]))
        or positions.is_floating_point()
        or positions.dtype == torch.bool
    ):
        got = f"{positions.dtype} {list(positions.shape)}"
        raise refusal(ModelError, "`position_ids`", got, f"whole numbers of shape {list(mask.shape)}")
    positions = positions.to(mask.device).expand_as(mask).where(mask, -1)
    # A token's position is above all before it. Padding has -1 here.
    highest = torch.cat([positions.new_full((len(mask), 1), -1), positions.cummax(dim=1).values[:, :-1]], dim=1)
    if not bool((positions > highest)[mask].all()):
        raise refusal(
            ModelError,
            "`position_ids`",
            "numbers that fall, stay or start again within a row",
            "numbers >= 0 that rise from token to token",
            "Pass one sequence per row, and no position_ids to have its tokens counted.",
        )
    return positions.where(mask, 0)


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


def _check_prompt(model: CausalLM, length: int, mask: Tensor, cached: int) -> None:
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
