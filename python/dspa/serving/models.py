"""vLLM's models with layers that steer: `DspaLlamaForCausalLM` and so on, made when they are asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from vllm import ModelRegistry, envs
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from dspa.errors import ModelError, listed, refusal
from dspa.serving import ops
from dspa.serving.plugin import wrap
from dspa.serving.settings import ARCHITECTURES, PREFIX, ServingSettings
from dspa.serving.state import STATES, ServingState
from dspa.serving.versions import check_version

# Compiled graphs, which vLLM keeps for other processes, hold it: so it is the same in all of them.
ENGINE = "dspa"
OTHER_WEIGHTS = (
    "dspa: the maps of a steered engine are made for the weights that it started with, and these would change them. "
    "Start another engine."
)


class Steered:
    """A model some of whose layers are read and edited, mixed into a class of vLLM."""

    started = False

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        check_version()
        check_engine(vllm_config)
        # Of vLLM's class, which comes after this one.
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class by which vLLM's model runner tells of requests and steps."""
        from dspa.serving.model_state import SteeredModelState

        return SteeredModelState

    def load_weights(self, weights: Any) -> Any:
        """Load the weights that the engine starts with, and refuse any after them."""
        if self.started:
            raise ModelError(OTHER_WEIGHTS)
        return super().load_weights(weights)  # type: ignore[misc]

    def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits, which gates of requests may read."""
        logits = super().compute_logits(*args, **kwargs)  # type: ignore[misc]
        if self.started:
            STATES[ENGINE].gates.observe(logits)
        return logits

    def steer_with(self, state: ServingState) -> None:
        """Let the layers that a method needs be read and edited by `state`.

        Raises:
            ModelError: SAEs of layers that the model does not have, or a second engine in one process.
        """
        layers = self.model.layers  # type: ignore[attr-defined]
        touched = sorted(state.reads | state.writes)
        if touched[-1] >= len(layers):
            raise ModelError(f"The SAEs sit at layers {listed(touched)}, and the model has {len(layers)} layers.")
        # One that was dropped may wait for Python's collection.
        gc.collect()
        if ENGINE in STATES:
            raise ModelError(
                "A process has one steered engine, and this is another. Delete the first, or start another process."
            )
        STATES[ENGINE] = state
        self.started = True
        for name in ("reload_weights", "reset_weights"):
            wrap(Worker, name, _unless_steered)
        wrap(GPUModelRunner, "finish_requests", _forgotten)
        for number in touched:
            layers[number].dspa_order, layers[number].dspa_layer = state.order, number
            layers[number].__class__ = _steered(type(layers[number]), number in state.reads, number in state.writes)


def _unless_steered(change_weights: Callable[..., None]) -> Callable[..., None]:
    """Return a method of vLLM's worker, which takes weights apart before it loads others, without a steered model."""

    def refused(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.get_model(), Steered):
            raise ModelError(OTHER_WEIGHTS)
        change_weights(self, *args, **kwargs)

    return refused


def _forgotten(finish_requests: Callable[..., None]) -> Callable[..., None]:
    """Return a method of vLLM's model runner after which requests that have ended leave nothing, if it is steered."""

    def forgotten(self: Any, scheduler_output: Any) -> None:
        finish_requests(self, scheduler_output)
        if isinstance(self.model, Steered):
            for request_id in scheduler_output.finished_req_ids:
                self.model_state.steering.gates.forget(request_id)

    return forgotten


def _steered(base: type, reads: bool, writes: bool) -> type:
    """Return a class of decoder layers whose outputs are read, or edited, or both."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        hidden, residual = out if isinstance(out, tuple) else (out, None)
        if reads:
            ops.read(hidden, residual, self.dspa_order, ENGINE, self.dspa_layer)
        if writes:
            ops.write(hidden, residual, self.dspa_order, ENGINE, self.dspa_layer)
        return out

    return type(f"{PREFIX}{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def check_engine(vllm_config: Any) -> None:
    """Raise `ModelError` for settings of an engine under which steering is wrong, or was never tried."""
    settings = ServingSettings.of(vllm_config.model_config.hf_config)
    if settings is None:
        raise ModelError(
            "The architecture is one of dspa's, and there are no settings beside it. Start the engine with dspa serve, "
            "or LLM(model, **dspa.serving.vllm_options(model, ...))."
        )
    if not vllm_config.use_v2_model_runner:
        raise ModelError(
            "The engine runs vLLM's model runner V1, which tells a model nothing of its requests; accepted: V2. Leave "
            "VLLM_USE_V2_MODEL_RUNNER and what excludes V2 as they are by default; on a CPU, see docs/serving.md."
        )
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    passes = vllm_config.compilation_config.pass_config
    if model.model != settings.model:
        raise refusal(ModelError, "The engine's model", repr(model.model), f"{settings.model!r}, which was checked")
    refused = {
        "pipeline parallelism: a plan would have to travel between stages": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism: no rank sees a whole prompt": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism, which was never tried": parallel.decode_context_parallel_size > 1,
        "micro-batches, as of dual batch overlap: a step runs as several": parallel.use_ubatching,
        # Versions differ in whether they have it.
        "sequence parallelism: the residual is split over ranks": getattr(passes, "enable_sp", False),
        "a KV connector: prompt tokens computed elsewhere are not counted": vllm_config.kv_transfer_config is not None,
        "weight transfer: a map is made for the weights that the engine starts with": (
            vllm_config.weight_transfer_config is not None
        ),
        "a revision, other than the one that was checked; download it to a folder": model.revision is not None,
        "the Rust frontend, which does not check requests": envs.VLLM_USE_RUST_FRONTEND,
        "float16: an edited residual can overflow, and reach other requests through the key/value cache": (
            model.dtype == torch.float16
        ),
        "a runner other than generate: what it answers is not steered": model.runner_type != "generate",
        "dummy weights: a map is made for a model's own": vllm_config.load_config.load_format == "dummy",
        "quantization of weights that were checked without it; save such a model, and make maps for it": (
            model.quantization is not None and getattr(model.hf_config, "quantization_config", None) is None
        ),
        "speculative decoding, which was never tried": vllm_config.speculative_config is not None,
        "sleep mode": model.enable_sleep_mode,
        "prompt embeddings": model.enable_prompt_embeds,
    }
    if chosen := [name for name, on in refused.items() if on]:
        raise ModelError(f"A steered engine cannot use {listed(chosen)}. Start it without.")


def __getattr__(name: str) -> type:
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry.models[architecture].load_model_cls()
    made = globals()[name] = type(name, (Steered, base), {"__module__": __name__})
    return made
