"""`dspa generate`: steered text."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.gates import Gates
from dspa.cli.latents import LatentOptions, load_latents_sae, without_shared
from dspa.cli.loading import (
    check_model,
    check_writable,
    load_adapter,
    load_model,
    load_pairs,
    load_persona_sae,
)
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
    Sampling,
    changed,
    check_used,
    with_options,
    without_persona,
)
from dspa.cli.texts import as_record, print_comparison
from dspa.config import SteeringConfig
from dspa.distributed import device_named
from dspa.errors import ModelError, refusal
from dspa.outputs import open_output

if TYPE_CHECKING:
    from dspa.steering.gated import Gated
    from dspa.steering.latent_sets import LatentSet
    from dspa.steering.trace import Trace

BACKENDS = ("auto", "reference", "triton", "cuda")
SCREENS = ("none", "int5")


@dataclass(frozen=True)
class BackendOptions:
    """Settings of computing, which do not change the result."""

    backend: str = field(
        default="auto",
        metadata={
            "help": "Implementation that computes the edits; dspa info shows which can run here.",
            "choices": BACKENDS,
        },
    )
    screen: str = field(
        default="none",
        metadata={
            "help": "Read an int5 copy of the output SAE's encoder first, if int5; this changes no answer.",
            "choices": SCREENS,
        },
    )


@with_options
def generate(
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    adapter_sae: AdapterSAE,
    config: Annotated[SteeringConfig, Options("Steering", without=["ridge", "delta"])],
    ops: Annotated[BackendOptions, Options("Steering")],
    sampling: Sampling,
    latents: Annotated[LatentOptions, Options("Latents")],
    gates: Gates,
    maps: Annotated[
        list[Path] | None,
        typer.Option(
            "--map",
            help="Steer by DSPA with this map, a file that dspa map build wrote. Several maps, of different output "
            "layers, act together.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Steer by FSRL with this adapter, a folder that dspa fsrl train wrote.")
    ] = None,
    persona: Annotated[
        Path | None, typer.Option(help="Ablate the latents of this persona, a file that dspa personal make wrote.")
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Add this vector, such as a file of dspa vector target or dspa baseline repe.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One prompt. Without it and --file, type prompts, or pipe them in, one per line.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help=f"Prompts: text, one per line, or {FILES} with `prompt`. Answers are JSON Lines."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write answers here, as JSON Lines, instead of printing.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Number of prompts of a file that are generated together.", min=1)
    ] = 1,
    stream: Annotated[
        bool, typer.Option(help="Print the text while it is generated, for one prompt or typed ones.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(help="Also generate without steering, and mark tokens that were predicted from an edited one."),
    ] = False,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            help="Write every edited token here, with its latents before and after, as JSON Lines. Several maps need "
            "a file each, in the same order, and chosen latents one after them."
        ),
    ] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Generate text with a steered model: for one prompt, for a file of them, or for what you type.

    DSPA edits features (latents) of a sparse autoencoder (SAE) that each prompt chooses through a map. FSRL moves them
    by a trained adapter. A persona ablates the same latents for every prompt. A vector is added to the residuals of a
    layer. All of them can act together. All but a vector know their model and SAEs, so that this is enough:

    `dspa generate --map map.dspa.safetensors --prompt "How do I ..."`

    Latents that you choose yourself need none of them:

    `dspa generate --model MODEL --sae SAE --latent 971=4 --latent 77 --prompt "How do I ..."`
    """
    from tqdm import tqdm

    from dspa.data.prompts import read_prompts, tokenize_prompt
    from dspa.evaluate.generation import answer_prompts, check_prompts
    from dspa.steering.dspa import Steering

    map_paths, traces = maps or [], trace or []
    chosen = latents.sets()
    if len(chosen) > 1:
        raise refusal(ValueError, "--latents", f"one of {len(chosen)} sets", "one set, of --latent or of a file")
    _check_given(map_paths, adapter, persona, vector, latents, pair, adapter_sae, config, ops, traces)
    if stream and (file or out or compare):
        raise ValueError("--stream prints one text as it grows; leave out --file, --out and --compare, or --stream.")
    read = {"--file": file, "--adapter": adapter, "--persona": persona, "--model": on.model}
    read |= {f"--latents {path}": path for path in latents.latents or []}
    read |= {f"--map {path}" if len(map_paths) > 1 else "--map": path for path in map_paths}
    read |= {"--vector": vector, "--sae-in": pair.sae_in, "--sae-out": pair.sae_out, "--sae": adapter_sae.sae}
    read |= {"--gate-prompts": gates.gate_prompts}
    gates.prompts()
    check_writable("--out", out, read)
    for n, path in enumerate(traces):
        check_writable("--trace", path, read | {"--out": out} | {f"--trace {other}": other for other in traces[:n]})
    prompts: Iterable[str] = read_prompts(prompt, file)
    model, tokenizer, attachables, edits = _load(
        *(on, map_paths, pair, config, ops, adapter, adapter_sae, persona, vector, chosen),
        record=compare or bool(traces),
    )
    if sampling.chat:
        made = [("--map", part.cdmap.meta.chat_template_kwargs) for part in attachables if isinstance(part, Steering)]
        if adapter is not None:
            from dspa.fsrl.training import trained_template

            made.append(("--adapter", trained_template(tokenizer, adapter)[1]))
        warn_of_other_template(made, chat_template_kwargs)
    encode = partial(tokenize_prompt, tokenizer, chat=sampling.chat, chat_template_kwargs=chat_template_kwargs)
    max_new_tokens = sampling.max_new_tokens
    gate = gates.made(
        *(model, tokenizer),
        chat=sampling.chat,
        chat_template_kwargs=chat_template_kwargs,
        max_new_tokens=max_new_tokens,
    )
    for attachable in attachables:
        attachable.gate = gate
    if file is not None:
        prompts = list(prompts)
        # All of a file, before the first answer.
        max_new_tokens = check_prompts(model, map(encode, prompts), max_new_tokens)
    with ExitStack() as stack:
        for attachable in attachables:
            stack.enter_context(attachable.attach(model, **on.names))
        write_edits = stack.enter_context(_writing(edits, traces))
        sink = stack.enter_context(open_output(out)) if out else sys.stdout
        total = len(prompts) if isinstance(prompts, list) else None
        bar = stack.enter_context(tqdm(total=total, unit="prompt", desc="generate", disable=file is None))
        batches = answer_prompts(
            *(model, tokenizer, attachables, prompts, encode),
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            batch_size=batch_size if file is not None else 1,
            compare=compare,
            stream=stream,
        )
        for answers in batches:
            write_edits()
            for answer in answers:
                if out is not None or file is not None:
                    tqdm.write(as_record(answer), file=sink)
                elif compare:
                    print_comparison(answer)
                elif not stream:
                    print(answer.text, flush=True)
            sink.flush()
            bar.update(len(answers))


