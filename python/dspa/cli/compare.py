"""`dspa compare`: methods side by side on a user's prompts and held-out triples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.gates import Gates
from dspa.cli.generate import BackendOptions
from dspa.cli.loading import check_writable
from dspa.cli.methods import CONTROLS_OPTION, PANEL, STATIC_OPTION, MethodOptions, SharedSteering, path_labels
from dspa.cli.options import (
    FILES,
    AdapterSAE,
    ChatTemplateKwargs,
    OnRecordedModel,
    Options,
    RecordedSAEPair,
    SamplingOptions,
    check_used,
    with_options,
)
from dspa.cli.tables import console, print_line
from dspa.cli.texts import print_comparison
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.evaluate.compare.comparison import Comparison
    from dspa.evaluate.compare.measures import Counter
    from dspa.evaluate.compare.methods import Method
    from dspa.evaluate.style import StyleAxis, StyleCounter


@dataclass(frozen=True)
class CompareSamplingOptions(SamplingOptions):
    """Settings of generation, sampled by default, since every prompt is answered by several seeds."""

    max_new_tokens: int = field(
        default=100, metadata={"help": "Largest number of tokens to generate per answer.", "min": 1}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling; 0 is greedy decoding, by one seed.", "min": 0}
    )


@dataclass(frozen=True)
class CompareMethodOptions(MethodOptions):
    """The methods that the base model is compared with, by default next to controls."""

    static: bool = field(default=True, metadata=STATIC_OPTION)
    controls: bool = field(default=True, metadata=CONTROLS_OPTION)
    junction: list[Path] | None = field(
        default=None,
        metadata={"help": "Value head of junction steering, a file that `dspa baseline junction` wrote."},
    )
    junction_weight: list[float] | None = field(
        default=None, metadata={"help": "Factor of its values; by default 1. Each is a method.", "min": 0}
    )
    junction_threshold: float = field(
        default=1.0, metadata={"help": "Entropy in nats from which on a token is a junction.", "min": 0}
    )
    junction_top: int = field(default=10, metadata={"help": "Number of candidates at a junction.", "min": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.empty:
            options = "--map, --adapter, --vector, --tuned, --persona, --latent, --latents, --junction and --prefix"
            raise ValueError(f"None of {options} was given; accepted: one of them, or more.")
        names = ("junction_weight", "junction_threshold", "junction_top")
        used = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, 1.0, 10)]
        check_used("--junction", self.junction, used)

    @property
    def empty(self) -> bool:
        """True where nothing but the base model takes part."""
        return super().empty and not self.junction

    @property
    def read(self) -> dict[str, Path]:
        """Files and folders that are read, by what gives them."""
        return super().read | {f"--junction {path}": path for path in self.junction or []}

    def junctions(self) -> list[Method]:
        """Return the methods of junction steering.

        Raises:
            VectorError: a file that is no value head.
        """
        from dspa.baselines.junction.value import ValueHead
        from dspa.evaluate.compare.methods import Method

        heads = {path: ValueHead.load(path) for path in self.junction or []}
        settings: dict[str, Any] = {"k": self.junction_top, "threshold": self.junction_threshold}
        return [
            Method.junction(heads[path], weight=weight, name=f"junction {label} {weight:g}", **settings)
            for path, label in path_labels(heads).items()
            for weight in self.junction_weight or [1.0]
        ]


@with_options
def compare(
    prompts: Annotated[
        Path,
        typer.Argument(
            help=f"Prompts: text, one per line, or {FILES} with `prompt`, as text or messages, such as triples."
        ),
    ],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    adapter_sae: AdapterSAE,
    config: SharedSteering,
    ops: Annotated[BackendOptions, Options("Steering")],
    sampling: Annotated[CompareSamplingOptions, Options("Sampling", without=["seed"])],
    methods: Annotated[CompareMethodOptions, PANEL],
    gates: Gates,
    held_out: Annotated[
        Path | None, typer.Option(help=f"Preference triples that no map or adapter was made with: {FILES}.")
    ] = None,
    count: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=REGEX]",
            help="Count the matches of a regular expression (Python's) per answer, or take a counter of --counters.",
        ),
    ] = None,
    counter_file: Annotated[
        Path | None,
        typer.Option(
            "--counters", help="Counters and axes of style for --count NAME, by rules in a JSON file; by default ours."
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(help="Measure that decides what is recommended: margin (the default with --held-out), or a NAME."),
    ] = None,
    max_perplexity: Annotated[
        float, typer.Option(help="Recommend nothing above this multiple of the base model's perplexity.", min=0)
    ] = 1.15,
    seeds: Annotated[int, typer.Option(help="Number of answers per prompt, with the seeds 0, 1, ...", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(help="Number of answers that are generated together.", min=1)] = 16,
    json_path: Annotated[
        Path,
        typer.Option(
            "--json", help="File of all results; the same command continues a stopped comparison, and uses runs again."
        ),
    ] = Path("dspa-compare.json"),
    show: Annotated[int, typer.Option(help="Print the answers to the first N prompts, base against DSPA.", min=0)] = 2,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Compare DSPA with the base model, other methods and controls, and recommend a setting if the evidence allows.

    Every method answers the same prompts by the same seeds, and scores the same held-out triples. For example, to find
    the best alpha:

    `dspa compare prompts.txt --map map.dspa.safetensors --held-out test.jsonl --alpha 0.2 --alpha 0.5 --alpha 1
    --count "greetings=(?i)\\b(hello|hi)\\b"`
    """
    from dspa.data.prompts import read_prompt_file
    from dspa.data.triples import load_triples
    from dspa.evaluate.compare.measures import check_counters
    from dspa.evaluate.compare.methods import CONTROLS
    from dspa.evaluate.compare.run import compare as run
    from dspa.evaluate.compare.runs import RunStore
    from dspa.evaluate.style import style_axes, style_counters

    if not max_perplexity:
        raise refusal(ValueError, "--max-perplexity", 0, "a number > 0, such as 1.15")
    axes = style_axes(counter_file)
    styles: dict[str, StyleCounter | StyleAxis] = {**style_counters(counter_file), **axes}
    counters: dict[str, Counter] = dict(_counter(text, styles) for text in count or [])
    check_counters(counters)
    if count and len(counters) < len(count):
        raise refusal(ValueError, "--count", "one name twice", "different names")
    if prefer == "margin" and held_out is None:
        raise refusal(ValueError, "--prefer", "margin without held-out triples", "a NAME of --count", "Or --held-out.")
    if prefer not in (None, "margin", *counters):
        raise refusal(ValueError, "--prefer", repr(prefer), ", ".join(("margin", *counters)))
    read = {"PROMPTS": prompts, "--held-out": held_out, "--gate-prompts": gates.gate_prompts} | methods.read
    check_writable("--json", json_path, read)
    # Refuses a file of something else before anything is loaded.
    RunStore.open(json_path)
    texts = read_prompt_file("PROMPTS", prompts)
    triples = None if held_out is None else list(load_triples(held_out))
    gates.prompts()
    gate = partial(
        gates.made,
        chat=sampling.chat,
        chat_template_kwargs=chat_template_kwargs,
        max_new_tokens=sampling.max_new_tokens,
    )
    junctions = methods.junctions()
    loaded = methods.load(on, pair, adapter_sae, config, ops, gate)
    utilities: dict[str, Counter] = {f"utility of {name}": one.utility(axes) for name, one in loaded.personas.items()}
    if sampling.chat or not all(isinstance(text, str) for text in texts):
        loaded.warn_of_other_template(chat_template_kwargs)
    comparison = run(
        *(loaded.model, loaded.tokenizer, texts, [*loaded.methods, *junctions]),
        held_out=triples,
        counters=utilities | counters,
        controls=CONTROLS if methods.controls else (),
        prefer=prefer,
        max_perplexity=max_perplexity,
        seeds=range(seeds),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        batch_size=batch_size,
        chat=sampling.chat,
        chat_template_kwargs=chat_template_kwargs,
        results=json_path,
        layers=on.layers,
        model_name=on.model_name,
        other_weights=on.other_weights,
    )
    print_results(comparison, show)
    print_line(f"All results: {json_path}")


