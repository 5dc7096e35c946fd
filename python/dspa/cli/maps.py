"""`dspa map`: make and look at conditional-difference maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dspa.cli.common import (
    Device,
    DType,
    LayerIn,
    LayerOut,
    Layers,
    Model,
    Name,
    Numbers,
    SAEIn,
    SAEOut,
    check_writable,
    console,
    load_all,
    print_table,
)

if TYPE_CHECKING:
    from dspa.cdmap import ConditionalDifferenceMap

app = typer.Typer(help="Make and look at conditional-difference maps.", no_args_is_help=True)


@app.command("build")
def map_build(
    triples: Annotated[Path, typer.Argument(help="Preference triples, JSON Lines in a format of TRL's.")],
    model: Model,
    sae_in: SAEIn,
    sae_out: SAEOut,
    out: Annotated[Path, typer.Option(help="Where to write the map.")] = Path("map.dspa.safetensors"),
    first: Annotated[int | None, typer.Option(help="Use only the first N triples.", min=1)] = None,
    percentile: Annotated[float, typer.Option(help="Of a prompt latent's density, from which its gate opens.")] = 90.0,
    gate_rule: Annotated[
        str, typer.Option(help="published, or active: only where the latent is active.")
    ] = "published",
    count_tokens: Annotated[str, typer.Option(help="all, or text: without special tokens.")] = "all",
    k_diff: Annotated[int, typer.Option(help="Entries at each end of a row that set the cut.")] = 16,
    sparsify: Annotated[bool, typer.Option(help="Set entries below the cut to 0, as published.")] = True,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and response together.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a forward pass.", min=1)] = 8192,
    work_dir: Annotated[Path | None, typer.Option(help="Folder from which a stopped run goes on.")] = None,
    layer_in: LayerIn = None,
    layer_out: LayerOut = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Make a map from preference triples: which output latents tell chosen from rejected, for which prompts."""
    from itertools import islice

    check_writable("--out", out)
    from dspa.cdmap import build_map
    from dspa.preferences import load_triples

    # All triples are checked before a model is loaded.
    checked = list(islice(load_triples(triples), first))
    lm, tokenizer, read, edit = load_all(model, (sae_in, layer_in), (sae_out, layer_out), device, dtype)
    cdmap = build_map(
        lm,
        tokenizer,
        checked,
        read,
        edit,
        percentile=percentile,
        gate_rule=gate_rule,
        count_tokens=count_tokens,
        k_diff=k_diff,
        sparsify=sparsify,
        max_length=max_length,
        batch_tokens=batch_tokens,
        work_dir=work_dir,
        layers=layers,
        model_name=model_name,
    )
    cdmap.save(out)
    console.print(f"{escape(repr(cdmap))}\nWritten to {out} ({out.stat().st_size / 1e6:.1f} MB).")


@app.command("show")
def map_show(
    path: Annotated[Path, typer.Argument(help="A map.")],
    top: Annotated[int, typer.Option(help="Latents to list at each end.", min=0)] = 10,
) -> None:
    """Tell what a map was made from, and which output latents it moves most."""
    from dspa.cdmap import ConditionalDifferenceMap

    cdmap = ConditionalDifferenceMap.load(path)
    print_table(f"{path}", vars(cdmap.meta) | {"columns": len(cdmap.columns), "hot latents": _calibration(cdmap)})
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(descending=True, stable=True)
    table = Table("augmented", "column sum", "ablated", "column sum", title="Output latents by column sum of A")
    for high, low in zip(order[:top].tolist(), order.flip(0)[:top].tolist(), strict=True):
        cells = ((int(cdmap.columns[j]), float(sums[j])) for j in (high, low))
        table.add_row(*(cell for latent, total in cells for cell in (str(latent), f"{total:+.4g}")))
    console.print(table)


def _calibration(cdmap: ConditionalDifferenceMap) -> str:
    """One line about what lets steering read less of the encoder."""
    from dspa.cdmap import N_LARGE

    if not len(cdmap.hot):
        return "none: the map has no calibration"
    return f"{len(cdmap.hot)}; the first {N_LARGE} held {cdmap.hot_share():.1%} of the tokens' maxima"
