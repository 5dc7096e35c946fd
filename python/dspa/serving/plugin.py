"""The plugin that vLLM loads in each of its processes: it knows the architectures, and checks requests as they come."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from dspa.errors import ModelError, refusal
from dspa.serving.prefix_cache import with_room, with_steering
from dspa.serving.requests import SteeringRequest, keys, parse, places
from dspa.serving.settings import ARCHITECTURES, KEY, PREFIX, ServingSettings
from dspa.serving.versions import is_supported

Wrapper: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
BEAM_SEARCH = "dspa: beam search grows the prompt with each token, so that it cannot be steered. Use sampling."


def register() -> None:
    """Attach this package to vLLM, or warn where that cannot be done: vLLM then serves, but knows no steered model."""
    try:
        attach()
    except RuntimeError as error:
        warnings.warn(f"dspa: no engine can be steered here. {error}", stacklevel=2)


def attach() -> None:
    """Add the steered architectures, and the checks of requests. A version of vLLM that is not known gets neither.

    Raises:
        RuntimeError: a vLLM without something that the checks need. Nothing is added then.
    """
    if not is_supported():
        return
    # Whatever fails here: vLLM is another than was known, and must start all the same.
    try:
        from vllm import ModelRegistry

        doors = _doors()
        for owner, name, _ in doors:
            getattr(owner, name)
    except Exception as error:
        raise refusal(
            RuntimeError,
            "vLLM",
            f"without something by which requests are checked ({type(error).__name__}: {error})",
            "one whose insides are known, such as 0.32.0",
            "Install that, or a newer dspa-kernels.",
        ) from error
    for door in doors:
        wrap(*door)
    for architecture in ARCHITECTURES:
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"dspa.serving.models:{name}")


def wrap(owner: Any, name: str, wrapper: Wrapper) -> None:
    """Replace a function of vLLM by what `wrapper` makes of it, once."""
    original = getattr(owner, name)
    if not hasattr(original, "dspa_wrapped"):
        wrapped: Any = functools.update_wrapper(wrapper(original), original)
        wrapped.dspa_wrapped = original
        setattr(owner, name, wrapped)


def _doors() -> list[tuple[Any, str, Wrapper]]:
    """Return the functions of vLLM that this package wraps, as owner, name, and wrapper.

    Through them come requests, and the blocks of the key/value cache.
    """
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine import core
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    from dspa.serving.http import with_batch_checked, with_places_checked

    return [
        (app, "register_api_routers", with_places_checked),
        (BatchRequestInput, "model_validate_json", with_batch_checked),
        (ChatCompletionRequest, "to_beam_search_params", _without_keys),
        (CompletionRequest, "to_beam_search_params", _without_keys),
        (BeamSearchOfflineMixin, "beam_search", _without_steer_all),
        (BeamSearchOnlineMixin, "beam_search", _without_steer_all),
        (core, "get_kv_cache_configs", with_room),
        (kv_cache_utils, "generate_block_hash_extra_keys", with_steering),
        (block_pool, "generate_block_hash_extra_keys", with_steering),
        (InputProcessor, "__init__", _of_one_kind),
        (InputProcessor, "process_inputs", _checked),
        (LLMEngine, "add_request", _checked_if_built),
        (AsyncLLM, "add_request", _checked_if_built),
    ]


def _of_one_kind(init: Callable[..., None]) -> Callable[..., None]:
    """Return `InputProcessor.__init__` that refuses settings of steering beside a model that would ignore them."""

    def checked(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        model = vllm_config.model_config
        self.dspa_settings = ServingSettings.of(model.hf_config)
        self.dspa_ranks = vllm_config.parallel_config.tensor_parallel_size
        if self.dspa_settings is not None and not model.architecture.startswith(PREFIX):
            raise refusal(
                ModelError,
                f"The architecture beside the settings of `{KEY}`",
                model.architecture,
                f"{PREFIX}... of vllm_options",
                "Pass on what it returns as it is, without model_impl or an architecture of your own.",
            )
        init(self, vllm_config, *args, **kwargs)

    return checked


def _checked(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Return `InputProcessor.process_inputs` that refuses what cannot be steered.

    What fails behind it ends the engine, and what fails here is a message to the client.
    """

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        check_request(request, self.dspa_settings, self.dspa_ranks)
        return request

    return checked


