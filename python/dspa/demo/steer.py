"""The demo: build a map from preference triples, steer held-out prompts with it, compare."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from dspa.config import SteeringConfig
from dspa.demo.load import ASSETS, N_NEW_TOKENS, N_TRIPLES, Method, World
from dspa.maps.cdmap import ConditionalDifferenceMap

SEEDS = (0, 1, 2)
N_SHOWN = 4
PUBLISHED = SteeringConfig()


METHODS = (
    Method("base model"),
    *(
        method
        for alpha in (PUBLISHED.alpha, 1.0)
        for method in (
            Method("Static-SAE", SteeringConfig(k_prompt=1, alpha=alpha), static=True),
            Method("DSPA ablate", SteeringConfig(alpha=alpha)),
            Method("DSPA both", SteeringConfig(alpha=alpha, mode="both")),
        )
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a method reached. share: of style words that are of the preferred style, one a seed; perplexity: on
    style-neutral words of held-out answers."""

    method: str
    alpha: float | None
    share: list[float]
    perplexity: float

    @property
    def mean_share(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.share)


def measure(demo: World, cdmap: ConditionalDifferenceMap, *, progress: bool = True) -> list[Outcome]:
    """Every method on every held-out prompt and seed."""
    outcomes = []
    with tqdm(total=len(METHODS) * len(SEEDS), unit="run", desc="generate", disable=not progress) as bar:
        for method in METHODS:
            steering = demo.steering(method, cdmap).attach(demo.model) if method.config else None
            shares = []
            try:
                for seed in SEEDS:
                    shares.append(demo.share(demo.generate(seed)))
                    bar.update()
                perplexity = demo.neutral_perplexity(steering)
            finally:
                if steering:
                    steering.detach()
            outcomes.append(Outcome(method.name, method.config.alpha if method.config else None, shares, perplexity))
    return outcomes


@dataclass(frozen=True)
class Example:
    """A prompt, its two answers as tokens, and which of the steered tokens were predicted from an edited residual."""

    prompt: str
    preferred: str
    base: list[str]
    steered: list[str]
    edited: list[bool]


def examples(demo: World, cdmap: ConditionalDifferenceMap) -> list[Example]:
    """The first held-out prompts with the base model's answer and DSPA's, at the published settings."""
    base = demo.generate(SEEDS[0])
    with demo.steering(Method("DSPA", PUBLISHED), cdmap, record=True).attach(demo.model) as steering:
        steered = demo.generate(SEEDS[0])
    places = {(edit.row, edit.position + 1) for edit in steering.trace}
    shown = []
    for row, held_out in enumerate(demo.held_out[:N_SHOWN]):
        first = len(demo.tokenizer(held_out["prompt"])["input_ids"])
        shown.append(
            Example(
                prompt=held_out["prompt"],
                preferred=demo.wanted[row],
                base=list(demo.tokenizer.convert_ids_to_tokens(base[row].tolist())),
                steered=list(demo.tokenizer.convert_ids_to_tokens(steered[row].tolist())),
                edited=[(row, first + n) in places for n in range(steered.shape[1])],
            )
        )
    return shown


def run(json_path: Path | None = None, *, assets: Path = ASSETS, progress: bool = True) -> list[Outcome]:
    """Build the map, measure every method, print the table and some examples, and write all of it as JSON."""
    console = Console()
    demo = World(assets)
    console.print(
        "A small language model that answers letters in a formal or a casual style. Preferred is an answer in the "
        "register of its letter, so what is preferred flips with the prompt."
    )
    cdmap = demo.build_map(progress=progress)
    console.print(f"{cdmap!r}, from {demo.triples.name}")
    outcomes = measure(demo, cdmap, progress=progress)
    shown = examples(demo, cdmap)
    console.print(_table(outcomes))
    for example in shown:
        _print_example(console, example)
    if json_path is not None:
        record = {
            "settings": {"n_triples": N_TRIPLES, "n_new_tokens": N_NEW_TOKENS, "seeds": SEEDS, **asdict(PUBLISHED)},
            "map": asdict(cdmap.meta) | {"n_columns": len(cdmap.columns)},
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "examples": [asdict(example) for example in shown],
        }
        json_path.write_text(json.dumps(record, indent=2), encoding="utf-8")
        console.print(f"All of it: {json_path}")
    return outcomes


def _table(outcomes: list[Outcome]) -> Table:
    base = outcomes[0]
    title = f"Share of style words in the preferred style, seeds {', '.join(map(str, SEEDS))}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("method", "alpha", "share", "over base", "lowest, highest", "neutral perplexity"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.method,
            "" if outcome.alpha is None else f"{outcome.alpha:g}",
            f"{outcome.mean_share:.3f}",
            f"{outcome.mean_share - base.mean_share:+.3f}",
            f"{min(outcome.share):.3f}, {max(outcome.share):.3f}",
            f"{outcome.perplexity:.2f} ({outcome.perplexity / base.perplexity - 1:+.1%})",
        )
    return table


def _print_example(console: Console, example: Example) -> None:
    console.print(Text(f"\n{example.prompt}", style="bold"), Text(f"(preferred: {example.preferred})", style="dim"))
    console.print(_answer("base", example.base, [False] * len(example.base)))
    console.print(_answer("DSPA", example.steered, example.edited))


def _answer(name: str, tokens: list[str], edited: list[bool]) -> Text:
    """Tokens in a row, each marked with ^ where it was predicted from an edited residual."""
    text = Text(f"  {name}: ")
    for token, mark in zip(tokens, edited, strict=True):
        text.append(f"{token}^ " if mark else f"{token} ", style="cyan" if mark else "")
    return text
