"""An engine in a process of its own: it reads a job as JSON, answers all of its requests at once, and writes JSON.

A job has `options` of the engine, `prompts` as token ids, `requests` as [number of a prompt, extra_args], `rounds`, and
`sampling`. An answer has, by round, the token ids of each request, the number of prompt tokens from the cache and the
log-probabilities of the tokens.
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
    rounds = []
    for _ in range(job.get("rounds", 1)):
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
    preemptions = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    return {"rounds": rounds, "preemptions": sum(preemptions)}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))
