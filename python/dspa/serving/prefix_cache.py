"""The prefix cache of a steered engine: which blocks requests share, and what lies beside them.

A plan needs the latents of all tokens of a prompt, and a prompt that is in the cache is not computed again. So the
active latents of prompt tokens are kept, a bit each, in the slots of their keys and values. Keys and values that were
computed under edits serve no other steering: a block's hash, by which vLLM knows it, has the steering in it from the
first edited token on. Blocks before that are shared by all prompts that are steered by a map and begin alike, and not
with other requests, whose latents nobody computes. Requests without a map share theirs with those that are not steered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dspa.errors import ModelError
from dspa.serving.requests import first_edited, keys
from dspa.serving.settings import KEY, ServingSettings
from dspa_kernels import n_words

WORD = 4  # bytes


@dataclass(frozen=True)
class CacheSlots:
    """The slots of the key/value cache that hold all tokens of a request: tensors at fixed addresses.

    Attributes:
        n_slots: number of slots.
        block_size: slots of a block.
        slots: [n_tokens] int64, the slot of each token of a step, negative for padding.
        blocks: [R, max_blocks] int32, the blocks of each request.
    """

    n_slots: int
    block_size: int
    slots: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, kv_cache_config: Any, block_tables: Any) -> CacheSlots:
        """Return the slots of vLLM's `KVCacheConfig` and `BlockTables`.

        Raises:
            ModelError: a model of which no layer keeps all tokens.
        """
        group, block_size = _all_tokens(kv_cache_config)
        return cls(
            n_slots=kv_cache_config.num_blocks * block_size,
            block_size=block_size,
            slots=block_tables.slot_mappings[group],
            blocks=block_tables.block_tables[group].gpu,
        )


def _all_tokens(kv_cache_config: Any) -> tuple[int, int]:
    """Return the number and block size of a group of layers that keep all tokens, not those of a window alone."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        layer = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if isinstance(layer, FullAttentionSpec):
            return number, spec.block_size
    raise ModelError(
        "Each layer of the model attends to a window alone, so that the key/value cache does not keep a whole prompt, "
        "beside which its latents are kept. Start the engine with --disable-sliding-window, for prompts of one window."
    )


def with_room(get_kv_cache_configs: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's planner of the cache that leaves room for the latents beside it, of the same memory."""

    def planned(vllm_config: Any, kv_cache_specs: Any, available_memory: list[int]) -> Any:
        settings = ServingSettings.of(vllm_config.model_config.hf_config)
        configs = get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory)
        if settings is None or not settings.maps:
            return configs
        n_slots = min(config.num_blocks * _all_tokens(config)[1] for config in configs)
        words = sum(n_words(d_sae) for d_sae in settings.latent_spaces.values())
        latents, available = n_slots * words * WORD, min(available_memory)
        share = available / (available + latents)
        return get_kv_cache_configs(vllm_config, kv_cache_specs, [int(memory * share) for memory in available_memory])

    return planned


def with_steering(extra_keys: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's function of what a block's hash has beside its tokens, with the steering of its request."""

    def extended(request: Any, start: int, end: int, *args: Any) -> Any:
        others, *rest = extra_keys(request, start, end, *args)
        steering = _block_key(request.sampling_params, end)
        return ((*(others or ()), steering) if steering else others), *rest

    return extended


def _block_key(sampling_params: Any, end: int) -> tuple[str, str] | None:
    """Return what sets a block apart whose last token is before position `end`, None for one that plain vLLM makes."""
    asked = keys(sampling_params.extra_args if sampling_params else None)
    if asked.get(KEY) != "on":
        return None
    # vLLM's keys are a tag and a value. Those who listen to its events get the value alone.
    if end > first_edited(asked):
        return KEY, f"{KEY} {sorted(asked.items())}"
    # Only requests with a map keep the latents of their prompts.
    return (KEY, f"{KEY} prompt") if "dspa_map" in asked else None
