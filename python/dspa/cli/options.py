"""The options of commands, generated from dataclasses, and the groups of options that several commands share.

The name, help, choices and default of an option are those of a field. A command takes a dataclass as a parameter
`config: Annotated[Config, Options(...)]`; `with_options` turns it into one option per field, and what was given back
into the dataclass.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from dspa.errors import refusal
from dspa.schemas import parse_json


@dataclass(frozen=True)
class Options:
    """Rules that turn the fields of a dataclass into options.

    Attributes:
        panel: title above the options in the help.
        without: fields that have no option, and keep their defaults.
        names: option of each field for which it is not `--field-name`; for a boolean, "--yes-name/--no-name".
        without_choices: choices of fields that the command does not take.
    """

    panel: str
    without: Collection[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    without_choices: Mapping[str, Collection[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """A dataclass that a command takes, and how."""

    kind: type
    options: Options

    def fields(self) -> list[Field[Any]]:
        """Fields that have an option."""
        return [setting for setting in fields(self.kind) if setting.name not in self.options.without]

    def option_names(self) -> dict[str, str]:
        """Option of each field, for a boolean without the one that turns it off."""
        return {setting.name: self._declared(setting.name).partition("/")[0] for setting in self.fields()}

    def _declared(self, name: str) -> str:
        return self.options.names.get(name, "--" + name.replace("_", "-"))

    def choices(self, setting: Field[Any]) -> dict[str, str]:
        """Choices of a field with what they mean, which is empty where its help says it."""
        choices, refused = setting.metadata.get("choices", ()), self.options.without_choices.get(setting.name, ())
        meanings = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
        return {choice: meaning for choice, meaning in meanings.items() if choice not in refused}

    def help(self, setting: Field[Any]) -> str:
        """Help of a field, with what its choices mean."""
        meanings = [f"{choice}: {meaning}" for choice, meaning in self.choices(setting).items() if meaning]
        text = setting.metadata["help"] + (f" {'; '.join(meanings)}." if meanings else "")
        return name_options(text, self.option_names())

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameter of each option, as Typer reads it."""
        hints = get_type_hints(self.kind)
        for setting in self.fields():
            option = self._declared(setting.name)
            if hints[setting.name] is bool and "/" not in option:
                option += f"/--no-{option.removeprefix('--')}"
            choices = self.choices(setting)
            info = typer.Option(
                option,
                help=self.help(setting),
                rich_help_panel=self.options.panel,
                min=setting.metadata.get("min"),
                max=setting.metadata.get("max"),
                metavar=f"<{'|'.join(choices)}>" if choices else None,
                autocompletion=_completion(choices) if choices else None,
            )
            yield inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[hints[setting.name], info],
                default=inspect.Parameter.empty if setting.default is MISSING else setting.default,
            )

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make the dataclass from the values of all options."""
        for setting in self.fields():
            value, choices = values[setting.name], self.choices(setting)
            if choices and value not in choices:
                raise refusal(ValueError, self.option_names()[setting.name], repr(value), ", ".join(choices))
        return self.kind(**{setting.name: values[setting.name] for setting in self.fields()})


def name_options(text: str, names: Mapping[str, str]) -> str:
    """Return a text that names options in place of fields."""
    return re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[0]), text)


@contextmanager
def messages_of_options(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors and warnings name options in place of fields."""
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: name_options(formatted(*args, **kwargs), names)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text = name_options(str(error), names)
        if text == str(error):
            raise
        raise ValueError(text) from error
    finally:
        warnings.formatwarning = formatted


def _completion(choices: Collection[str]) -> Callable[[], list[str]]:
    """Return what the shell asks for the values that complete an option."""
    return lambda: list(choices)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a dataclass with `Options` by one option per field.

    Dataclasses that share a field share its option, whose help is that of both. Errors and warnings of the command name
    options in place of fields.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *extras = get_args(hints[name]) or (None,)
        if extras and isinstance(extras[0], Options):
            groups[name] = _Group(kind, extras[0])
            for option in groups[name].parameters():
                _add(parameters, option)
        else:
            parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])

    option_names = {name: option for group in groups.values() for name, option in group.option_names().items()}
    own = [name for name in inspect.signature(command).parameters if name not in groups]

    def run(**values: Any) -> None:
        with messages_of_options(option_names):
            made = {name: group.make(values) for name, group in groups.items()}
            command(**made, **{name: values[name] for name in own})

    wrapped: Any = functools.update_wrapper(run, command)
    wrapped.__signature__ = inspect.Signature(list(parameters.values()))
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _add(parameters: dict[str, inspect.Parameter], option: inspect.Parameter) -> None:
    """Add an option, or its help to that of the same name."""
    known = parameters.setdefault(option.name, option)
    if known is not option:
        assert known.default == option.default, option.name
        known.annotation.__metadata__[0].help += " " + option.annotation.__metadata__[0].help


