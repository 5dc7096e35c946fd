"""Options that are generated from dataclasses, and what every command has in common."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import dspa
from dspa.cli import app, main
from dspa.cli import map as map_commands
from dspa.cli import options as cli_options
from dspa.cli.generate import BACKENDS
from dspa.cli.options import (
    AdapterOptions,
    MapOptions,
    ModelOptions,
    Options,
    RecordedModelOptions,
    RecordedSAEPairOptions,
    SAEPairOptions,
    with_options,
)
from dspa.config import MODES, POSITIONS, SCORINGS, SteeringConfig
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.saes.config import SAETrainingConfig
from dspa_kernels import available_backends


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of commands, by what is typed."""
    group = group or get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands())
IDS = [" ".join(("dspa", *path)) for path in COMMANDS]


def options(*path: str) -> dict[str, Any]:
    return {name: option for option in COMMANDS[path].params for name in option.opts}


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_help(path):
    result = CliRunner().invoke(app, [*path, "--help"], prog_name="dspa")
    assert result.exit_code == 0 and "Usage: " + " ".join(("dspa", *path)) in result.output


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_every_help_text_is_a_sentence(path):
    command = COMMANDS[path]
    for text in (command.help, *(option.help for option in command.params)):
        first = (text or "").split("\n\n")[0]
        assert first.endswith(".") and (first[0].isupper() or first[0].isdigit()), text


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_a_boolean_has_both_forms(path):
    for option in COMMANDS[path].params:
        # An action, like --help.
        if isinstance(option.default, bool) and option.opts != ["--version"]:
            (on,), (off,) = option.opts, option.secondary_opts
            assert {on.replace("--no-", "--"), off.replace("--no-", "--")} == {on.replace("--no-", "--")}
            assert on.startswith("--no-") != off.startswith("--no-")


COMMON = [
    *(("map", name) for name in ("collect", "build")),
    *(("sae", name) for name in ("train", "finetune")),
    ("fsrl", "train"),
    ("fsrl", "analyse", "layers"),
]
ON_ADAPTER = [("fsrl", "analyse", name) for name in ("usage", "fraction", "mask", "categories", "coherence")]
RENAMED = {"n_tokens": "--tokens", "held_out_tokens": "--held-out", "exclude_special_tokens": "--no-special-tokens"}
SWEPT = {"beta", "gamma_beta_ratio", "eval_every", "log_every", "report_to"}


