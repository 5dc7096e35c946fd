"""`dspa vector`: vectors that target SAE latents (SAE-TS), and the scale of a vector."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.contents import scores
from dspa.cli.loading import check_model, check_writable, load_made_with, load_model, load_recorded_sae, load_sae
from dspa.cli.options import (
    FILES,
    SAE_HELP,
    OnModel,
    OnRecordedModel,
    Options,
    RecordedSAEPair,
    changed,
    check_used,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import print_line, print_next, print_table
from dspa.config import MODES, POSITIONS, SteeringConfig
from dspa.distributed import device_named
from dspa.errors import refusal
from dspa.sae_ts.settings import FitSettings, RolloutSettings

if TYPE_CHECKING:
    from dspa.sae_ts.approximator import EffectApproximator

HELP = """Vectors that are added at one layer and target SAE latents (SAE-TS), without an SAE at decode time.

Measure once what directions do to the latents of a model's texts (`effects`) and fit a linear model of it (`fit`). Then
any latents (`target`), or those that a map of DSPA edits (`imitate`), make a vector. `scale` finds how strongly to add
it. `dspa generate`, `dspa compare` and `dspa serve` take the vector.
"""
app = typer.Typer(help=HELP, no_args_is_help=True)
EFFECTS_NAMES = {
    "openers": "--openers",
    "batch_size": "--batch-size",
    "n_directions": "--directions",
    "directions": "--directions-sae",
    "scale": "--scale",
}
Approximator = Annotated[Path, typer.Argument(metavar="EFFECTS", help="File that dspa vector fit wrote.")]
VectorOut = Annotated[Path, typer.Option(help="File of the vector to write.")]
Scale = Annotated[float, typer.Option(help="How many times the unit vector is added.", min=0)]
Positions = Annotated[str, typer.Option(help=f"Tokens to which the vector is added: {', '.join(POSITIONS)}.")]
SideEffects = Annotated[
    float, typer.Option(help="Weight of steering away from what any direction does; 0 leaves it out.", min=0)
]


@app.command()
@with_options
def effects(
    sae: Annotated[str, typer.Option(help=f"SAE whose latents are read. {SAE_HELP}")],
    scale: Annotated[
        float,
        typer.Option(
            help="How many times a unit direction is added. Published: as often as raises the cross-entropy of "
            "ordinary text by 0.5, which `dspa vector scale` finds for a vector."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the effects; the same command continues a stopped measurement.")],
    on: OnModel,
    sampling: Annotated[RolloutSettings, Options("Texts")],
    layer: Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not contain it.")] = None,
    directions: Annotated[
        int, typer.Option(help="Number of decoder rows to measure, drawn at random (published: 50000).", min=3)
    ] = 1000,
    directions_sae: Annotated[
        str | None,
        typer.Option(help=f"SAE of the decoder rows, such as a wider one of the layer; by default --sae. {SAE_HELP}"),
    ] = None,
    openers: Annotated[
        Path | None, typer.Option(help="Text that the model continues, one opener per line; by default ours.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of texts that are written together.", min=1)] = 64,
) -> None:
    """Measure what directions do to the latents of what a model writes.

    The model writes texts with each direction added at the layer of the SAE, and reads them again without it. The
    effect is the mean of each latent over these texts, less that over texts that were written without a direction.
    """
    from dspa.data.prompts import read_prompt_file
    from dspa.sae_ts.effects import OPENERS, draw_directions, measure_effects

    texts = OPENERS if openers is None else [str(text) for text in read_prompt_file("--openers", openers)]
    check_model(on)
    device = device_named(on.device)
    read = load_sae(sae, layer, device)
    rows = read if directions_sae is None else load_sae(directions_sae, layer, device)
    with messages_of_options(EFFECTS_NAMES):
        drawn = draw_directions(rows.W_dec, directions, sampling.seed)
        model, tokenizer = load_model(on)
        measured = measure_effects(
            *(model, tokenizer, read.to(dtype=model.dtype), drawn, scale, out),
            openers=texts,
            sampling=sampling,
            batch_size=batch_size,
            layers=on.layers,
            model_name=on.model_name,
        )
    print_line(f"Written to {out}: effects of {measured.n} directions on {measured.record.d_sae} latents.")
    print_next("vector", "fit", out, "--out", "effects.safetensors")


@app.command()
@with_options
def fit(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that dspa vector effects wrote.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    settings: Annotated[FitSettings, Options("Fit")],
) -> None:
    """Fit a linear model of the effects of directions, and report how well it predicts those it has not seen.

    A measurement that was stopped counts with the directions that it finished.
    """
    from dspa.sae_ts.approximator import fit_effects
    from dspa.sae_ts.effects import Effects

    check_writable("--out", out, {"FOLDER": folder})
    measured = Effects.open(folder)
    if measured.n < measured.record.n_directions:
        print_line(f"{measured.n} of {measured.record.n_directions} directions are measured.")
    made = fit_effects(measured, settings)
    made.save(out)
    record = made.record
    title = f"{record.n_held_out} held-out directions, after a fit of {record.n_directions}"
    print_table(title, {**scores(record), "penalty": f"{record.ridge:g}"})
    print_line(f"Written to {out}.")
    print_next("vector", "target", out, "--latent", "12", "--out", "vector.safetensors")


@app.command()
def target(
    approximator: Approximator,
    latent: Annotated[
        list[str],
        typer.Option(
            metavar="LATENT[=WEIGHT]",
            help="Latent to raise, by default with weight 1, or to lower, with one below 0. Several times.",
        ),
    ],
    out: VectorOut,
    variant: Annotated[
        str, typer.Option(help="Formula: targeted; or pseudo-inverse or rotation, which did worse in the paper.")
    ] = "targeted",
    side_effects: SideEffects = 1.0,
    scale: Scale = 1.0,
    positions: Positions = "all",
    sae: Annotated[str | None, typer.Option(help=f"SAE for rotation, by default as recorded. {SAE_HELP}")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of --sae, if its files do not contain it.")] = None,
) -> None:
    """Make the vector that is expected to raise some latents and nothing else.

    For example: `dspa vector target effects.safetensors --latent 12 --latent 40=-0.5 --scale 60 --out v.safetensors`
    """
    from dspa.sae_ts.approximator import EffectApproximator

    check_writable("--out", out, {"EFFECTS": approximator, "--sae": sae})
    weights = dict(map(_weight, latent))
    if len(weights) < len(latent):
        raise refusal(ValueError, "--latent", "one latent twice", "different latents")
    if variant != "rotation":
        check_used("--variant rotation", None, [name for name, given in (("--sae", sae), ("--layer", layer)) if given])
    made = EffectApproximator.load(approximator)
    loaded = None
    if variant == "rotation":
        loaded = load_recorded_sae("--sae", sae, layer, "cpu", made.record.sources.get("sae"), made.record.layer)
    _make(made, weights, out, variant=variant, side_effects=side_effects, scale=scale, positions=positions, sae=loaded)


@app.command()
@with_options
def imitate(
    approximator: Approximator,
    map_path: Annotated[Path, typer.Option("--map", help="Map of DSPA whose edits to imitate.")],
    out: VectorOut,
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Weigh latents by how often these prompts select them, and not by the map's column sums: text, one "
            f"per line, or {FILES} with `prompt`."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Put prompts that are text into the model's chat template, as a user's turn.")
    ] = False,
    mode: Annotated[str, typer.Option(help=f"Edits to imitate: {', '.join(MODES)}.")] = "ablate",
    k_diff: Annotated[int, typer.Option(help="Latents at each end: of the column sums, or per prompt.", min=1)] = 16,
    k_prompt: Annotated[int, typer.Option(help="Input latents per prompt, with --prompts.", min=1)] = 32,
    side_effects: SideEffects = 1.0,
    scale: Scale = 1.0,
    positions: Positions = "all",
) -> None:
    """Make one vector that imitates what a map of DSPA edits, for where no SAE may run.

    The target has the latents that DSPA ablates with weights below 0, and those that it augments above.
    """
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.sae_ts.approximator import EffectApproximator
    from dspa.sae_ts.imitation import map_target

    check_writable("--out", out, {"EFFECTS": approximator, "--map": map_path, "--prompts": prompts})
    used = [*changed(on), *changed(pair), *(["--chat"] if chat else []), *(["--k-prompt"] if k_prompt != 32 else [])]
    check_used("--prompts", prompts, used)
    made, cdmap = EffectApproximator.load(approximator), ConditionalDifferenceMap.load(map_path)
    if made.record.sae != cdmap.meta.sae_out:
        got = f"of an output SAE with fingerprint {cdmap.meta.sae_out}"
        raise refusal(ValueError, "--map", got, f"a map of the SAE whose effects were measured, {made.record.sae}")
    names = {name: f"--{name.replace('_', '-')}" for name in ("mode", "k_diff", "k_prompt", "prompts")}
    with messages_of_options(names):
        config = SteeringConfig(mode=mode, k_diff=k_diff, k_prompt=k_prompt)
        weights = map_target(cdmap, config) if prompts is None else _selected(prompts, chat, cdmap, config, on, pair)
    _make(made, weights, out, side_effects=side_effects, scale=scale, positions=positions)


@app.command(name="scale")
@with_options
def find(
    vector: Annotated[Path, typer.Argument(help="Vector, whose own scale does not matter.")],
    texts: Annotated[
        Path, typer.Argument(help=f"Ordinary text, one document per line; {FILES} with `text`; or preference triples.")
    ],
    on: OnModel,
    out: Annotated[Path | None, typer.Option(help="Write the vector with the scale that was found here.")] = None,
    delta: Annotated[float, typer.Option(help="Rise of the cross-entropy to find, in nats per token.")] = 0.5,
    start: Annotated[float, typer.Option(help="First scale to try, which is doubled until the rise is reached.")] = 1.0,
    maximum: Annotated[float, typer.Option(help="Largest scale to try.")] = 1024.0,
    documents: Annotated[int, typer.Option(help="Number of documents to read, the first ones.", min=1)] = 200,
    length: Annotated[int, typer.Option(help="Tokens per document, from its start.", min=2)] = 32,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per batch, padding included.", min=1)] = 8192,
) -> None:
    """Find the scale at which a vector raises the cross-entropy of ordinary text by a given amount.

    So vectors of different kinds can be compared at one cost.
    """
    from dspa.data.texts import TextFile, tokenize_entry
    from dspa.evaluate.scale import find_scale
    from dspa.steering.vector import SteeringVector

    check_writable("--out", out, {"VECTOR": vector, "TEXTS": texts})
    check_model(on)
    loaded, file = SteeringVector.load(vector), TextFile(texts)
    model, tokenizer = load_model(on)
    ids = (ids for entry in file.entries() for ids in tokenize_entry(entry, tokenizer, length))
    names = {name: f"--{name.replace('_', '-')}" for name in ("delta", "start", "maximum", "batch_tokens")}
    with messages_of_options(names | {"texts": "TEXTS"}):
        found = find_scale(
            *(model, loaded, list(islice(ids, documents))),
            delta=delta,
            start=start,
            maximum=maximum,
            batch_tokens=batch_tokens,
            progress=True,
            layers=on.layers,
            model_name=on.model_name,
        )
    rises = {
        f"scale {end.scale:.4g}": f"{end.cross_entropy:.4f} ({end.cross_entropy - found.base:+.4f})"
        for end in (found.below, found.above)
    }
    title = f"Cross-entropy of {found.n_tokens} tokens, in nats per token"
    found_scale = {f"scale for {delta:+g}, interpolated": f"{found.scale:.4g}"}
    print_table(title, {"without the vector": f"{found.base:.4f}"} | rises | found_scale)
    if out is not None:
        loaded.replaced(scale=found.scale).save(out)
        print_line(f"Written to {out}, with this scale.")
        print_next("compare", "PROMPTS", "--vector", out, "--model", on.model)


def _weight(text: str) -> tuple[int, float]:
    """Return the latent and the weight of one --latent."""
    latent, _, weight = text.partition("=")
    try:
        return int(latent), float(weight or 1)
    except ValueError:
        accepted = "LATENT or LATENT=WEIGHT, such as 12 or 12=-0.5"
        raise refusal(ValueError, "--latent", repr(text), accepted) from None


def _selected(path: Path, chat: bool, cdmap: Any, config: SteeringConfig, on: Any, pair: Any) -> dict[int, float]:
    """Return the weights of the latents that the prompts of a file select."""
    from tqdm import tqdm

    from dspa.data.prompts import read_prompt_file, tokenize_prompt
    from dspa.sae_ts.imitation import prompts_target

    texts = read_prompt_file("--prompts", path)
    model, tokenizer, (sae_in, _) = load_made_with(cdmap, on, pair)
    ids = (tokenize_prompt(tokenizer, text, chat) for text in tqdm(texts, unit="prompt", desc="select"))
    return prompts_target(model, ids, sae_in, cdmap, config, layers=on.layers)


def _make(made: EffectApproximator, weights: dict[int, float], out: Path, **options: Any) -> None:
    """Make a vector, save it, and print what effects are predicted of it."""
    from dspa.sae_ts.vectors import targeted_vector

    names = {"target": "--latent", "variant": "--variant", "side_effects": "--side-effects", "sae": "--sae"}
    with messages_of_options(names | {"scale": "--scale", "positions": "--positions"}):
        vector = targeted_vector(made, weights, **options)
    vector.save(out)
    effect = made.predict(vector.vector[None])[0]
    title = f"Effects that are predicted of the vector at scale {made.record.scale:g}"
    heaviest = sorted(weights, key=lambda latent: -abs(weights[latent]))[:10]
    shown = {f"latent {j} (weight {weights[j]:+.3g})": f"{effect[j]:+.4f}" for j in heaviest}
    print_table(title, shown)
    print_line(f"Written to {out}.")
    source = made.record.sources.get("model")
    model = source.path if source else "MODEL"
    print_next("vector", "scale", out, "TEXTS", "--model", model, "--out", "scaled.safetensors")
