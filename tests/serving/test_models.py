"""`dspa.serving.models`: the engines that are refused, each for one setting."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspa.errors import ModelError
from dspa.serving.settings import ServingSettings
from tests.serving.conftest import PROMPTS, World

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")


@pytest.fixture(scope="module")
def world(make_world: Callable[[str], World]) -> World:
    return make_world("llama")


def engine_config(world: World) -> Any:
    """The settings of an engine that `check_engine` reads."""
    return SimpleNamespace(
        use_v2_model_runner=True,
        kv_transfer_config=None,
        speculative_config=None,
        weight_transfer_config=None,
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(dspa=world.options()["hf_overrides"]["dspa"]),
            model=world.model,
            dtype=torch.bfloat16,
            enable_sleep_mode=False,
            enable_prompt_embeds=False,
            revision=None,
            runner_type="generate",
            quantization=None,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_ubatching=False,
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
    )


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_v2_model_runner", False, "model runner V1"),
        ("kv_transfer_config", object(), "a KV connector"),
        ("weight_transfer_config", object(), "weight transfer"),
        ("model_config.hf_config.dspa", None, "no settings beside it"),
        ("model_config.model", "another/model", "The engine's model is 'another/model'"),
        ("model_config.dtype", torch.float16, "float16"),
        ("model_config.enable_sleep_mode", True, "sleep mode"),
        ("model_config.enable_prompt_embeds", True, "prompt embeddings"),
        ("model_config.revision", "v2", "a revision"),
        ("model_config.runner_type", "pooling", "a runner other than generate"),
        ("model_config.quantization", "fp8", "quantization of weights"),
        ("speculative_config", object(), "speculative decoding"),
        ("load_config.load_format", "dummy", "dummy weights"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config.use_ubatching", True, "micro-batches"),
        ("compilation_config.pass_config.enable_sp", True, "sequence parallelism"),
    ],
)
def test_an_engine_that_cannot_steer(setting: str, value: object, message: str, world: World) -> None:
    from dspa.serving.models import check_engine

    config = engine_config(world)
    check_engine(config)
    owner = config
    *path, name = setting.split(".")
    for part in path:
        owner = getattr(owner, part)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    with pytest.raises(ModelError, match=message):
        check_engine(config)


def test_a_quantized_checkpoint_is_served(world: World) -> None:
    """Its weights are those that were checked."""
    from dspa.serving.models import check_engine

    config = engine_config(world)
    config.model_config.quantization = "compressed-tensors"
    config.model_config.hf_config.quantization_config = {"quant_method": "compressed-tensors"}
    check_engine(config)


def test_the_rust_frontend_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests reach an engine without `InputProcessor`, which checks them."""
    from dspa.serving.models import check_engine

    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ModelError, match="Rust frontend"):
        check_engine(engine_config(world))


def test_settings_beside_another_architecture(world: World, run_engine: Callable[..., dict[str, Any]]) -> None:
    """A model of vLLM's own would answer without steering."""
    options = world.options()
    del options["hf_overrides"]["architectures"]
    with pytest.raises(AssertionError, match="beside the settings of `dspa` is LlamaForCausalLM"):
        run_engine(options=options, prompts=PROMPTS[:1], requests=[[0, {"dspa": "on"}]])


def test_a_process_has_one_engine(world: World) -> None:
    """Graphs that vLLM keeps hold the name of their engine."""
    from dspa.serving.models import ENGINE, Steered
    from dspa.serving.state import STATES, ServingState

    settings = ServingSettings.of(engine_config(world).model_config.hf_config)
    assert settings is not None

    def start() -> ServingState:
        model: Any = Steered.__new__(Steered)
        model.model = SimpleNamespace(layers=[torch.nn.Identity() for _ in range(4)])
        state = ServingState(settings, 2, 8, torch.device("cpu"))
        model.steer_with(state)
        return state

    first = start()
    with pytest.raises(ModelError, match="one steered engine"):
        start()
    assert STATES[ENGINE] is first
    del first
    start()
