"""`bench.serving` on a CPU and a tiny model, as rehearsal: what it writes says that it is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import HERE, engine_environment

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")


def test_a_rehearsal(make_world: Any, tmp_path: Path) -> None:
    world = make_world("llama")
    words = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "128"]
    command = [sys.executable, "-m", "bench.serving", world.model, "--map", world.map, "--graphs", "NONE"]
    command += ["--batch", "1", "--batch", "4", "--n-in", "12", "--n-out", "4", "--n-batches", "1", "--rounds", "1"]
    command += [f"--option={word}" for word in words]
    places = ("--sae-in", world.place("sae_in"), "--sae-out", world.place("sae_out"), "--alpha", "1", "--mode", "both")
    command += [f"--steering={word}" for word in places]
    out = tmp_path / "results.json"
    done = subprocess.run(
        [*command, "--out", str(out)],
        env=engine_environment(),
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    written = json.loads(out.read_text())
    assert written["device"] == "cpu" and "per second on cpu" in done.stdout
    results = {(result["requests"], result["batch"]): result for result in written["results"]}
    assert set(results) == {(name, size) for name in ("plain", "idle", "half", "all") for size in (1, 4)}
    assert all(result["tokens_s"] > 0 and result["answers"] == result["batch"] for result in results.values())
    # As many answers are steered as should be.
    changed = {name: results[name, 4]["changed"] for name in ("plain", "idle", "half", "all")}
    assert changed["plain"] == changed["idle"] == 0 < changed["half"] <= 2 < changed["all"] <= 4
