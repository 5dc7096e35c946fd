"""The tutorials run on the tiny world and show what their text says, and their executed copies are up to date."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from dspa_kernels import PATHS

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = sorted((DOCS / "tutorials").glob("*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a tutorial on the tiny world and returns its variables."""
    monkeypatch.setenv("DSPA_TUTORIAL_WORLD", "tiny")
    return lambda name: runpy.run_path(str(DOCS / "tutorials" / f"{name}.py"))


def test_aligning_beats_the_controls(run, capsys):
    """Plans follow the register of the prompt (even prompts are formal), and so does the margin."""
    names = run("align")
    a, b, c, d = names["plans"]
    assert len(a & c) > len(a & b) and len(b & d) > len(b & c)
    comparison = names["comparison"]
    gain = comparison.gain("margin", "DSPA ablate 1")
    for control in ("DSPA ablate 1: random set", "DSPA ablate 1: shuffled map", "Static-SAE ablate 1"):
        assert gain.low > comparison.gain("margin", control).high
    assert names["base"] != names["steered"] and "promotes" in capsys.readouterr().out


def test_an_sae_of_ones_own_is_good_and_steers(run):
    names = run("own_sae")
    assert names["quality"].explained_variance > 0.8 and names["quality"].dead < names["d_sae"] / 2
    gain = names["comparison"].gain("margin", "DSPA both 1")
    assert gain.low > 0


def test_kernels_agree_and_are_timed(run, capsys):
    """The tutorial asserts that results agree."""
    names, printed = run("microbenchmark"), capsys.readouterr().out
    assert int(names["paths"][: len(PATHS)].sum()) == len(names["h"])
    assert all(re.search(rf"^{re.escape(name)} +[\d.]+ us$", printed, re.MULTILINE) for name in names["cases"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_executed_copy_is_of_this_source(execute, path):
    executed = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in executed]
    assert cells == execute.cells(path.read_text()), "run make tutorials"
    outputs = [output for cell in executed for output in cell.get("outputs", ())]
    assert outputs and {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}


def test_cells(execute):
    source = '# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\ny = "# %%"\n# %%\nz\n'
    cells = [("markdown", "# Title\n\ntext"), ("code", 'x = 1\n\n\ny = "# %%"'), ("code", "z")]
    assert execute.cells(source) == cells
