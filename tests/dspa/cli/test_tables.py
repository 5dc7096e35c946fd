"""Tables and lines on the terminal."""

from __future__ import annotations

import shlex

import pytest

from dspa.cli.tables import print_figures, print_next, print_table


@pytest.mark.parametrize("kind", ["values", "figures"])
def test_a_long_path_is_shown_whole(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/" + "a-folder/" * 12 + "[red] map.safetensors"
    if kind == "values":
        print_table("[b]", {"[path]": path})
    else:
        print_figures("[b]", [("[path]", path, "where it is")])
    title, *lines = capsys.readouterr().out.splitlines()
    shown = "".join(line.split("│")[2].strip() for line in lines if line.startswith("│"))
    assert title.strip() == "[b]" and lines[1].startswith("│ [path] ")
    assert shown.replace(" ", "") == path.replace(" ", "")


def test_the_next_command_can_be_copied(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/" + "a folder/" * 12 + "[red]"
    print_next("map", "reduce", path)
    assert shlex.split(capsys.readouterr().out) == ["Next:", "dspa", "map", "reduce", path]
