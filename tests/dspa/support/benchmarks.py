"""Files of questions and answers in the layouts of MT-Bench (FastChat) and AlpacaEval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def question(number: int, category: str, *turns: str, **more: Any) -> dict[str, Any]:
    return {"question_id": number, "category": category, "turns": list(turns), **more}


def answer(number: int, method: str, *seeds: Sequence[str]) -> dict[str, Any]:
    """A record of FastChat with one choice per seed."""
    choices = [{"index": n, "turns": list(turns)} for n, turns in enumerate(seeds)]
    return {
        "question_id": number,
        "answer_id": f"{method}-{number}",
        "model_id": method,
        "choices": choices,
        "tstamp": 0.5,
    }


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_list(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text(json.dumps(list(records)))
    return path
