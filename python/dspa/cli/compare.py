"""`dspa compare`: methods side by side on a user's prompts and held-out triples."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from dspa.cli.generate import BackendOptions, warn_of_other_template
from dspa.cli.loading import check_model, check_writable, load_adapter, load_model, load_pair, load_tuned
from dspa.cli.options import (
    FILES,
    AdapterSAE,
    AdapterSAEOptions,
    ChatTemplateKwargs,
    OnRecordedModel,
    Options,
    RecordedModelOptions,
    RecordedSAEPair,
    RecordedSAEPairOptions,
    SamplingOptions,
    check_used,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import console, print_line
from dspa.cli.texts import print_comparison
from dspa.config import MODES, SteeringConfig
from dspa.distributed import device_named
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.evaluate.compare.comparison import Comparison
    from dspa.evaluate.compare.measures import Counter
    from dspa.evaluate.compare.methods import Method
    from dspa.evaluate.style import StyleCounter
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.saes.frozen import FrozenSAE

    Pair: TypeAlias = tuple[FrozenSAE, FrozenSAE]


@dataclass(frozen=True)
class CompareSamplingOptions(SamplingOptions):
    """Settings of generation, sampled by default, since every prompt is answered by several seeds."""

    max_new_tokens: int = field(
        default=100, metadata={"help": "Largest number of tokens to generate per answer.", "min": 1}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling; 0 is greedy decoding, by one seed.", "min": 0}
    )


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
    config: Annotated[SteeringConfig, Options("Steering", without=["alpha", "mode", "ridge", "delta"])],
    ops: Annotated[BackendOptions, Options("Steering")],
    sampling: Annotated[CompareSamplingOptions, Options("Sampling", without=["seed"])],
    map_paths: Annotated[
        list[Path] | None,
        typer.Option("--map", help="Map of DSPA. May be given several times, like all options of lists below."),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Strength; by default 0.2. Every map, mode and alpha is a method.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help=f"Edits to make: {', '.join(MODES)}; by default ablate.")
    ] = None,
    static: Annotated[
        bool, typer.Option(help="Also steer by Static-SAE, the same latents for every prompt, at each setting.")
    ] = True,
    controls: Annotated[
        bool, typer.Option(help="Also run the controls of each setting: random set, shuffled map, wrong layer.")
    ] = True,
    adapter: Annotated[list[Path] | None, typer.Option(help="FSRL adapter, a folder.")] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of each token's v that adapters keep; by default 1, all.", min=0, max=1),
    ] = None,
    vector: Annotated[
        list[Path] | None, typer.Option(help="Vector that is added at a layer, such as that of `dspa baseline repe`.")
    ] = None,
    tuned: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a tuned model of the same architecture, or of a PEFT adapter, such as that of "
            "`dspa baseline rahf align`."
        ),
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="Instruction to the base model: a system message, or text before a plain prompt."),
    ] = None,
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
            "--counters", help="Counters of style for --count NAME, by rules in a JSON file; by default ours."
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
    from dspa.evaluate.compare.methods import CONTROLS, Method
    from dspa.evaluate.compare.run import compare as run
    from dspa.evaluate.compare.runs import RunStore
    from dspa.evaluate.style import style_counters
    from dspa.fsrl.training import trained_template
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.steering.vector import SteeringVector

    if not (map_paths or adapter or vector or tuned or prefix):
        options = "--map, --adapter, --vector, --tuned and --prefix"
        raise ValueError(f"None of {options} was given; accepted: one of them, or more.")
    check_used("--adapter", adapter, ["--fraction"] if fraction else [])
    _check_repeated({"--map": map_paths, "--alpha": alpha, "--mode": mode, "--adapter": adapter})
    _check_repeated({"--fraction": fraction, "--vector": vector, "--tuned": tuned, "--prefix": prefix})
    if not max_perplexity:
        raise refusal(ValueError, "--max-perplexity", 0, "a number > 0, such as 1.15")
    styles = style_counters(counter_file)
    counters = dict(_counter(text, styles) for text in count or [])
    check_counters(counters)
    if count and len(counters) < len(count):
        raise refusal(ValueError, "--count", "one name twice", "different names")
    if prefer == "margin" and held_out is None:
        raise refusal(ValueError, "--prefer", "margin without held-out triples", "a NAME of --count", "Or --held-out.")
    if prefer not in (None, "margin", *counters):
        raise refusal(ValueError, "--prefer", repr(prefer), ", ".join(("margin", *counters)))
    read = {"PROMPTS": prompts, "--held-out": held_out} | {f"--map {path}": path for path in map_paths or []}
    read |= {f"--vector {path}": path for path in vector or []} | {f"--tuned {path}": path for path in tuned or []}
    check_writable("--json", json_path, read)
    # Refuses a file of something else before anything is loaded.
    RunStore.open(json_path)
    prefixed = _prefixed(prefix or [])
    vectors = {path: SteeringVector.load(path) for path in vector or []}
    texts = read_prompt_file("PROMPTS", prompts)
    triples = None if held_out is None else list(load_triples(held_out))
    with messages_of_options({"alpha": "--alpha", "mode": "--mode"}):
        settings = [replace(config, alpha=a, mode=m) for m in mode or [config.mode] for a in alpha or [config.alpha]]
    maps = {path: ConditionalDifferenceMap.load(path) for path in map_paths or []}
    model, tokenizer, pairs, adapters = _load(on, maps, pair, adapter or [], adapter_sae, ops.backend)
    methods = list(_dspa_methods(maps, pairs, settings, ops, static))
    labels = _labels(adapters)
    for path, loaded in adapters.items():
        for kept in fraction or [1.0]:
            top = "" if kept == 1 else f" top {kept:.3g}"
            methods.append(Method.adapted(loaded, fraction=kept, name=f"FSRL {labels[path]}{top}"))
    methods += [Method.vector(loaded, name=f"vector {_labels(vectors)[path]}") for path, loaded in vectors.items()]
    for path, label in _labels(tuned or []).items():
        methods.append(Method.tuned(load_tuned(path, on), name=f"tuned {label}"))
    methods += prefixed
    if sampling.chat or not all(isinstance(text, str) for text in texts):
        made = [("--map", cdmap.meta.chat_template_kwargs) for cdmap in maps.values()]
        made += [("--adapter", trained_template(tokenizer, path)[1]) for path in adapters]
        warn_of_other_template(made, chat_template_kwargs)
    comparison = run(
        *(model, tokenizer, texts, methods),
        held_out=triples,
        counters=counters,
        controls=CONTROLS if controls else (),
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


def _check_repeated(given: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise for an option that got one value twice, which would be one method twice."""
    for option, values in given.items():
        for n, value in enumerate(values or ()):
            if value in (values or ())[:n]:
                raise refusal(ValueError, option, f"{value} twice", "different values")