@pytest.mark.parametrize(
    ("path", "kind", "without"),
    [
        *((path, ModelOptions, {"other_weights"}) for path in COMMON),
        *((path, SAEPairOptions, set()) for path in COMMON[:2]),
        *((path, RecordedModelOptions, set()) for path in [("generate",), *ON_ADAPTER]),
        (("generate",), RecordedSAEPairOptions, set()),
        *((path, AdapterOptions, set()) for path in ON_ADAPTER),
        (("generate",), SteeringConfig, {"ridge", "delta"}),
        (("map", "stability"), SteeringConfig, {"alpha", "mode", "positions", "scoring", "ridge", "delta"}),
        (("map", "stability"), MapOptions, {"count_tokens", "sparsify"}),
        (("map", "reduce"), MapOptions, set()),
        (("map", "build"), MapOptions, set()),
        (("sae", "train"), SAETrainingConfig, set()),
        (("sae", "finetune"), SAETrainingConfig, set()),
        (("fsrl", "train"), TrainingConfig, {"warmup", "max_grad_norm"}),
        (("fsrl", "train"), FSRLConfig, {"initial_threshold", "bandwidth"}),
        (("fsrl", "analyse", "layers"), TrainingConfig, {"warmup", "max_grad_norm", *SWEPT}),
        (("fsrl", "analyse", "layers"), FSRLConfig, {"initial_threshold", "bandwidth", "l1"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else getattr(value, "__name__", None),
)
def test_names_and_defaults_are_those_of_the_fields(path, kind, without):
    given = options(*path)
    for setting in fields(kind):
        name = RENAMED.get(setting.name, "--" + setting.name.replace("_", "-"))
        if setting.name in without:
            assert name not in given or setting.name == "l1"
        elif setting.default is MISSING:
            assert given[name].required
        else:
            assert given[name].default == setting.default and type(given[name].default) is type(setting.default)


def test_defaults_of_maps_are_those_of_reduce():
    from dspa.maps.build import build_map
    from dspa.maps.cdmap import COUNT_TOKENS, GATE_RULES
    from dspa.maps.reduce import reduce

    for function in (reduce, build_map):
        parameters = inspect.signature(function).parameters
        assert all(parameters[setting.name].default == setting.default for setting in fields(MapOptions))
    given = {setting.name: tuple(setting.metadata.get("choices", ())) for setting in fields(SteeringConfig)}
    assert (given["mode"], given["positions"], given["scoring"]) == (MODES, POSITIONS, SCORINGS)
    choices = {setting.name: setting.metadata.get("choices") for setting in fields(MapOptions)}
    assert (choices["gate_rule"], choices["count_tokens"]) == (GATE_RULES, COUNT_TOKENS)
    assert set(BACKENDS) == {"auto", *available_backends()}


# A dataclass of this test


@dataclass(frozen=True)
class Settings:
    n_steps: int = field(default=3, metadata={"help": "Steps, at least `batch_size`."})
    batch_size: int = field(default=2, metadata={"help": "Rows per step."})
    keep_first: bool = field(default=True, metadata={"help": "Leave the first row out."})
    kind: str = field(default="a", metadata={"help": "Kind.", "choices": ("a", "b")})
    hidden: float = field(default=0.5, metadata={"help": "Not an option here."})

    def __post_init__(self) -> None:
        if self.n_steps < self.batch_size:
            raise ValueError(f"`n_steps` is {self.n_steps}; accepted: `batch_size` or more.")


@dataclass(frozen=True)
class Other:
    path: str = field(metadata={"help": "Path."})
    batch_size: int = field(default=2, metadata={"help": "Columns per step."})


def small_app(received: list[Any]) -> typer.Typer:
    @with_options
    def command(
        settings: Annotated[
            Settings, Options("Panel", without=["hidden"], names={"keep_first": "--no-first/--first", "n_steps": "--n"})
        ],
        other: Annotated[Other, Options("Other panel")],
        own: Annotated[int, typer.Option(help="Own.")] = 7,
    ) -> None:
        """Do it."""
        received.append((settings, other, own))
        if own == 0:
            raise RuntimeError("`kind` and `own` cannot be.")
        if own == 1:
            warnings.warn("`kind` is unusual.", stacklevel=1)

    small = typer.Typer(pretty_exceptions_enable=False)
    small.command()(command)
    return small


def test_a_command_gets_its_dataclasses():
    received: list[Any] = []
    run = CliRunner().invoke
    assert run(small_app(received), ["--path", "x"]).exit_code == 0
    words = ["--path", "y", "--n", "9", "--first", "--kind", "b", "--own", "1", "--batch-size", "4"]
    assert run(small_app(received), words).exit_code == 0
    assert received == [(Settings(), Other("x"), 7), (Settings(9, 4, False, "b"), Other("y", 4), 1)]
    assert run(small_app(received), []).exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "1"], "--n is 1; accepted: --batch-size or more."),
        (["--kind", "c"], "--kind is 'c'; accepted: a, b."),
        (["--own", "0"], "--kind and `own` cannot be."),
    ],
)
def test_errors_name_options(words, message):
    error = CliRunner().invoke(small_app([]), ["--path", "x", *words]).exception
    assert isinstance(error, ValueError) and str(error) == message


def test_warnings_name_options(monkeypatch):
    formatted = warnings.formatwarning
    # Prints warnings, as pytest does not.
    monkeypatch.setattr("warnings.showwarning", lambda *given: print(warnings.formatwarning(*given[:4])))
    assert "--kind is unusual." in CliRunner().invoke(small_app([]), ["--path", "x", "--own", "1"]).output
    assert warnings.formatwarning is formatted


def named_fields() -> set[str]:
    """Names of fields that are options of a command, and not also words."""
    kinds = {kind for kind in vars(cli_options).values() if is_dataclass(kind)}
    kinds |= {SteeringConfig, FSRLConfig, TrainingConfig, SAETrainingConfig, map_commands.CountingOptions}
    return {setting.name for kind in kinds for setting in fields(kind) if "_" in setting.name}


