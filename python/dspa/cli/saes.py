"""`dspa sae`: look at sparse autoencoders."""

from __future__ import annotations

from typing import Annotated

import typer

from dspa.cli.common import SAE_HELP, load_sae, print_table

app = typer.Typer(help="Look at sparse autoencoders.", no_args_is_help=True)


@app.command("show")
def sae_show(
    sae: Annotated[str, typer.Argument(help=SAE_HELP)],
    layer: Annotated[int | None, typer.Option(help="Its layer, if its files do not say it.")] = None,
) -> None:
    """Tell what an SAE is: architecture, widths, layer, model, what was folded, fingerprint."""
    loaded = load_sae(sae, layer, "cpu")
    names = ("arch", "d_in", "d_sae", "layer", "model_name", "dtype", "folded", "fingerprint")
    details = {name: getattr(loaded, name) for name in names}
    print_table(sae, details | {"k": loaded.weights.k or "-", "normalize": loaded.weights.normalize})
