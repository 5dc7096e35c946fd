"""Loading a model and its tokenizer by the name that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dspa.distributed import device_named
from dspa.errors import refusal
from dspa.models.attention import use_same_function
from dspa.models.gguf import converted_folder
from dspa.models.layers import CausalLM
from dspa.models.places import model_place, reading_model

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(
    model: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Return a causal language model, in evaluation mode, and its tokenizer.

    A GGUF file is dequantized, once: `$DSPA_CACHE/gguf`, by default `~/.cache/dspa/gguf`, keeps its model.

    Args:
        model: a folder, a GGUF file or a folder that holds one, or a name on the Hub.
        dtype: "bfloat16", "float16", "float32", or "auto": that of its files, for quantized GGUF weights bfloat16.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto": "cuda" where there is one.
        trust_remote_code: run Python code that comes with the model, if transformers has none for it.

    Raises:
        ValueError: there is no such model, dtype or device, or the model cannot be read, is quantized for another
            dtype, or brings code that is not trusted.
        RuntimeError: a package that reads GGUF files is not installed.
        OSError: the Hub has no such model or cannot be reached, or a GGUF file was not converted, because the cache
            cannot be written.
    """
    if dtype not in DTYPES:
        raise refusal(ValueError, "`dtype`", repr(dtype), ", ".join(DTYPES))
    device, place = device_named(device), model_place(str(model))
    folder = str(converted_folder(Path(place.path), dtype)) if place.gguf_file else place.name
    with reading_model(place):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    _check_quantized(loaded, dtype, trust_remote_code)
    if place.gguf_file:
        # The conversion may be made again, elsewhere; the file is what a map records.
        loaded.config.name_or_path = place.path
    use_same_function(loaded)
    return loaded.to(device).eval(), tokenizer


def _check_quantized(model: CausalLM, dtype: str, trust_remote_code: bool) -> None:
    """Raise `ValueError` if a quantized model was asked for in another dtype than its layers compute in."""
    if dtype == "auto" or getattr(model, "hf_quantizer", None) is None:
        return
    name = model.config.name_or_path
    stored = str(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).dtype).removeprefix("torch.")
    if dtype != stored:
        got = f"{dtype!r}, and {name} is quantized for {stored}"
        raise refusal(ValueError, "`dtype`", got, f"auto, {stored}", "Or quantize the model anew.")
