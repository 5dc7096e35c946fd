"""`dspa.errors`: what is said where an optional package is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dspa.errors import listed, require_package

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["sae-lens", "trl", "datasets"])
def test_a_missing_package_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    require_package(package, "This")
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(RuntimeError, match=rf"^This needs the package {package}, which is not installed: ") as raised:
        require_package(package, "This", "Or do without.")
    command = re.search(r'pip install "([\w-]+)([^"]*)"\. Or do without\.$', str(raised.value))
    wanted = re.search(rf'"{package}([<>=].*?)"', (ROOT / "pyproject.toml").read_text())
    assert command is not None and wanted is not None and command[1] == package
    assert set(command[2].split(",")) == set(wanted[1].split(","))


def test_a_list_in_a_message_is_cut() -> None:
    assert [listed(range(n), 2) for n in range(4)] == ["", "0", "0, 1", "0, 1 and 1 more"]


def test_no_message_names_the_package_as_one_of_an_index() -> None:
    """The project is installed from its sources."""
    for folder in ("python", "dspa_kernels", "docs"):
        for path in (ROOT / folder).rglob("*.[pm][yd]"):
            assert "install dspa" not in path.read_text().replace('"', ""), path