def _checked_if_built(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Return an engine's `add_request` that checks a request which a caller built, and `process_inputs` did not."""

    def checked(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        if isinstance(prompt, EngineCoreRequest):
            processor = self.input_processor
            check_request(prompt, processor.dspa_settings, processor.dspa_ranks)
        return add_request(self, request_id, prompt, *args, **kwargs)

    return checked


def check_request(request: Any, settings: ServingSettings | None, n_ranks: int = 1) -> None:
    """Check a request, and put what was found in it into its parameters.

    Args:
        request: an `EngineCoreRequest` of vLLM.
        settings: settings of the engine, None if it does not steer.
        n_ranks: tensor-parallel processes of the engine.

    Raises:
        VLLMValidationError: steering that the engine cannot do.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        steering = _steering_of(request, settings)
        if n_ranks > 1 and steering is not None and steering.gate is not None and steering.gate.reads_logits:
            advice = "Serve with one rank, or use another gate."
            raise refusal(ValueError, "`dspa_gate`", f"by entropy, with {n_ranks} ranks", "one rank", advice)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if steering is not None:
        # In full, so that the engine's other processes need nothing else.
        params = request.sampling_params
        params.extra_args = (params.extra_args or {}) | steering.keys


def _steering_of(request: Any, settings: ServingSettings | None) -> SteeringRequest | None:
    """Return the steering that a request asks for, None for none; raise `ValueError` if it cannot have it."""
    sampling, pooling = request.sampling_params, request.pooling_params
    extra_args = sampling.extra_args if sampling else pooling.extra_kwargs if pooling else None
    asked = keys(extra_args)
    if inner := [place for place in places(extra_args) if place not in asked]:
        raise ValueError(f"{', '.join(inner)}: put it into `extra_args` itself.")
    if settings is None:
        if asked:
            raise ValueError(f"{', '.join(asked)}: this engine does not steer. Start it with dspa serve.")
        return None
    steering = parse(asked, settings)
    if steering is None:
        return None
    if sampling is None:
        raise ValueError("dspa: a request without sampling, as for embeddings, cannot be steered. Pass dspa: 'off'.")
    if request.prompt_embeds is not None or request.mm_features:
        raise ValueError("dspa: a steered prompt is text alone, and this one has embeddings or images.")
    if request.resumable:
        raise ValueError("dspa: a steered prompt comes as a whole, and this one is streamed.")
    if request.lora_request is not None:
        raise ValueError(
            "dspa: what steers is made for a model's own weights, and this request changes them by a LoRA."
        )
    return steering.of_prompt(len(request.prompt_token_ids))


def _without_keys(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of an HTTP request that refuses beam search with steering: its parameters would lose that."""

    def unsteered(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = keys(self.vllm_xargs)
        _refuse_beam_search(bool(asked) and asked.get(KEY) != "off")
        return to_beam_search_params(self, *args, **kwargs)

    return unsteered


def _without_steer_all(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    """Return beam search that an engine which steers all requests refuses: it makes requests of its own."""

    def unsteered(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.llm_engine if hasattr(self, "llm_engine") else self.engine_client
        settings = ServingSettings.of(engine.vllm_config.model_config.hf_config)
        _refuse_beam_search(settings is not None and settings.steer_all)
        return beam_search(self, *args, **kwargs)

    return unsteered


def _refuse_beam_search(steered: bool) -> None:
    from vllm.exceptions import VLLMValidationError

    if steered:
        raise VLLMValidationError(BEAM_SEARCH, parameter="use_beam_search")