def changed(options: Any, *but: str) -> list[str]:
    """Return the options of a dataclass that differ from their defaults."""
    names = (setting.name for setting in fields(options) if getattr(options, setting.name) != setting.default)
    return [f"--{name.replace('_', '-')}" for name in names if name not in but]


def check_used(option: str, value: object, others: Collection[str]) -> None:
    """Raise `ValueError` where `option` was not given, and `others` were, which nothing uses without it."""
    if not value and others:
        raise ValueError(f"Without {option} there is no use for {', '.join(others)}. Pass {option}, or leave it out.")


def without_persona(of_maps: Sequence[str], persona: object) -> list[str]:
    """Return the options of maps, without those that are also for a persona if there is one."""
    return [option for option in of_maps if not (persona and option in ("--sae-out", "--layer-out", "--controls"))]


DTYPES = ("auto", "bfloat16", "float16", "float32")
SAE_HELP = "A folder or file of an SAE, or RELEASE:SAE_ID of SAELens' catalogue."
MODEL_HELP = "Hugging Face model: a folder, a GGUF file, or a name on the Hub."
SAE_IN_HELP = f"Input SAE, which reads the prompt. {SAE_HELP}"
SAE_OUT_HELP = f"Output SAE, whose latents are edited. {SAE_HELP}"
RECORDED = "By default, what the {} was made with, if it is still where it was."


