"""The state of a steered model, which vLLM's model runner tells of every request and every step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from dspa.serving.prefix_cache import CacheSlots
from dspa.serving.requests import parse
from dspa.serving.settings import ServingSettings
from dspa.serving.state import ServingState


class SteeredModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's state of a decoder, and ours beside it."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = ServingSettings.of(vllm_config.model_config.hf_config)
        assert settings is not None
        self.steering = ServingState(
            settings, self.max_num_reqs, self.max_num_tokens, device, self.dtype, self.max_model_len
        )
        self.cache: CacheSlots | None = None
        self.rows: dict[str, int] = {}
        model.steer_with(self.steering)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Keep the latents of prompts beside the key/value cache."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.steering.settings.maps:
            self.cache = CacheSlots.of(kv_cache_config, block_tables)
            self.steering.keep_beside(self.cache)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Give a row to a request, new or resumed after a preemption."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        request = parse(params.extra_args, self.steering.settings) if params else None
        # Not the length of what is computed again, which after a preemption holds answered tokens too.
        request = request and request.of_prompt(new_req_data.prompt_len)
        self.steering.begin(req_index, request)
        self.rows[new_req_data.req_id] = req_index
        self.steering.gates.begin(req_index, request, new_req_data.req_id, new_req_data.prompt_token_ids or ())

    def remove_request(self, req_id: str) -> None:
        """Take the row of a request that has ended, or is preempted."""
        super().remove_request(req_id)
        if (row := self.rows.pop(req_id, None)) is not None:
            self.steering.gates.keep(row, req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Say which request each token of the step belongs to, before the step or its graph runs."""
        if all(req_id in req_states.req_id_to_index for req_id in input_batch.req_ids):
            n_requests = input_batch.num_reqs
            rows, starts = input_batch.idx_mapping[:n_requests], input_batch.query_start_loc[: n_requests + 1]
            slots = None if self.cache is None else self.cache.slots
            self.steering.batch.place(rows, starts, input_batch.positions, slots)
            self.steering.gates.close(rows, starts, input_batch.positions)
        else:
            # A dummy batch, for profiling or capture.
            self.steering.batch.place_nothing()
        prepared: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return prepared
