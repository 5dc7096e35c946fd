"""What the metadata of an SAE say of the residual that it reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dspa.errors import SAEError, refusal

RESIDUAL_HOOKS = (
    r"blocks\.(\d+)\.hook_resid_(?:post|pre)",
    r"(?:\w+\.)*(?:layers|h)\.(\d+)",
    r"resid_post_layer_(\d+)",
)
# The arguments with which SAELens loaded the model.
LOADED_WITH = "model_from_pretrained_kwargs"
# The setting of TransformerLens that takes the mean over d_in out of the residual.
CENTERED = "center_writing_weights"
MAIN = ("revision", "main")
# Other arguments with which TransformerLens and transformers load a model. These move weights about inside of it,
# choose how it is stored and computed, or are for its tokenizer: residuals stay the same but for rounding.
SAME_RESIDUAL = frozenset(
    {
        *("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices", "first_n_layers"),
        *("tokenizer", "default_prepend_bos", "default_padding_side", "n_ctx", "move_to_device", "device", "n_devices"),
        *("dtype", "torch_dtype", "load_in_8bit", "load_in_4bit", "quantization_config", "attn_implementation"),
        *("device_map", "tp_plan", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict"),
        *("low_cpu_mem_usage", "cache_dir", "force_download", "resume_download", "local_files_only", "proxies"),
        *("token", "use_auth_token", "trust_remote_code", "use_safetensors", "weights_only"),
    }
)


def layer_of_hook(name: str, hook: str) -> int:
    """Return the decoder layer whose output is the residual stream at a hook.

    `hook_resid_pre` of a block is the output of the layer before it.

    Args:
        name: name of the SAE in messages.
        hook: its place in the model, as the SAE calls it.

    Raises:
        SAEError: any other place.
    """
    match = next(filter(None, (re.fullmatch(pattern, hook) for pattern in RESIDUAL_HOOKS)), None)
    layer = -1 if match is None else int(match[1]) - hook.endswith("hook_resid_pre")
    if layer < 0:
        raise refusal(
            SAEError,
            f"{name}: the place of this SAE",
            repr(hook),
            "the output of a decoder layer: blocks.{i}.hook_resid_post, blocks.{i}.hook_resid_pre (i >= 1), "
            "model.layers.{i}, layers.{i}, transformer.h.{i}, gpt_neox.layers.{i}, resid_post_layer_{i}",
            "Choose an SAE of the residual stream.",
        )
    return layer


def is_centered(name: str, loaded_with: Mapping[str, Any]) -> bool:
    """Return True if an SAE was trained on residuals less their mean over d_in.

    Args:
        name: name of the SAE in messages.
        loaded_with: the arguments that its model was loaded with, LOADED_WITH of its metadata.

    Raises:
        SAEError: arguments that name other weights, such as a checkpoint, and unknown ones.
    """
    # None is each argument's default, and "main" the default revision.
    given = {key: value for key, value in loaded_with.items() if value is not None and (key, value) != MAIN}
    centered = given.pop(CENTERED, False)
    if other := {key: value for key, value in given.items() if key not in SAME_RESIDUAL}:
        raise refusal(
            SAEError,
            f"{name}: `{LOADED_WITH}`",
            ", ".join(f"{key}={value!r}" for key, value in other.items()),
            f"{CENTERED}, and what leaves residuals as they are, such as fold_ln or dtype",
            "The SAE may belong to other weights than the model's name says. If your model is loaded in this way, "
            "remove this entry from the SAE's metadata (in cfg.json, or in `sae.cfg.metadata` for from_sae_lens).",
        )
    if not isinstance(centered, bool):
        raise refusal(SAEError, f"{name}: `{CENTERED}`", repr(centered), "true or false")
    return centered


@contextmanager
def without_model_advice() -> Iterator[None]:
    """Silence SAELens' warning that a centred SAE needs a model with centred weights, which is not so here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=rf"\s*This SAE has non-empty {LOADED_WITH}")
        yield
