"""Growing caches and other prompts compile no kernel in the middle of decoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_later_tokens_and_prompts_compile_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dspa.steering.compilations"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *later = json.loads(done.stdout)
    assert any("steer_kernel" in name for name in first) and any("encode_kernel" in name for name in first)
    assert later == [[], [], []]
