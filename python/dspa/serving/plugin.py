"""The plugin that vLLM loads in each of its processes: it knows the architectures, and checks requests as they come."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

from dspa.errors import ModelError, refusal
from dspa.serving.requests import SteeringRequest, keys, parse
from dspa.serving.settings import ARCHITECTURES, KEY, PREFIX, ServingSettings
from dspa.serving.versions import is_supported

BEAM_SEARCH = "dspa: beam search grows the prompt with each token, so that it cannot be steered. Use sampling."


def register() -> None:
    """Add the steered architectures, and the checks of requests. A version of vLLM that is not known gets neither."""
    if not is_supported():
        return
    from vllm import ModelRegistry
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.v1.engine.input_processor import InputProcessor

    for architecture in ARCHITECTURES:
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"dspa.serving.models:{name}")
    _wrap(InputProcessor, "__init__", _of_one_kind)
    _wrap(InputProcessor, "process_inputs", _checked)
    for protocol in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _wrap(protocol, "to_sampling_params", _with_keys_in_place)
    for protocol in (ChatCompletionRequest, CompletionRequest):
        _wrap(protocol, "to_beam_search_params", _without_keys)
    for entry in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        _wrap(entry, "beam_search", _without_steer_all)


def _wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by what `wrapper` makes of it, once."""
    original = getattr(owner, name)
    if not hasattr(original, "dspa_wrapped"):
        wrapped: Any = functools.update_wrapper(wrapper(original), original)
        wrapped.dspa_wrapped = original
        setattr(owner, name, wrapped)


def _of_one_kind(init: Callable[..., None]) -> Callable[..., None]:
    """Return `InputProcessor.__init__` that refuses settings of steering beside a model that would ignore them."""

    def checked(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        model = vllm_config.model_config
        if ServingSettings.of(model.hf_config) is not None and not model.architecture.startswith(PREFIX):
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

    It is the one way of requests into an engine. What fails behind it ends the engine, and what fails here is a
    message to the client.
    """

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        params = request.sampling_params
        check_request(request, keys(params.extra_args if params else None), self.vllm_config.model_config.hf_config)
        return request

    return checked


def check_request(request: Any, asked: dict[str, Any], hf_config: Any) -> None:
    """Check a request, and keep a steered one apart from the prefix cache.

    Raises:
        VLLMValidationError: steering that the engine cannot do.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        steering = _steering_of(request, asked, ServingSettings.of(hf_config))
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if steering is None:
        return
    # Tokens from the cache have no latents that could be counted, and edited ones must serve no other request.
    request.sampling_params.skip_reading_prefix_cache = True
    request.cache_salt = f"{request.cache_salt or ''}dspa:{uuid.uuid4().hex}"


def _steering_of(request: Any, asked: dict[str, Any], settings: ServingSettings | None) -> SteeringRequest | None:
    """Return the steering that a request asks for, None for none; raise `ValueError` if it cannot have it."""
    if settings is None:
        if asked:
            raise ValueError(f"{', '.join(asked)}: this engine does not steer. Start it with dspa serve.")
        return None
    steering = parse(asked, settings)
    if steering is None:
        return None
    if request.sampling_params is None:
        raise ValueError("dspa: a request without sampling, as for embeddings, cannot be steered. Pass dspa: 'off'.")
    if request.prompt_embeds is not None or request.mm_features:
        raise ValueError("dspa: a steered prompt is text alone, and this one has embeddings or images.")
    if request.resumable:
        raise ValueError("dspa: a steered prompt comes as a whole, and this one is streamed.")
    if request.lora_request is not None:
        raise ValueError("dspa: a map is made for a model's own weights, and this request changes them by a LoRA.")
    return steering.of_prompt(len(request.prompt_token_ids))


def _with_keys_in_place(to_sampling_params: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of an HTTP request that refuses our keys beside `vllm_xargs`, where vLLM would ignore them."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if misplaced := keys(self.model_extra):
            raise VLLMValidationError(f"{', '.join(misplaced)}: put it into `vllm_xargs`.", parameter="vllm_xargs")
        return to_sampling_params(self, *args, **kwargs)

    return checked


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