@dataclass(frozen=True)
class RecordedModelOptions:
    """The model, by default the one that a map or adapter records, and where and in which dtype it computes."""

    model: str | None = field(default=None, metadata={"help": f"{MODEL_HELP} {RECORDED.format('map or adapter')}"})
    device: str = field(
        default="auto", metadata={"help": "Device, such as cuda, cuda:1 or cpu; auto is cuda where there is one."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the model and the SAEs; auto is that of its files.", "choices": DTYPES},
    )
    model_name: str | None = field(
        default=None, metadata={"help": "Name of the model, if it is in a folder that does not record it."}
    )
    layers: str | None = field(
        default=None,
        metadata={"help": "Dotted path of the decoder layers, such as model.layers, for an unknown architecture."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with the model, if transformers has none for it. Read it first."},
    )
    other_weights: bool = field(
        default=False,
        metadata={
            "help": "Accept a model with other weights than the map or adapter was made with: tuned, merged, quantized "
            "or in float16."
        },
    )

    @property
    def names(self) -> dict[str, Any]:
        """Arguments of `attach` that say which model it is."""
        return {"layers": self.layers, "model_name": self.model_name, "other_weights": self.other_weights}


@dataclass(frozen=True)
class ModelOptions(RecordedModelOptions):
    """The model, and where and in which dtype it computes."""

    model: str = field(metadata={"help": MODEL_HELP})


@dataclass(frozen=True)
class RecordedSAEPairOptions:
    """The two SAEs of DSPA, by default those that a map records."""

    sae_in: str | None = field(default=None, metadata={"help": f"{SAE_IN_HELP} {RECORDED.format('map')}"})
    sae_out: str | None = field(default=None, metadata={"help": f"{SAE_OUT_HELP} {RECORDED.format('map')}"})
    layer_in: int | None = field(
        default=None, metadata={"help": "Layer of the input SAE, if its files do not contain it."}
    )
    layer_out: int | None = field(
        default=None, metadata={"help": "Layer of the output SAE, if its files do not contain it."}
    )


@dataclass(frozen=True)
class SAEPairOptions(RecordedSAEPairOptions):
    """The two SAEs of DSPA."""

    sae_in: str = field(metadata={"help": SAE_IN_HELP})
    sae_out: str = field(metadata={"help": SAE_OUT_HELP})


@dataclass(frozen=True)
class AdapterSAEOptions:
    """The SAE of an adapter, by default the one that the adapter records."""

    sae: str | None = field(
        default=None, metadata={"help": f"SAE of the adapter. {SAE_HELP} {RECORDED.format('adapter')}"}
    )
    layer: int | None = field(
        default=None, metadata={"help": "Layer of the adapter's SAE, if its files do not contain it."}
    )


@dataclass(frozen=True)
class AdapterOptions(AdapterSAEOptions):
    """The adapter, and the SAE that it was trained with."""

    adapter: Path = field(kw_only=True, metadata={"help": "Folder of the adapter."})


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of generation."""

    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens to generate per prompt. By default 200, or as many as the model has "
            "positions for.",
            "min": 1,
        },
    )
    temperature: float = field(
        default=0.0, metadata={"help": "Temperature of sampling; 0 is greedy decoding.", "min": 0}
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample from the likeliest tokens whose probabilities add up to this. By default as in the model's "
            "generation config."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    chat: bool = field(
        default=False, metadata={"help": "Put each prompt into the model's chat template, as a user's turn."}
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise refusal(ValueError, "`temperature`", self.temperature, "a finite number >= 0")
        if self.top_p is not None:
            if not 0 < self.top_p <= 1:
                raise refusal(ValueError, "`top_p`", self.top_p, "a number above 0, up to 1")
            if self.temperature == 0:
                got, advice = f"{self.top_p} for greedy decoding", "Pass `temperature`, such as 1."
                raise refusal(ValueError, "`top_p`", got, "none without sampling", advice)
        if not -(2**63) <= self.seed < 2**63:
            raise refusal(ValueError, "`seed`", self.seed, "a whole number of 64 bits")


@dataclass(frozen=True)
class JudgeOptions:
    """The judge, a language model behind an OpenAI-compatible chat endpoint."""

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Address of the judge's endpoint, such as http://localhost:8000/v1. Its key, if it needs one, is "
            "read from the environment variable DSPA_JUDGE_KEY."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "Name of the model at the endpoint of `judge`."})
    judge_cache: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of the judge's replies. What is in it is not asked again: the same command continues a "
            "stopped one. By default the folder judge in that of the output."
        },
    )
    judge_parameters: str = field(
        default="",
        metadata={
            "help": "Parameters of the requests, as a JSON object in place of "
            """'{"temperature": 0, "max_tokens": 1024}', as some models need."""
        },
    )
    judge_calls: int = field(default=8, metadata={"help": "Calls of the judge at the same time.", "min": 1})
    replay: bool = field(
        default=False,
        metadata={"help": "Never call the judge: all replies have to be in `judge_cache`, and `judge` is not needed."},
    )


@dataclass(frozen=True)
class MapOptions:
    """Settings of `reduce`, which turns counts into a map."""

    percentile: float = field(
        default=90.0,
        metadata={
            "help": "Percentile, over all prompts, of the share of a prompt's tokens on which a latent is active, "
            "from which the latent's gate opens."
        },
    )
    gate_rule: str = field(
        default="published",
        metadata={
            "help": "With published, a gate whose percentile is 0 is open on every prompt; with active, it opens only "
            "where its latent is active.",
            "choices": ("published", "active"),
        },
    )
    count_tokens: str = field(
        default="all",
        metadata={
            "help": "Tokens that count: all, as published, or text without special tokens.",
            "choices": ("all", "text"),
        },
    )
    k_diff: int = field(
        default=16,
        metadata={"help": "Number of entries at each end of a row that set the cut; fewer give a smaller map."},
    )
    sparsify: bool = field(default=True, metadata={"help": "Set entries below the cut to 0, as published."})

    def __post_init__(self) -> None:
        from dspa.maps.reduce import check_settings

        check_settings(self.percentile, self.gate_rule, self.k_diff, None, self.count_tokens)


# What is made with a model accepts any weights.
OnModel = Annotated[ModelOptions, Options("Model and device", without=["other_weights"])]
OnRecordedModel = Annotated[RecordedModelOptions, Options("Model and device")]
SAEPair = Annotated[SAEPairOptions, Options("SAEs")]
RecordedSAEPair = Annotated[RecordedSAEPairOptions, Options("SAEs")]
JudgedBy = Annotated[JudgeOptions, Options("Judge")]
Sampling = Annotated[SamplingOptions, Options("Sampling")]
AdapterSAE = Annotated[AdapterSAEOptions, Options("SAEs")]

FILES = "a file of JSON Lines, CSV or Parquet"
Triples = Annotated[
    str, typer.Argument(help=f"Preference triples in a format of TRL: {FILES}, a folder, or a data set of the Hub.")
]
Split = Annotated[str, typer.Option(help="Split of a data set, where TRIPLES is one.")]
TrainingOut = Annotated[
    Path,
    typer.Option(
        help="Folder to write; the same command continues a stopped training in it, from its last checkpoint."
    ),
]
First = Annotated[int | None, typer.Option(help="Use only the first N triples.", min=1)]


def _parse_kwargs(text: str) -> dict[str, Any]:
    """Return the JSON object of --chat-template-kwargs."""
    accepted = "a JSON object such as '{\"enable_thinking\": false}'"
    kwargs = parse_json(text, typer.BadParameter, "the value", accepted)
    if not isinstance(kwargs, dict):
        raise refusal(typer.BadParameter, "the value", text, accepted)
    return kwargs


ChatTemplateKwargs = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=_parse_kwargs,
        metavar="JSON",
        help="Values of the chat template's variables, such as '{\"enable_thinking\": false}'.",
    ),
]
