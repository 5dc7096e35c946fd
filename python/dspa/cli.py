"""The command line. Parses arguments and calls the package; every heavy import waits for its command."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from dspa.cdmap import ConditionalDifferenceMap
    from dspa.saes import FrozenSAE
    from dspa.trace import Trace

app = typer.Typer(
    help="Steer language models with sparse autoencoders (SAEs): DSPA, preference alignment at inference time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
map_app = typer.Typer(help="Make and look at conditional-difference maps.", no_args_is_help=True)
sae_app = typer.Typer(help="Look at sparse autoencoders.", no_args_is_help=True)
app.add_typer(map_app, name="map")
app.add_typer(sae_app, name="sae")

console = Console()
PACKAGES = ("dspa-kernels", "torch", "triton", "transformers", "sae-lens", "safetensors", "numpy")


class Mode(str, Enum):
    """Which latents are edited."""

    ablate = "ablate"
    augment = "augment"
    both = "both"


class Screen(str, Enum):
    """How the encoder is read where a token's maximum is needed."""

    none = "none"
    int8 = "int8"


class DType(str, Enum):
    """Numbers that a model computes with."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


SAE_HELP = "A folder or file of an SAE, or RELEASE:SAE_ID of SAELens' catalogue."
Model = Annotated[str, typer.Option(help="A Hugging Face model: a folder or a Hub name.", show_default=False)]
SAEIn = Annotated[str, typer.Option("--sae-in", help=f"Input SAE, which reads the prompt. {SAE_HELP}")]
SAEOut = Annotated[str, typer.Option("--sae-out", help=f"Output SAE, where edits happen. {SAE_HELP}")]
LayerIn = Annotated[int | None, typer.Option(help="Layer of the input SAE, if its files do not say it.")]
LayerOut = Annotated[int | None, typer.Option(help="Layer of the output SAE, if its files do not say it.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu; auto takes cuda where there is one.")]
Numbers = Annotated[DType, typer.Option("--dtype", help="Numbers of the model and the SAEs.")]
Name = Annotated[str | None, typer.Option(help="What the model is, if its name or path does not tell.")]
Layers = Annotated[str | None, typer.Option(help="Dotted path of the decoder layers, for an unknown architecture.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("dspa-kernels"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")] = False,
) -> None:
    # Nothing to do before a command: `main` looks for --debug when one fails.
    del debug, show_version


@app.command()
def demo(
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the demo's model and SAEs again first.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write all results.")] = Path(
        "dspa-demo.json"
    ),
) -> None:
    """Steer a small language model, trained for this, and compare DSPA with the base model and a static set.

    Runs on two CPU cores in under two minutes, without a network.
    """
    from dspa.demo import run

    _check_writable("--json", json_path)
    if retrain:
        from dspa.demo.train import train

        # A training that is stopped leaves the demo as it was.
        with TemporaryDirectory() as folder:
            train(Path(folder))
            shutil.copytree(folder, run.ASSETS, dirs_exist_ok=True)
    run.run(json_path)


@map_app.command("build")
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

    _check_writable("--out", out)
    from dspa.cdmap import build_map
    from dspa.preferences import load_triples

    # All triples are checked before a model is loaded.
    checked = list(islice(load_triples(triples), first))
    lm, tokenizer, read, edit = _load(model, (sae_in, layer_in), (sae_out, layer_out), device, dtype)
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


@map_app.command("show")
def map_show(
    path: Annotated[Path, typer.Argument(help="A map.")],
    top: Annotated[int, typer.Option(help="Latents to list at each end.", min=0)] = 10,
) -> None:
    """Tell what a map was made from, and which output latents it moves most."""
    from dspa.cdmap import ConditionalDifferenceMap

    cdmap = ConditionalDifferenceMap.load(path)
    _print_table(f"{path}", vars(cdmap.meta) | {"columns": len(cdmap.columns), "hot latents": _calibration(cdmap)})
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(descending=True, stable=True)
    table = Table("augmented", "column sum", "ablated", "column sum", title="Output latents by column sum of A")
    for high, low in zip(order[:top].tolist(), order.flip(0)[:top].tolist(), strict=True):
        cells = ((int(cdmap.columns[j]), float(sums[j])) for j in (high, low))
        table.add_row(*(cell for latent, total in cells for cell in (str(latent), f"{total:+.4g}")))
    console.print(table)


@app.command()
def generate(
    model: Model,
    map_path: Annotated[Path, typer.Option("--map", help="A map made with the same SAEs.")],
    sae_in: SAEIn,
    sae_out: SAEOut,
    prompt: Annotated[
        str | None, typer.Option(help="One prompt. Without it and --file, prompts are asked for.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: one a line, or JSON Lines with `prompt`. Answers are JSON Lines.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write answers here, as JSON Lines, instead of printing.")] = None,
    alpha: Annotated[float, typer.Option(help="Strength; 0 is the untouched model.")] = 0.2,
    mode: Annotated[Mode, typer.Option(help="Which latents are edited.")] = Mode.ablate,
    k_prompt: Annotated[int, typer.Option(help="Prompt latents that choose.")] = 32,
    k_diff: Annotated[int, typer.Option(help="Output latents to edit at each end.")] = 16,
    positions: Annotated[str, typer.Option(help="Tokens to steer: response, generated or all.")] = "response",
    scoring: Annotated[str, typer.Option(help="raw, demixed, whitened or confident.")] = "raw",
    backend: Annotated[str, typer.Option(help="auto, reference, triton or cuda; see dspa info.")] = "auto",
    screen: Annotated[
        Screen, typer.Option(help="int8: the same answers; reads a copy of the encoder of one byte a number first.")
    ] = Screen.none,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer, at most.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write every edited token here, as JSON Lines.")] = None,
    layer_in: LayerIn = None,
    layer_out: LayerOut = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Generate steered text: for one prompt, for a file of them, or for what you type."""
    import torch

    from dspa.cdmap import ConditionalDifferenceMap
    from dspa.config import SteeringConfig
    from dspa.prompts import read_prompts, tokenize_prompt
    from dspa.steering import Steering

    _check_writable("--out", out)
    _check_writable("--trace", trace)
    config = SteeringConfig(
        k_prompt=k_prompt, k_diff=k_diff, alpha=alpha, mode=mode.value, positions=positions, scoring=scoring
    )
    prompts = read_prompts(prompt, file)
    cdmap = ConditionalDifferenceMap.load(map_path)
    lm, tokenizer, read, edit = _load(model, (sae_in, layer_in), (sae_out, layer_out), device, dtype)
    steering = Steering(read, edit, cdmap, config, backend=backend, screen=screen.value, record=trace is not None)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    torch.manual_seed(seed)
    sink = out.open("w", encoding="utf-8") if out else sys.stdout
    as_records = out is not None or file is not None
    with steering.attach(lm, layers=layers, model_name=model_name), _saving(steering.trace, trace):
        for text in prompts:
            inputs = tokenize_prompt(tokenizer, text, chat).to(lm.device)
            tokens = lm.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]
            answer = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(json.dumps({"prompt": text, "response": answer}) if as_records else answer, file=sink, flush=True)


