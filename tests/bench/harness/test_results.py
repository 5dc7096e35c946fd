"""Files of results."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import results


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: results.append(path, {"n": n, "text": "x" * 5000}), range(200)))
    assert sorted(line["n"] for line in results.read(path)) == list(range(200))


def test_what_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, {"n": 1})
    path.write_text(path.read_text() + '{"n": 2')
    assert results.read(path) == [{"n": 1}]


def test_runs_begin_with_their_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [{"n": 0}, {"run": {"device": "a"}}, {"n": 1}, {"n": 2}, {"run": {"device": "b"}}, {"n": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert results.runs(path) == [
        {"device": "a", "lines": [{"n": 1}, {"n": 2}]},
        {"device": "b", "lines": [{"n": 3}]},
    ]
