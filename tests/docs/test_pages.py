"""Code and commands in README.md and docs/: they are valid, and what they name exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from dspa.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n)((?:^ {4}.*\n|^\n)+)", re.MULTILINE)
COMMAND = re.compile(r"(?:\S.* -m |\.venv/bin/)?dspa |make |(?:\.venv/bin/)?python -m bench|bench/gpu\.sh ")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def python_blocks(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


def shell_lines(page: Path) -> Iterator[str]:
    """Lines of code that are commands, with continued lines joined and comments left out, and commands in the text."""
    text = page.read_text()
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash", "sh")]
    prose = FENCE.sub("\n", text)
    blocks += [textwrap.dedent(code) for code in INDENTED.findall(prose)]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if COMMAND.match(line):
            yield line
    for code in re.findall(r"`([^`]+)`", prose):
        command = " ".join(code.split())
        if re.match(r"(dspa|make|python -m bench\.) ?\w", command) and COMMAND.match(command):
            yield command


COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line}") for page in PAGES for line in dict.fromkeys(shell_lines(page))
]


def test_pages_have_commands_and_code() -> None:
    """The expressions above still find what the pages hold."""
    text = (ROOT / "README.md").read_text()
    assert sum(map(len, map(python_blocks, PAGES))) == sum(page.read_text().count("```python") for page in PAGES) > 5
    lines = list(shell_lines(ROOT / "README.md"))
    assert len([line for line in lines if "dspa map" in line]) >= text.count("\ndspa map ")
    assert any("--sae-out gemma-scope" in line for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_exist(page: Path) -> None:
    """Dotted names in backticks; those of files have a slash or end like files."""
    for name in re.findall(r"`((?:dspa|dspa_kernels)\.[\w.]+)[`(]", page.read_text()):
        if not name.endswith((".json", ".safetensors")):
            resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_text_exist(page: Path) -> None:
    """Paths in backticks that begin with a folder of the repository; what a command makes is in one that is ignored."""
    folders = "|".join(("bench", "csrc", "docs", "dspa_kernels", "python", "tests", r"\.ci"))
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists_with_its_options(line: str) -> None:
    # A vertical bar separates alternatives, and dots stand for more options.
    words = [word for word in shlex.split(line.split(" | ")[0], comments=True) if word != "..."]
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    elif "bench/gpu.sh" in words:
        assert subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=False).returncode == 0
    elif "-m" in words and words[words.index("-m") + 1] != "dspa":
        module = ROOT / words[words.index("-m") + 1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    else:
        start = next(n for n, word in enumerate(words) if Path(word).name == "dspa")
        check_command(get_command(app), words[start + 1 :])


def check_command(command: Any, words: list[str]) -> None:
    """Fail unless the words are a command, options that it has and arguments that it takes."""
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{words[0]} is not in {list(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    options = {name: option for option in command.params for name in option.opts}
    if words and words[-1] in options and not getattr(options[words[-1]], "is_flag", True):
        words = [*words, "VALUE"]  # which a sentence that names an option may leave out
    # As it parses a command line, without the checks of values: files need not exist, and required options may be left
    # out of a sentence.
    context = command.context_class(command, **command.context_settings)
    _, rest, _ = command.make_parser(context).parse_args(list(words))
    passes_on = command.context_settings.get("allow_extra_args")
    assert not rest or passes_on, f"too many arguments: {rest}"


# Packages of other environments.
ELSEWHERE = ("lm_eval", "openai", "vllm")


@dataclass(frozen=True)
class Instance:
    """A value of which only its class is known."""

    kind: type


class Names:
    """The objects that names in the Python blocks of a page stand for, as far as is known without running them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def read(self, code: str) -> None:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                self.values |= {a.asname or a.name: imported(a.name) for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module not in ELSEWHERE:
                module = importlib.import_module(str(node.module))
                self.values |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.values[node.targets[0].id] = self.value(node.value)
            elif isinstance(node, ast.Attribute | ast.Call):
                self.value(node)

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression, an `Instance`, or None if it is unknown; fail where a name is wrong."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Attribute):
            return attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return returned(self.value(node.func), [k.arg for k in node.keywords if k.arg])
        return None


def imported(name: str) -> Any:
    return None if name in ELSEWHERE else importlib.import_module(name)


def ours(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    return name.split(".")[0] in ("dspa", "dspa_kernels")


def attribute(owner: Any, name: str) -> Any:
    kind = owner.kind if isinstance(owner, Instance) else owner
    if kind is None or not ours(kind):
        return None
    if isinstance(owner, Instance) and not hasattr(kind, name):
        sources = "".join(inspect.getsource(base) for base in kind.__mro__ if ours(base))
        assert re.search(rf"self\.{name}\b|^    {name}:", sources, re.MULTILINE), f"{kind.__name__} has no {name}"
        return None
    return getattr(kind, name)


def returned(function: Any, keywords: list[str]) -> Any:
    if not callable(function) or not ours(function):
        return None
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        assert set(keywords) <= {parameter.name for parameter in parameters}, f"{function.__name__}: {keywords}"
    try:
        kind = function if inspect.isclass(function) else get_type_hints(function).get("return")
    except NameError:  # a type that only a type checker imports
        return None
    kinds = [kind] if inspect.isclass(kind) else [arg for arg in getattr(kind, "__args__", ()) if inspect.isclass(arg)]
    return Instance(kinds[0]) if kinds and ours(kinds[0]) else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_names_what_exists(page: Path) -> None:
    names = Names()
    for code in python_blocks(page):
        if "lm_eval" in code:
            pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dspa-kernels[eval]"')
        names.read(code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import dspa\ndspa.build_maps", "build_maps"),
        ("import dspa\ndspa.SteeringConfig(strength=0.2)", "strength"),
        ("import dspa\ncdmap = dspa.ConditionalDifferenceMap.load('m')\ncdmap.saves('m')", "saves"),
        ("import dspa\ncdmap = dspa.build_map()\ncdmap.saves('m')", "saves"),
        ("from dspa import steer", "steer"),
        ("import dspa\ndspa.reduce(", "never closed"),
    ],
)
def test_wrong_python_is_noticed(code: str, message: str) -> None:
    with pytest.raises((AssertionError, AttributeError, SyntaxError), match=message):
        Names().read(code)


@pytest.mark.parametrize(
    "line",
    ["dspa maps show", "dspa generate --strength 1", "dspa map show a b c d", "make demos"],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"is not in|No such option|too many|demos"):
        test_a_command_exists_with_its_options(line)
