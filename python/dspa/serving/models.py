"""vLLM's models with two layers that steer: `DspaLlamaForCausalLM` and so on, made when they are asked for."""

from __future__ import annotations

import gc
from typing import Any

import torch
from vllm import ModelRegistry, envs

from dspa.errors import ModelError, listed, refusal
from dspa.serving import ops
from dspa.serving.settings import ARCHITECTURES, PREFIX, ServingSettings
from dspa.serving.state import STATES, ServingState
from dspa.serving.versions import check_version

# Compiled graphs, which vLLM keeps for other processes, hold it: so it is the same in all of them.
ENGINE = "dspa"


class Steered:
    """A model whose layers at the two SAEs count and edit, mixed into a class of vLLM."""

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

    def steer_with(self, state: ServingState) -> None:
        """Let the layers of the SAEs count and edit with `state`.

        Raises:
            ModelError: SAEs of layers that the model does not have, or a second engine in one process.
        """
        layers, steerers = self.model.layers, state.steerers  # type: ignore[attr-defined]
        l_in, l_out = steerers.layer_in, steerers.layer_out
        if not 0 <= l_in < l_out < len(layers):
            raise ModelError(f"The SAEs sit at layers {l_in} and {l_out}, and the model has {len(layers)} layers.")
        # One that was dropped may wait for Python's collection.
        gc.collect()
        if ENGINE in STATES:
            raise ModelError(
                "A process has one steered engine, and this is another. Delete the first, or start another process."
            )
        STATES[ENGINE] = state
        for layer, op in ((layers[l_in], ops.count), (layers[l_out], ops.edit)):
            layer.dspa_counts = state.counts
            layer.__class__ = _with_op(type(layer), op)


def _with_op(base: type, op: Any) -> type:
    """Return a class of decoder layers that calls an op on what `base` returns."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        hidden, residual = out if isinstance(out, tuple) else (out, None)
        op(hidden, residual, self.dspa_counts, ENGINE)
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