def _counter(text: str, styles: Mapping[str, StyleCounter]) -> tuple[str, Counter]:
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


def _load(
    on: RecordedModelOptions,
    maps: Mapping[Path, ConditionalDifferenceMap],
    pair: RecordedSAEPairOptions,
    adapter_paths: Sequence[Path],
    adapter_sae: AdapterSAEOptions,
    backend: str,
) -> tuple[Any, Any, dict[str, Pair], dict[Path, FSRLAdapter]]:
    """Load a model, its tokenizer, the SAEs of maps by `_key`, and adapters."""
    from dspa.models.sources import may_be_one

    # The model last: the others are quick to load, and wrong more often.
    device = device_named(on.device)
    check_model(on)
    pairs: dict[str, Pair] = {}
    for cdmap in maps.values():
        if _key(cdmap) not in pairs:
            pairs[_key(cdmap)] = load_pair(pair, device, cdmap)
    adapters = {path: load_adapter(path, adapter_sae, device, backend) for path in adapter_paths}
    made_with = [*(cdmap.sources.get("model") for cdmap in maps.values()), *(a.trained_on for a in adapters.values())]
    recorded = [source for source in made_with if source is not None]
    if on.model is None and not may_be_one(source.digest for source in recorded):
        raise ValueError(
            "Maps and adapters were made with different models. Pass --model to choose one, and --other-weights to use "
            "it with all."
        )
    model, tokenizer = load_model(on, next(iter(recorded), None))
    for adapter in adapters.values():
        adapter.sae = adapter.sae.to(dtype=model.dtype)
    as_model = {
        key: (sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype)) for key, (sae_in, sae_out) in pairs.items()
    }
    return model, tokenizer, as_model, adapters


def _key(cdmap: ConditionalDifferenceMap) -> str:
    """Return the key of a map's pair of SAEs."""
    return f"{cdmap.meta.sae_in} {cdmap.meta.sae_out}"


def _dspa_methods(
    maps: Mapping[Path, ConditionalDifferenceMap],
    pairs: Mapping[str, Pair],
    settings: Sequence[SteeringConfig],
    ops: BackendOptions,
    static: bool,
) -> Iterator[Method]:
    """Yield DSPA with every map and setting, each followed by Static-SAE if that is wanted."""
    from dspa.evaluate.compare.methods import Method

    labels = _labels(maps)
    for path, cdmap in maps.items():
        for config in settings:
            setting = f"{config.mode} {config.alpha:g}" + (f", {labels[path]}" if len(maps) > 1 else "")
            method = Method.dspa(
                *(*pairs[_key(cdmap)], cdmap, config), name=f"DSPA {setting}", backend=ops.backend, screen=ops.screen
            )
            yield method
            if static:
                yield Method.static(method, name=f"Static-SAE {setting}")


def _prefixed(texts: Sequence[str]) -> list[Method]:
    """Return the methods of prefixes, with whole texts for names where those of two begin alike."""
    from dspa.evaluate.compare.methods import Method

    methods = [Method.prefixed(text) for text in texts]
    if len({method.name for method in methods}) < len(methods):
        methods = [Method.prefixed(text, name=f'prefix "{text}"') for text in texts]
    return methods


def _labels(paths: Collection[Path]) -> dict[Path, str]:
    """Return what files or folders are called in tables: how their names begin, or paths where these are alike."""
    names = {path: path.name.split(".")[0] for path in paths}
    return names if len(set(names.values())) == len(names) else {path: str(path) for path in paths}