def _check_given(
    map_paths: Sequence[Path],
    adapter: Path | None,
    persona: Path | None,
    vector: Path | None,
    latents: LatentOptions,
    pair: RecordedSAEPairOptions,
    adapter_sae: AdapterSAEOptions,
    config: SteeringConfig,
    ops: BackendOptions,
    traces: Sequence[Path],
) -> None:
    """Raise `ValueError` where nothing steers, or for an option of what is not used."""
    if not map_paths and adapter is None and persona is None and vector is None and not latents.chosen:
        raise ValueError(
            "None of --map (DSPA), --adapter (FSRL), --persona, --vector, --latent and --latents was given; accepted: "
            "one of them, or more."
        )
    of_maps = [*changed(pair), *changed(config), *changed(ops, "backend")]
    if traces:
        of_maps.append("--trace")
    check_used("--map", map_paths, without_shared(without_persona(of_maps, persona), latents.chosen))
    if traces and len(traces) != (needed := len(map_paths) + latents.chosen):
        each = "one for each map" + (" and one for the latents" if latents.chosen else "")
        raise refusal(ValueError, "--trace", f"given {len(traces)} times", f"{needed} files, {each}")
    check_used("--adapter or --latent", adapter or latents.chosen, changed(adapter_sae))


def _load(
    on: RecordedModelOptions,
    map_paths: Sequence[Path],
    pair: RecordedSAEPairOptions,
    config: SteeringConfig,
    ops: BackendOptions,
    adapter_path: Path | None,
    adapter_sae: AdapterSAEOptions,
    persona_path: Path | None,
    vector_path: Path | None,
    chosen: Mapping[str, LatentSet],
    *,
    record: bool,
) -> tuple[Any, Any, list[Gated], list[Trace]]:
    """Load a model, its tokenizer and what steers it; also return the traces, one for each map and one of latents."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.models.sources import may_be_one
    from dspa.personal.persona import Persona, ablation_of
    from dspa.saes.meanings import top_tokens
    from dspa.steering.dspa import Steering
    from dspa.steering.joint import check_layers
    from dspa.steering.latents import LatentSteering
    from dspa.steering.vector import SteeringVector

    # The model last: the others are quick to load, and wrong more often.
    device = device_named(on.device)
    check_model(on)
    maps = [ConditionalDifferenceMap.load(path) for path in map_paths]
    check_layers("--map", [cdmap.meta.layer_out for cdmap in maps])
    pairs = load_pairs(pair, device, maps)
    adapter = None if adapter_path is None else load_adapter(adapter_path, adapter_sae, device, ops.backend)
    persona = None if persona_path is None else Persona.load(persona_path)
    persona_sae = None if persona is None else load_persona_sae(persona, pair, device, itertools.chain(*pairs))
    vector = None if vector_path is None else SteeringVector.load(vector_path)
    edited = [*(sae_out for _, sae_out in pairs), *([adapter.sae] if adapter else ())]
    edited += [persona_sae] if persona_sae else []
    latents_sae = load_latents_sae(adapter_sae, device, edited) if chosen else None
    if latents_sae is not None and persona_sae is not None and latents_sae.layer == persona_sae.layer:
        got, accepted = f"of layer {latents_sae.layer}, whose latents --persona ablates", "latents of another layer"
        raise refusal(ValueError, "--latent", got, accepted, "Or give the latents of the persona as --latent, too.")
    recorded = {*(cdmap.sources.get("model") for cdmap in maps), adapter.trained_on if adapter else None}
    recorded = (recorded | {persona.record.sources.get("model") if persona else None}) - {None}
    if on.model is None and not may_be_one(source.digest for source in recorded if source):
        raise ValueError(
            "What steers was made with different models. Pass --model to choose one, and --other-weights to use it "
            "with all."
        )
    model, tokenizer = load_model(on, next(iter(recorded), None))
    attachables: list[Gated] = []
    settings: dict[str, Any] = {"backend": ops.backend, "screen": ops.screen, "record": record}
    steerings = [
        Steering(sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype), cdmap, config, **settings)
        for (sae_in, sae_out), cdmap in zip(pairs, maps, strict=True)
    ]
    attachables += steerings
    traces = [steering.trace for steering in steerings]
    if adapter is not None:
        adapter.sae = adapter.sae.to(dtype=model.dtype)
        attachables.append(adapter)
    if persona is not None and persona_sae is not None:
        attachables.append(ablation_of({"persona": persona}, persona_sae.to(dtype=model.dtype)))
    if vector is not None:
        attachables.append(vector)
    if latents_sae is not None:
        sae = latents_sae.to(dtype=model.dtype)
        by_latents = LatentSteering(sae, chosen, positions=config.positions, record=record)
        attachables.append(by_latents)
        traces.append(by_latents.trace)
        if record:
            latents = {latent for one in chosen.values() for latent in one.strengths}
            # A model whose head cannot be read has no tokens for them.
            with suppress(ModelError):
                by_latents.trace.promoted = top_tokens(sae, model, tokenizer, sorted(latents))
    for trace in traces:
        trace.tokenizer = tokenizer
    return model, tokenizer, attachables, traces


def warn_of_other_template(
    made: Iterable[tuple[str, Mapping[str, Any] | None]], given: Mapping[str, Any] | None
) -> None:
    """Warn where prompts get other values for the chat template than the conversations of a map or adapter got.

    Args:
        made: option of each map or adapter, and the values that it was made with.
        given: values for the prompts.
    """
    for option, kwargs in made:
        if (kwargs or {}) != (given or {}):
            warnings.warn(
                f"{option} was made with {json.dumps(kwargs or {})} for the chat template, and these prompts get "
                f"{json.dumps(given or {})}. To steer such prompts as meant: --chat-template-kwargs "
                f"'{json.dumps(kwargs or {})}'.",
                stacklevel=2,
            )


@contextmanager
def _writing(edits: Sequence[Trace], paths: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Open the files of --trace; yields what writes the edits of a batch. Those of a stopped one are written too."""
    with ExitStack() as stack:
        files = [(trace, stack.enter_context(open_output(path))) for trace, path in zip(edits, paths, strict=False)]

        def write() -> None:
            for trace, file in files:
                trace.write(file)
                trace.clear()

        try:
            yield write
        finally:
            write()
