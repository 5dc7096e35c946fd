"""Files of answers in the layouts of FastChat (MT-Bench) and AlpacaEval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dspa.evaluate.answers.folder import MethodRecord
from dspa.evaluate.benchmarks import Benchmark, BenchmarkQuestion
from dspa.files import digest_of

# FastChat's; other categories get its 0.7 too.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


def temperature_of(benchmark: Benchmark, question: BenchmarkQuestion) -> float:
    """Return the temperature at which a question is answered by default."""
    if benchmark.layout == "AlpacaEval":
        return OTHER_TEMPERATURE
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def answer_files(
    benchmark: Benchmark,
    method: MethodRecord,
    seeds: Sequence[int],
    answers: Mapping[int | str, Sequence[list[str]]],
    ended: Mapping[int | str, float],
) -> dict[str, bytes]:
    """Return the files of one method by their names.

    Args:
        benchmark: the questions.
        method: the method.
        seeds: the seeds. FastChat's file has a choice per seed; AlpacaEval gets a file per seed.
        answers: by the id of a question, the texts of all turns, for each seed.
        ended: by the id of a question, the time at which its last answer was finished, in seconds since 1970.
    """
    questions, name = benchmark.questions.values(), method.id
    if benchmark.layout == "FastChat":
        lines = [
            {
                "question_id": question.id,
                "answer_id": digest_of([method.digest, question.id]),
                "model_id": name,
                "choices": [{"index": n, "turns": turns} for n, turns in enumerate(answers[question.id])],
                "tstamp": ended[question.id],
            }
            for question in questions
        ]
        return {f"{name}.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()}
    files = {}
    for n, seed in enumerate(seeds):
        outputs = [
            ({} if question.category == "all" else {"dataset": question.category})
            | {"instruction": question.turns[0], "output": answers[question.id][n][0], "generator": name}
            for question in questions
        ]
        file = f"{name}.seed-{seed}.json" if len(seeds) > 1 else f"{name}.json"
        files[file] = json.dumps(outputs, ensure_ascii=False, indent=1).encode()
    return files
