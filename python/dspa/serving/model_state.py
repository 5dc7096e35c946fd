"""The state of a steered model, which vLLM's model runner tells of every request and every step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from dspa.serving.requests import parse
from dspa.serving.settings import ServingSettings
from dspa.serving.state import ServingState


class SteeredModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's state of a decoder, and ours beside it."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = ServingSettings.of(vllm_config.model_config.hf_config)
        assert settings is not None
        self.steering = ServingState(settings, self.max_num_reqs, self.max_num_tokens, device, self.dtype)
        model.steer_with(self.steering)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Give a row to a request, new or resumed after a preemption."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        request = parse(params.extra_args, self.steering.settings) if params else None
        if request is not None and new_req_data.num_computed_tokens:
            raise RuntimeError(
                "dspa: a steered request came with tokens from the prefix cache, whose latents are not known."
            )
        # Not the length of what is computed again, which after a preemption holds answered tokens too.
        self.steering.begin(req_index, request and request.of_prompt(new_req_data.prompt_len))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Say which request each token of the step belongs to, before the step or its graph runs."""
        if all(req_id in req_states.req_id_to_index for req_id in input_batch.req_ids):
            n_tokens, n_requests = input_batch.num_tokens, input_batch.num_reqs
            self.steering.batch.place(
                input_batch.idx_mapping[:n_requests],
                input_batch.query_start_loc[: n_requests + 1],
                input_batch.positions[:n_tokens],
            )
        else:
            # A dummy batch, for profiling or capture.
            self.steering.batch.place_nothing()
        prepared: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return prepared