def print_results(comparison: Comparison, show: int) -> None:
    """Print the tables, the recommendation, and the answers to the first prompts."""
    from dspa.evaluate.compare.table import LEGEND

    for table in comparison.tables():
        console.print(table.rich())
    print_line(LEGEND)
    print_line(comparison.recommendation.reason)
    recommended = comparison.recommendation.method
    dspa = [method.name for method in comparison.methods if method.kind == "DSPA"]
    shown = recommended or [*dspa, *(method.name for method in comparison.methods[1:])][0]
    for number in range(min(show, len(comparison.prompts))):
        answer = comparison.answer(shown, number)
        print_line(f"\nPrompt {number + 1}, seed {comparison.seeds[0]}, {shown}: {answer.prompt}")
        print_comparison(answer)


def _counter(text: str, styles: Mapping[str, StyleCounter | StyleAxis]) -> tuple[str, Counter]:
    """Return the name and the counter of one --count: a compiled expression, or one of `styles`."""
    if text in styles:
        return text, styles[text]
    name, _, expression = text.partition("=")
    if not (name.strip() and expression):
        accepted = f"NAME=REGEX, such as 'thanks=(?i)thank', or one of {', '.join(styles)}"
        raise refusal(ValueError, "--count", repr(text), accepted)
    from dspa.expressions import compile_expression

    try:
        return name.strip(), compile_expression(expression)
    except ValueError as error:
        got = f"{expression!r}, which does not compile ({error})"
        raise refusal(ValueError, f"--count {name}", got, "a regular expression of Python's re") from error
