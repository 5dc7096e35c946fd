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
from dspa.demo import language
from dspa.demo.load import ASSETS, N_NEW_TOKENS, N_TRIPLES, Method, World
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.outputs import write_atomically

SEEDS = (0, 1, 2)
N_SHOWN = 2  # per register
PUBLISHED = SteeringConfig()

BASE, STATIC, DSPA = "base model", "Static-SAE", f"DSPA {PUBLISHED.mode}"
METHODS = (
    Method(BASE),
    *(
        method
        for alpha in (PUBLISHED.alpha, 1.0)
        for method in (
            Method(STATIC, SteeringConfig(k_prompt=1, alpha=alpha), static=True),
            Method(DSPA, SteeringConfig(alpha=alpha)),
            Method("DSPA both", SteeringConfig(alpha=alpha, mode="both")),
        )
    ),
)


@dataclass(frozen=True)
class MethodOutcome:
    """Figures of a method.

    Attributes:
        method: name of the method.
        alpha: strength of the steering; None for the base model.
        share: share of style words in the preferred style, per seed.
        perplexity: perplexity on style-neutral words of held-out answers.
    """

    method: str
    alpha: float | None
    share: list[float]
    perplexity: float

    @property
    def mean_share(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.share)


def measure(demo: World, cdmap: ConditionalDifferenceMap, *, progress: bool = True) -> list[MethodOutcome]:
    """Measure every method on every held-out prompt and seed."""
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
            outcomes.append(
                MethodOutcome(method.name, method.config.alpha if method.config else None, shares, perplexity)
            )
    return outcomes


@dataclass(frozen=True)
class Example:
    """A prompt with its two answers.

    Attributes:
        prompt: text of the prompt.
        preferred: style that the prompt prefers.
        base: tokens of the base model's answer.
        steered: tokens of the steered answer.
        edited: True for the steered tokens that were predicted from an edited residual.
    """

    prompt: str
    preferred: language.Style
    base: list[str]
    steered: list[str]
    edited: list[bool]

    def count(self, answer: list[str]) -> tuple[int, int]:
        """Return how many words of an answer are of the preferred style, and how many are of either style."""
        return language.count_style_words(" ".join(answer), self.preferred)

    @property
    def gain(self) -> float:
        """Share of style words in the preferred style, steered less base."""
        (preferred, total), (base_preferred, base_total) = self.count(self.steered), self.count(self.base)
        return preferred / max(1, total) - base_preferred / max(1, base_total)


def examples(demo: World, cdmap: ConditionalDifferenceMap) -> list[Example]:
    """Answer every held-out prompt with the base model and with DSPA at the published settings, by the first seed."""
    base = demo.generate(SEEDS[0])
    with demo.steering(Method("DSPA", PUBLISHED), cdmap, record=True).attach(demo.model) as steering:
        steered = demo.generate(SEEDS[0])
    places = {(edit.row, edit.position + 1) for edit in steering.trace}
    answered = []
    for row, held_out in enumerate(demo.held_out):
        first = len(demo.tokenizer(held_out["prompt"])["input_ids"])
        answered.append(
            Example(
                prompt=held_out["prompt"],
                preferred=demo.wanted[row],
                base=list(demo.tokenizer.convert_ids_to_tokens(base[row].tolist())),
                steered=list(demo.tokenizer.convert_ids_to_tokens(steered[row].tolist())),
                edited=[(row, first + n) in places for n in range(steered.shape[1])],
            )
        )
    return answered


def choose(answered: list[Example]) -> list[Example]:
    """Select the examples with the largest gain, `N_SHOWN` per register; ties go to the earlier prompt."""
    gaining = sorted((example for example in answered if example.gain > 0), key=lambda example: -example.gain)
    by_style = [[example for example in gaining if example.preferred == style] for style in language.STYLES]
    return [example for examples in by_style for example in examples[:N_SHOWN]]


