"""The options of a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspa.cli.loading import open_judge
from dspa.cli.options import JudgeOptions
from dspa.judges.judge import PARAMETERS


def test_a_judge_of_options(tmp_path: Path):
    replayed = open_judge(JudgeOptions(replay=True, judge_model="m"), tmp_path)
    assert replayed is not None
    assert (replayed.url, replayed.model, replayed.replay, replayed.parameters) == (None, "m", True, PARAMETERS)
    given = JudgeOptions(None, "m", tmp_path, '{"temperature": 1}', replay=True)
    judge = open_judge(given, tmp_path)
    assert judge is not None and judge.parameters == {"temperature": 1}
    assert open_judge(JudgeOptions(), tmp_path) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge_model": "m"}, "Without --judge there is no use for --judge-model"),
        ({"replay": True}, "--judge-model is missing"),
        ({"replay": True, "judge_model": "m", "judge_parameters": "[1]"}, "--judge-parameters is .*a JSON object"),
        ({"replay": True, "judge_model": "m", "judge_parameters": "{"}, "--judge-parameters is not JSON"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        open_judge(JudgeOptions(**given), tmp_path)
