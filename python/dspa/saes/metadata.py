"""Metadata of an SAE: which residual it reads, and of which weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from dspa.errors import SAEError, refusal

# What stands before the list of layers in a path of transformers. A vision tower has lists of layers too.
_LANGUAGE_MODEL = "model|base_model|language_model|text_model|decoder|backbone|transformer|gpt_neox"
# Names of the residual stream after a decoder layer (0), and before one (1).
RESIDUAL_HOOKS = {
    r"blocks\.(\d+)\.hook_(?:resid_post|out)": 0,
    r"blocks\.(\d+)\.hook_(?:resid_pre|in)": 1,
    rf"(?:(?:{_LANGUAGE_MODEL})\.)*(?:layers|h|blocks)\.(\d+)": 0,
    r"resid_post_layer_(\d+)": 0,
}
# Places whose content is written to the residual stream, which is what centring changes.
WRITTEN = re.compile(r"resid|hook_(?:in|out|(?:attn|mlp)_(?:in|out))$")
# What names of other places have in them: parts of a layer, norms, embeddings, towers of other modalities.
ELSEWHERE = re.compile(
    r"attn|attention|mlp|ffn|feed_forward|moe|expert|router|proj|resid_mid|norm|(?:^|[._])ln|embed|hook_[a-z]$|hook_scale"
    r"|hook_pattern|transcoder|encoder|cross|vision|visual|image|audio|speech",
    re.IGNORECASE,
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


def residual_hook(hook: str) -> tuple[int, int] | None:
    """Return the decoder layer whose output an SAE reads, and the number of the layer in the name of its hook.

    They differ for the residual before a layer, which is the output of the layer before it. None for another place, and
    for a name that shows no layer but may be of the residual stream.
    """
    for pattern, before in RESIDUAL_HOOKS.items():
        if (match := re.fullmatch(pattern, hook)) and int(match[1]) >= before:
            return int(match[1]) - before, int(match[1])
    return None


def is_elsewhere(hook: str) -> bool:
    """Return True for the name of a place that is certainly not the output of a decoder layer."""
    is_residual = any(re.fullmatch(pattern, hook) for pattern in RESIDUAL_HOOKS)
    return residual_hook(hook) is None and (is_residual or bool(ELSEWHERE.search(hook)))


def refused_hook(name: str, hook: str, advice: str) -> SAEError:
    """Return the error for an SAE whose place is not known to be the output of a decoder layer."""
    accepted = (
        "the output of a decoder layer of a language model: blocks.{i}.hook_resid_post, blocks.{i}.hook_resid_pre "
        "(i >= 1), blocks.{i}.hook_out, model.layers.{i}, layers.{i}, transformer.h.{i}, gpt_neox.layers.{i}, "
        "resid_post_layer_{i}"
    )
    return refusal(SAEError, f"{name}: the place of this SAE", repr(hook), accepted, advice)


class Placed(Protocol):
    """An SAE or its file, which says where the SAE reads and writes."""

    @property
    def hook_name(self) -> str | None:
        """The place that it reads; None if unknown."""

    @property
    def transcoder(self) -> bool:
        """True if it computes the content of another place."""

    @property
    def hook_name_out(self) -> str | None:
        """The place that a transcoder computes; None if unknown."""

    @property
    def reshape_activations(self) -> str:
        """ "hook_z" for rows of attention heads, else "none"."""


def check_place(name: str, sae: Placed) -> None:
    """Raise `SAEError` for an SAE that certainly does not read and write the residual stream after a decoder layer."""
    if sae.hook_name is not None and is_elsewhere(sae.hook_name):
        raise refused_hook(name, sae.hook_name, "It encodes and decodes. For this, choose one of the residual stream.")
    if sae.transcoder or sae.reshape_activations != "none":
        got = f"a transcoder into {sae.hook_name_out}" if sae.transcoder else "one of attention heads"
        raise refusal(SAEError, f"{name}: the SAE", got, "one that reads and writes the residual stream")


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