def test_messages_quote_the_fields_that_are_options():
    names = "|".join(named_fields())
    for path in Path(dspa.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_message = isinstance(node, ast.Raise) or (
                isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            )
            if is_message:
                strings = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                text = "".join(string for string in strings if isinstance(string, str))
                assert not re.search(rf"(?<![`\w])({names})\b", text), f"{path}:{node.lineno}: {text}"


def test_help_names_options_and_is_that_of_both():
    params = {option.name: option for option in get_command(small_app([])).params}
    assert params["n_steps"].help == "Steps, at least --batch-size."
    assert params["batch_size"].help == "Rows per step. Columns per step."
    assert params["keep_first"].opts == ["--no-first"] and params["keep_first"].secondary_opts == ["--first"]
    assert "hidden" not in params and params["kind"].metavar == "<a|b>"


# Values that are refused before anything is loaded

ON = ["--model", "no-model"]
PAIR = ["--sae-in", "in", "--sae-out", "out"]
ADAPTER = [*ON, "--sae", "sae", "--adapter", "adapter"]
INVALID = {
    ("generate", *ON, *PAIR, "--map", "map"): [
        ("--alpha", "nan", "--alpha is nan; accepted: a finite number >= 0"),
        ("--k-prompt", "0", "--k-prompt is 0; accepted: a whole number >= 1"),
        ("--k-diff", "two", "Invalid value for '--k-diff'"),
        ("--mode", "boost", "--mode is 'boost'; accepted: ablate, augment, both."),
        ("--positions", "prompt", "--positions is 'prompt'; accepted: response, generated, all."),
        ("--scoring", "best", "--scoring is 'best'; accepted: raw, demixed, whitened, confident."),
        ("--backend", "jax", "--backend is 'jax'; accepted: auto, reference, triton, cuda."),
        ("--screen", "fp8", "--screen is 'fp8'; accepted: none, int5."),
        ("--dtype", "int8", "--dtype is 'int8'; accepted: auto, bfloat16, float16, float32."),
        ("--seed", str(2**70), "; accepted: a whole number of 64 bits."),
        ("--temperature", "-1", "Invalid value for '--temperature'"),
        ("--max-new-tokens", "0", "Invalid value for '--max-new-tokens'"),
    ],
    ("map", "collect", "triples.jsonl", *ON, *PAIR): [
        ("--batch-tokens", "0", "Invalid value for '--batch-tokens'"),
        ("--dtype", "fp8", "--dtype is 'fp8'; accepted: auto"),
        ("--first", "0", "Invalid value for '--first'"),
    ],
    ("map", "build", "triples.jsonl", *ON, *PAIR): [
        ("--gate-rule", "none", "--gate-rule is 'none'; accepted: published, active."),
        ("--count-tokens", "some", "--count-tokens is 'some'; accepted: all, text."),
        ("--percentile", "-1", "--percentile is -1.0; accepted: 0 to 100."),
        ("--k-diff", "0", "--k-diff is 0; accepted: a whole number >= 1"),
    ],
    ("map", "reduce", "counts"): [
        ("--percentile", "nan", "--percentile is nan; accepted: 0 to 100."),
        ("--random", "0", "Invalid value for '--random'"),
        ("--out", "/no/folder/map", "--out is /no/folder/map; accepted: a file in a folder that exists."),
    ],
    ("map", "stability", "counts"): [
        ("--k-prompt", "0", "--k-prompt is 0; accepted: a whole number >= 1."),
        ("--gate-rule", "none", "--gate-rule is 'none'; accepted: published, active."),
        ("--seed", "-1", "Invalid value for '--seed'"),
    ],
    ("map", "show", "map"): [("--delta", "0", "--delta is 0.0; accepted: a number between 0 and 1.")],
    ("map", "diff", "map", "other"): [("--plot", "/no/folder/p", "--plot is /no/folder/p; accepted: a file in")],
    ("map", "cost"): [("--prompt", "0", "Invalid value for '--prompt'")],
    ("sae", "show", "sae"): [("--layer", "x", "Invalid value for '--layer'")],
    ("sae", "train", "text.txt", *ON, "--layer", "1", "--out", "sae"): [
        ("--lr", "nan", "--lr is nan; accepted: a finite number > 0."),
        ("--batch-size", "0", "--batch-size is 0; accepted: a whole number >= 1."),
        ("--tokens", "63", "--tokens is 63; accepted: one batch (4096) or more. Lower --batch-size, or train"),
        ("--held-out", "0", "--held-out is 0; accepted: a whole number >= 1."),
        ("--seed", "-1", "--seed is -1; accepted: a whole number from 0 to"),
        ("--k", "nan", "--k is nan; accepted: 1 to d_sae = 16384."),
        ("--layer", "1", "--layer is [1, 1]; accepted: one or more layers, each once."),
    ],
    ("sae", "finetune", "text.txt", *ON, "--sae", "sae", "--out", "tuned"): [
        ("--max-length", "0", "--max-length is 0; accepted: a whole number >= 1."),
        ("--seed", str(2**70), "; accepted: a whole number from 0 to 2**63 - 1."),
    ],
    ("fsrl", "train", "triples.jsonl", *ON, "--sae", "sae", "--out", "adapter"): [
        ("--loss", "ipo", "--loss is 'ipo'; accepted: simpo, dpo, pro."),
        ("--sft-weight", "1", "--sft-weight is 1.0 for --loss simpo; accepted: none, except for pro. Leave it out."),
        ("--activation", "gelu", "--activation is 'gelu'; accepted: soft_threshold, relu, jumprelu."),
        ("--l1", "-1", "--l1 is -1.0; accepted: a finite number >= 0 (lambda; published: 0.02)."),
        ("--batch-size", "3", "--batch-size is 3, which --micro-batch-size 2 does not divide; accepted: a multiple of"),
        ("--max-steps", "0", "--max-steps is 0; accepted: a whole number >= 1."),
        ("--seed", "-1", "--seed is -1; accepted: a whole number from 0 to 2**32 - 1."),
        ("--report-to", "paper", "--report-to is 'paper'; accepted: none"),
    ],
    ("fsrl", "analyse", "layers", "t.jsonl", *ON, "--sae", "sae", "--held-out", "h.jsonl", "--out", "sweep"): [
        ("--l1", "nan", "--l1 is nan; accepted: a finite number >= 0 (lambda; published: 0.02)."),
        ("--lr", "0", "--lr is 0.0; accepted: a finite number > 0."),
    ],
    ("fsrl", "analyse", "usage", "t.jsonl", *ADAPTER, "--out", "/no/folder/out"): [
        ("--top", "-1", "Invalid value for '--top'"),
        ("--first", "1", "--out is /no/folder/out; accepted: a folder, or one to make in a folder that exists."),
    ],
    ("fsrl", "analyse", "fraction", "t.jsonl", *ADAPTER, "--out", "out"): [
        ("--beta", "x", "Invalid value for '--beta'"),
    ],
    ("fsrl", "analyse", "mask", "t.jsonl", *ADAPTER, "--out", "out"): [
        ("--seed", "0", "Say what to mask in exactly one way: --latent, or --labels with --category."),
        ("--category", "style", "Say what to mask in exactly one way: --latent, or --labels with --category."),
        ("--n-random", "1", "Invalid value for '--n-random'"),
    ],
    ("fsrl", "analyse", "categories", "t.jsonl", *ADAPTER, "--out", "out", "--labels", "labels.json"): [
        ("--batch-tokens", "0", "Invalid value for '--batch-tokens'"),
    ],
    ("fsrl", "analyse", "coherence", *ADAPTER, "--out", "out", "--file", "prompts.txt"): [
        ("--seed", "-1", "--seed is -1; accepted: a whole number >= 0."),
        ("--batch-size", "0", "Invalid value for '--batch-size'"),
    ],
    ("demo",): [("--json", "/no/folder/demo.json", "--json is /no/folder/demo.json; accepted: a file in")],
    ("fsrl", "demo"): [("--json", "/no/folder/demo.json", "--json is /no/folder/demo.json; accepted: a file in")],
}


@pytest.mark.parametrize(
    ("words", "option", "value", "message"),
    [
        pytest.param(words, *case, id=f"{'-'.join(word for word in words[:3] if word.isalpha())}{case[0]}={case[1]}")
        for words, cases in INVALID.items()
        for case in cases
    ],
)
def test_invalid_values(words, option, value, message, capsys, monkeypatch, tmp_path):
    """One message, exit code 2 and nothing written, whatever is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.argv", ["dspa", *words, option, value])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    text = " ".join((captured.out + captured.err).split())
    assert stop.value.code == 2 and message in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_commands_of_a_map_are_in_the_order_of_use() -> None:
    assert [command.name for command in map_commands.app.registered_commands] == [
        *("build", "collect", "reduce", "merge"),
        *("show", "diff", "stability", "cost"),
    ]