@sae_app.command("show")
def sae_show(
    sae: Annotated[str, typer.Argument(help=SAE_HELP)],
    layer: Annotated[int | None, typer.Option(help="Its layer, if its files do not say it.")] = None,
) -> None:
    """Tell what an SAE is: architecture, widths, layer, model, what was folded, fingerprint."""
    loaded = _sae(sae, layer, "cpu")
    names = ("arch", "d_in", "d_sae", "layer", "model_name", "dtype", "folded", "fingerprint")
    details = {name: getattr(loaded, name) for name in names}
    _print_table(sae, details | {"k": loaded.weights.k or "-", "normalize": loaded.weights.normalize})


@app.command()
def info() -> None:
    """Tell versions, devices, and which backends can run here and why the others cannot."""
    import torch

    from dspa_kernels import available_backends

    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    _print_table("dspa-kernels", versions | {"CUDA devices": ", ".join(gpus) or "none"})
    table = Table("backend", "runs here", "ops or reason", title="Backends, in the order in which auto tries them")
    for name, status in available_backends().items():
        table.add_row(name, "yes" if status.available else "no", status.reason or ", ".join(status.ops))
    console.print(table)


def _calibration(cdmap: ConditionalDifferenceMap) -> str:
    """One line about what lets steering read less of the encoder."""
    from dspa.cdmap import N_LARGE

    if not len(cdmap.hot):
        return "none: the map has no calibration"
    return f"{len(cdmap.hot)}; the first {N_LARGE} held {cdmap.hot_share():.1%} of the tokens' maxima"


def _print_table(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    console.print(table)


@contextmanager
def _saving(trace: Trace, path: Path | None) -> Iterator[None]:
    """Write the trace at the end, an early one too."""
    try:
        yield
    finally:
        if path is not None:
            trace.save(path)


def _check_writable(option: str, path: Path | None) -> None:
    """Raise before the work, not after it."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise ValueError(f"{option} is {path}; accepted: a file in a folder that exists.")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r} and no CUDA device was found; accepted here: cpu, auto.")
    return name


def _sae(spec: str, layer: int | None, device: str) -> FrozenSAE:
    """An SAE from a path, or from RELEASE:SAE_ID."""
    from dspa.saes import FrozenSAE

    release, _, sae_id = spec.partition(":")
    if sae_id and not Path(spec).exists():
        return FrozenSAE.from_pretrained(release, sae_id, device=device, layer=layer)
    return FrozenSAE.load(spec, layer=layer, device=device)


def _load(
    model: str, sae_in: tuple[str, int | None], sae_out: tuple[str, int | None], device: str, dtype: DType
) -> tuple[Any, Any, FrozenSAE, FrozenSAE]:
    """Model, tokenizer and the two SAEs, the SAEs in the model's dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = _device(device)
    # SAEs first: they are quick to load, and wrong more often.
    saes = [_sae(spec, layer, device) for spec, layer in (sae_in, sae_out)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    load_model: Any = AutoModelForCausalLM.from_pretrained
    lm = load_model(model, dtype=dtype.value).to(device).eval()
    read, edit = (sae.to(dtype=lm.dtype) for sae in saes)
    return lm, tokenizer, read, edit


def main() -> None:
    """Run the command line: an error is one message and exit code 2."""
    from safetensors import SafetensorError

    try:
        app(prog_name="dspa")
    except (ValueError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}")
        raise SystemExit(2) from error
