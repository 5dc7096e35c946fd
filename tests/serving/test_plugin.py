"""`dspa.serving.plugin`: what it adds to vLLM, and what it does where that cannot be added."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dspa.serving.settings import ServingSettings
from tests.serving.test_requests import map_place

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

SETTINGS = ServingSettings(model="m", maps={"default": map_place("/a")})


def missing_module(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.launchers.run_batch", None)
    return "vllm.entrypoints.launchers.run_batch"


def missing_method(monkeypatch: pytest.MonkeyPatch) -> str:
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.delattr(InputProcessor, "process_inputs")
    return "process_inputs"


@pytest.mark.parametrize("remove", [missing_module, missing_method])
def test_a_vllm_without_something_serves_plainly(remove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import ModelRegistry

    from dspa.serving import plugin

    def register_model(*args: Any) -> None:
        pytest.fail("an architecture was added without the checks of its requests")

    monkeypatch.setattr(ModelRegistry, "register_model", register_model)
    missing = remove(monkeypatch)
    with pytest.warns(UserWarning, match=f"no engine can be steered here.*{missing}"):
        plugin.register()
    with pytest.raises(RuntimeError, match=missing):
        plugin.attach()


def request(**changes: Any) -> Any:
    """A request as `process_inputs` returns it, as far as it is checked."""
    from vllm import SamplingParams

    plain: dict[str, Any] = dict.fromkeys(("pooling_params", "prompt_embeds", "mm_features", "lora_request"))
    plain |= {"prompt_token_ids": [1, 2, 3], "resumable": False, "cache_salt": None}
    return SimpleNamespace(**plain | {"sampling_params": SamplingParams(extra_args={"dspa": "on"})} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_args": {"dspa_alfa": 1}}, "`dspa_alfa` is not known"),
        ({"extra_args": {"dspa_start": 4}}, "`dspa_start` is 4; accepted: 1 to 3"),
        ({"extra_args": {"extra_args": {"dspa": "on"}}}, "extra_args.dspa: put it into `extra_args` itself"),
        ({"extra_kwargs": {"dspa": "on"}}, "a request without sampling"),
        ({"prompt_embeds": object()}, "a steered prompt is text alone"),
        ({"mm_features": [object()]}, "a steered prompt is text alone"),
        ({"resumable": True}, "a steered prompt comes as a whole"),
        ({"lora_request": object()}, "by a LoRA"),
    ],
)
def test_requests_that_cannot_be_steered(changes: dict[str, Any], message: str) -> None:
    from vllm import PoolingParams, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from dspa.serving.plugin import check_request

    if "extra_args" in changes:
        changes = {"sampling_params": SamplingParams(extra_args=changes["extra_args"])}
    if "extra_kwargs" in changes:
        changes = {"sampling_params": None, "pooling_params": PoolingParams(extra_kwargs=changes["extra_kwargs"])}
    check_request(request(), SETTINGS)
    with pytest.raises(VLLMValidationError, match=message):
        check_request(request(**changes), SETTINGS)


def test_gates_by_entropy_are_for_one_rank() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from dspa.serving.plugin import check_request

    check_request(request(sampling_params=SamplingParams(extra_args={"dspa_gate": "entropy"})), SETTINGS, 1)
    first = {"dspa_gate": "first", "dspa_gate_n": 1}
    check_request(request(sampling_params=SamplingParams(extra_args=first)), SETTINGS, 2)
    with pytest.raises(VLLMValidationError, match="`dspa_gate` is by entropy, with 2 ranks; accepted: one rank"):
        check_request(request(sampling_params=SamplingParams(extra_args={"dspa_gate": "entropy"})), SETTINGS, 2)


def test_an_engine_without_steering_refuses_keys() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from dspa.serving.plugin import check_request

    check_request(request(sampling_params=SamplingParams()), None)
    with pytest.raises(VLLMValidationError, match="dspa: this engine does not steer"):
        check_request(request(), None)
