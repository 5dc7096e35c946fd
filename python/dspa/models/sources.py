"""Where a model or an SAE was loaded from, and what was there."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import ModelError
from dspa.models.layers import base_model
from dspa.schemas import Text, schema

# Numbers of each weight that take part in a digest: 4 MB of a model with 500 weights.
SAMPLED = 4096
# Begins the digests of that many. Those of earlier versions begin with their digits, and are of EARLIER numbers of each
# parameter at a fixed distance, in an order by content.
RULE = "sampled-"
EARLIER = 64
# A multiplier whose multiples are spread evenly over any range: 2^32 over the golden ratio.
SPREAD = 2654435769


@schema
class Source:
    """A place from which a model or an SAE was loaded.

    Attributes:
        path: absolute path, or a name on the Hub; for an SAE of a release, RELEASE:SAE_ID.
        digest: what was there: the fingerprint of an SAE, or the `model_digest` of a model.
    """

    path: Text
    digest: Text


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder, and any other name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def model_source(model: nn.Module) -> Source | None:
    """Return the source of `model`, or None for a model that was not loaded or whose weights are offloaded."""
    name, digest = str(base_model(model).config.name_or_path or ""), model_digest(model)
    return Source(absolute(name), digest) if name and digest is not None else None


def model_digest(model: nn.Module, like: str = "") -> str | None:
    """Return text that identifies the weights of `model`, or None if some of them are offloaded.

    It is RULE and the first 16 hexadecimal digits of a SHA-256 over the shape of each parameter and persistent buffer,
    in the order in which the class of the model has them, and over SAMPLED of its numbers. These are spread evenly over
    the tensor, floating ones rounded to bf16. So it is the same after saving and loading, in fp32 and bf16, and on any
    device. It is another one after training, for a model with a LoRA, and in fp16, which rounds small weights.
    Quantized weights take part with their codes and scales: in other bits, a model has another digest.

    It cannot see a change of numbers that it does not read, as of a single row of a large matrix, a change of all
    numbers that bf16 does not show, the values of quantized formats that are unknown here, the configuration, or the
    tokenizer.

    Args:
        model: a transformers model, or one in a PEFT wrapper.
        like: a digest to compare with. One of an earlier version followed another rule, and so does the result then.
    """
    inner, earlier = base_model(model), is_earlier(like)
    weights = [*inner.parameters(), *([] if earlier else _buffers(inner))]
    if any(weight.is_meta for weight in weights):
        return None
    described = [
        f"{list(shape)}".encode() + b"".join(_sample(tensor, earlier) for tensor in tensors)
        for shape, tensors in map(_stored, weights)
    ]
    digest = hashlib.sha256(b"".join(sorted(described) if earlier else described)).hexdigest()[:16]
    return digest if earlier else RULE + digest


def recorded_weights(model: nn.Module) -> dict[str, str]:
    """Return the entry by which the folder of a training records the model's weights, none if they are offloaded.

    Folders of earlier versions have none.
    """
    digest = model_digest(model)
    return {} if digest is None else {"model_digest": digest}


def is_earlier(digest: str) -> bool:
    """Return True for a digest that an earlier version made, False for one of today's rule or an empty text."""
    return bool(digest) and not digest.startswith(RULE)


def may_be_one(digests: Iterable[str]) -> bool:
    """Return True unless some of these digests show that they are of different weights."""
    given = set(filter(None, digests))
    return all(len({digest for digest in given if is_earlier(digest) is earlier}) < 2 for earlier in (False, True))


def check_weights(made: str, recorded: str, model: nn.Module, *, other_weights: bool = False) -> None:
    """Raise `ModelError` if something was made with other weights than those of `model`.

    Warns where that cannot be seen, because some of the weights are offloaded.

    Args:
        made: start of the message, such as "The map was made with".
        recorded: digest of the weights that it was made with. If it is empty, nothing is checked.
        model: the model that it is used with.
        other_weights: True if any weights are meant.
    """
    if not recorded or other_weights:
        return
    digest = model_digest(model, recorded)
    if digest is None:
        warnings.warn(
            f"{made} the weights of digest {recorded}. Some weights of this model are offloaded, so that nothing shows "
            "that they are the same.",
            stacklevel=4,
        )
    elif digest != recorded:
        raise ModelError(
            f"{made} other weights than this model's (digest {recorded} there, {digest} here): those of another "
            "model, or of this one before it was tuned, merged, quantized or converted to float16. Load that model. If "
            "you mean to use this one, pass `other_weights` (True)."
        )


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that are saved: some formats keep quantized weights in them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _stored(weight: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """Return the shape of a weight, and the tensors that it is stored in."""
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        return state.shape, [_block_scales(state)]
    data = weight.data
    # Quantized weights of torchao are tensors that are made of others.
    names = data.__tensor_flatten__()[0] if hasattr(data, "__tensor_flatten__") else []
    parts = [getattr(data, name) for name in names] or [data]
    # Others have formats of their own: their shapes have to do.
    return data.shape, [part for part in parts if type(part) is Tensor]


def _block_scales(state: Any) -> Tensor:
    """Return the scale of each block of a 4-bit weight of bitsandbytes, in the order of its rows.

    Its codes are in another order once a CPU has run a pass, and the scales in another shape.
    """
    scales: Tensor = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.T if getattr(state, "packing_format_for_cpu", False) else scales


def _sample(weight: Tensor, earlier: bool) -> bytes:
    """Return SAMPLED numbers of a weight."""
    numbers = weight.detach().flatten()
    if earlier:
        numbers = numbers[:: max(1, len(numbers) // EARLIER)][:EARLIER].to(torch.bfloat16)
    elif numbers.is_floating_point() and numbers.dtype.itemsize > 1:
        numbers = numbers[_places(len(numbers), numbers.device)].to(torch.bfloat16)
    else:
        # Codes: rounding would lose their bits.
        numbers = numbers.view(torch.uint8)
        numbers = numbers[_places(len(numbers), numbers.device)]
    return numbers.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _places(size: int, device: torch.device) -> Tensor:
    """Return the places of up to SAMPLED numbers, one in each of as many parts of the same length.

    They change from part to part: at a fixed distance, they might all be in one column of a matrix.
    """
    part = torch.arange(min(size, SAMPLED), device=device)
    return part * size // max(len(part), 1) + part * SPREAD % max(size // max(len(part), 1), 1)
