"""An engine in a process of its own: it reads a job as JSON, answers all of its requests at once, and writes JSON.

A job has `options` of the engine, `prompts` as token ids, `requests` as [number of a prompt, extra_args], `rounds`, and
`sampling`. An answer has, by round, the token ids of each request, the number of prompt tokens from the cache and the
log-probabilities of the tokens, and for all the number of preemptions and of blocks of the cache. Before the last round
come its `calls` of the worker and its `built` requests, as `extra_args`, which a caller builds in place of vLLM; the
answer has the errors of the calls, and of the built requests the token ids or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(**job["options"])
    sampling = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 1, "detokenize": False} | job.get(
        "sampling", {}
    )
    rounds, calls, built = [], [], []
    n_rounds = job.get("rounds", 1)
    for number in range(n_rounds):
        if number == n_rounds - 1:
            calls = [error_of(engine.collective_rpc, name) for name in job.get("calls", ())]
            built = [answer_to_built(engine, job["prompts"][n], extra, sampling) for n, extra in job.get("built", ())]
        outputs = engine.generate(
            [{"prompt_token_ids": job["prompts"][prompt]} for prompt, _ in job["requests"]],
            [SamplingParams(**sampling, extra_args=extra) for _, extra in job["requests"]],
            use_tqdm=False,
        )
        rounds.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens or 0,
                    "logprobs": [
                        place[token].logprob
                        for token, place in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                    ],
                }
                for output in outputs
            ]
        )
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    preemptions = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    return {"rounds": rounds, "preemptions": sum(preemptions), "blocks": blocks, "calls": calls, "built": built}


def error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except Exception as error:
        return str(error)
    return ""


def answer_to_built(engine: Any, prompt: list[int], extra: dict[str, Any], sampling: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(**sampling, extra_args=extra)
    request = EngineCoreRequest(
        request_id="built",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    if error := error_of(engine.llm_engine.add_request, "built", request, params):
        return error
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += engine.llm_engine.step()
    return list(outputs[-1].outputs[0].token_ids)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))
