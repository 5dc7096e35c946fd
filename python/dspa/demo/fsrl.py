"""The FSRL demo: train adapters on preference triples, from hardly to strongly kept sparse, and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dspa.data.triples import load_triples
from dspa.demo.load import World
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.fsrl.results import HeldOut
from dspa.fsrl.sweep import train_sweep

# Of the file of preferences; the others are held out.
N_TRAIN = 300
SEED = 0
ADAPTERS = (
    *(FSRLConfig(l1=l1) for l1 in (0.005, 0.01, 0.02, 0.03, 0.05)),
    FSRLConfig(activation="relu"),
    FSRLConfig(activation="jumprelu"),
)
# Published are a rate of 5e-5 and batches of 32, for a model of 2 billion parameters and 60 thousand triples.
TRAINING = TrainingConfig(lr=1e-3, batch_size=8, micro_batch_size=8, max_steps=80)


@dataclass(frozen=True)
class Outcome:
    """What an adapter reached, or the base model, which has no activation. share: of the style words of sampled answers
    to held-out prompts, those of the preferred style; perplexity: on style-neutral words of given answers."""

    activation: str | None
    l1: float | None
    held_out: HeldOut
    share: float
    perplexity: float


def measure(
    demo: World,
    out: Path,
    *,
    adapters: tuple[FSRLConfig, ...] = ADAPTERS,
    config: TrainingConfig = TRAINING,
    progress: bool = True,
) -> list[Outcome]:
    """The base model, and an adapter of each of the settings on the SAE that reads the prompt, trained in `out`."""
    triples = list(load_triples(demo.triples))
    found = train_sweep(
        *(demo.model, demo.tokenizer, triples[:N_TRAIN], [demo.sae_in], adapters, out),
        eval_triples=triples[N_TRAIN:],
        config=config,
        progress=progress,
    )
    outcomes = [Outcome(None, None, found.base, demo.share(demo.generate(SEED)), demo.neutral_perplexity(None))]
    for each in found.adapters:
        with FSRLAdapter.load(each.folder, demo.sae_in).attach(demo.model):
            share, perplexity = demo.share(demo.generate(SEED)), demo.neutral_perplexity(None)
        outcomes.append(Outcome(each.activation, each.l1, each.held_out, share, perplexity))
    return outcomes


def run(json_path: Path | None = None, *, progress: bool = True) -> list[Outcome]:
    """Train and measure, print the table, and write all of it as JSON."""
    console, demo = Console(), World()
    console.print(
        "A small language model that answers letters in a formal or a casual style. Preferred is an answer in the "
        f"register of its letter. Adapters at layer {demo.sae_in.layer} are trained on {N_TRAIN} triples by SimPO, "
        f"{TRAINING.max_steps} steps of {TRAINING.batch_size} triples at a rate of {TRAINING.lr:g} (published, for a "
        "large model: 5e-5)."
    )
    with TemporaryDirectory() as folder, _one_thread():
        outcomes = measure(demo, Path(folder) / "sweep", progress=progress)
    console.print(_table(outcomes))
    if json_path is not None:
        record = {
            "settings": {"n_train": N_TRAIN, "seed": SEED, "layer": demo.sae_in.layer, **asdict(TRAINING)},
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        json_path.write_text(json.dumps(record, indent=2), encoding="utf-8")
        console.print(f"All of it: {json_path}")
    return outcomes


@contextmanager
def _one_thread() -> Iterator[None]:
    """On tensors as small as these, threads only wait for each other, and for whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(outcomes: list[Outcome]) -> Table:
    n_triples = outcomes[0].held_out.n_triples
    title = f"On {n_triples} held-out triples; preferred share and neutral perplexity of text"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0))
    columns: dict[str, Callable[[Outcome], str]] = {
        "adapter": lambda each: each.activation or "base model",
        "λ": lambda each: "" if each.l1 is None else f"{each.l1:g}",
        "SimPO loss": lambda each: f"{each.held_out.simpo_loss:.3f}",
        "accuracy": lambda each: f"{each.held_out.accuracy:.2f}",
        "L0": lambda each: f"{each.held_out.l0:.1f}",
        "L1": lambda each: f"{each.held_out.l1:.2f}",
        "share": lambda each: f"{each.share:.3f}",
        "perplexity": lambda each: f"{each.perplexity:.2f}",
    }
    for column in columns:
        table.add_column(column, justify="left" if column == "adapter" else "right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*(cell(outcome) for cell in columns.values()))
    return table