def run(json_path: Path | None = None, *, assets: Path = ASSETS, progress: bool = True) -> list[MethodOutcome]:
    """Build the map, measure every method, print the table and chosen examples, and write all results as JSON."""
    console = Console(markup=False, emoji=False)
    demo = World(assets)
    console.print(
        "A small language model answers letters in a formal or a casual style. The preferred answer is in the register "
        "of its letter, so what is preferred flips with the prompt."
    )
    cdmap = demo.build_map(progress=progress)
    console.print(f"{cdmap!r}, from {demo.triples.name}")
    outcomes = measure(demo, cdmap, progress=progress)
    answered = examples(demo, cdmap)
    shown = choose(answered)
    console.print(_table(outcomes))
    console.print(conclusion(outcomes))
    console.print(f"\n{legend(answered, len(shown))}")
    if console.is_terminal:
        console.print("Words of the preferred style are bold.")
    for example in shown:
        _print_example(console, example)
    if json_path is not None:
        record = {
            "settings": {"n_triples": N_TRIPLES, "n_new_tokens": N_NEW_TOKENS, "seeds": SEEDS, **asdict(PUBLISHED)},
            "map": asdict(cdmap.meta) | {"n_columns": len(cdmap.columns)},
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "examples": [asdict(example) for example in shown],
        }
        write_atomically(json_path, json.dumps(record, indent=2).encode())
        console.print(f"\nAll results: {json_path}")
    return outcomes


def conclusion(outcomes: list[MethodOutcome]) -> str:
    """Return what the table shows of DSPA at the published settings, in one sentence."""
    reached = {(outcome.method, outcome.alpha): outcome for outcome in outcomes}
    base, static, dspa = (reached[key] for key in ((BASE, None), (STATIC, PUBLISHED.alpha), (DSPA, PUBLISHED.alpha)))
    helps = dspa.mean_share > max(base.mean_share, static.mean_share)
    verdict = "follow the preference better" if helps else "do not follow the preference better"
    return (
        f"Latents chosen per prompt {verdict} than one fixed set: at alpha {PUBLISHED.alpha:g}, the share of the "
        f"preferred style goes from {base.mean_share:.3f} to {dspa.mean_share:.3f} with {DSPA} and to "
        f"{static.mean_share:.3f} with {STATIC}, and the perplexity of neutral words changes by "
        f"{dspa.perplexity / base.perplexity - 1:+.1%} and {static.perplexity / base.perplexity - 1:+.1%}."
    )


def legend(answered: list[Example], n_shown: int) -> str:
    """Return what the samples are, how they were chosen, and what `^` marks."""
    gains = [example.gain for example in answered]
    rise, fall = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return (
        f"{n_shown} samples of DSPA at alpha {PUBLISHED.alpha:g} in mode {PUBLISHED.mode}, chosen to show the "
        f"difference: of each register, the {N_SHOWN} held-out prompts where the share of the preferred style rises "
        f"the most. Of all {len(gains)} prompts it rises on {rise}, falls on {fall} and stays on "
        f"{len(gains) - rise - fall}. A ^ follows each word that was predicted from an edited residual."
    )


def _table(outcomes: list[MethodOutcome]) -> Table:
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
    console.print(_answer("base", example, example.base, [False] * len(example.base)))
    console.print(_answer("DSPA", example, example.steered, example.edited))


def _answer(name: str, example: Example, tokens: list[str], edited: list[bool]) -> Text:
    """Return tokens in a row: preferred style words bold, ^ after those predicted from an edited residual."""
    preferred, total = example.count(tokens)
    text = Text(f"  {name}, {preferred} of {total} style words {example.preferred}: ")
    for token, mark in zip(tokens, edited, strict=True):
        style = "bold" if language.STYLE_OF.get(token) == example.preferred else ""
        text.append(token, style=style).append("^ " if mark else " ", style="cyan")
    return text
