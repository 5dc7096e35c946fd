"""Models, SAEs and data, loaded by the names that the command line has for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dspa.cli.options import (
    AdapterSAEOptions,
    JudgeOptions,
    ModelOptions,
    RecordedModelOptions,
    RecordedSAEPairOptions,
    SAEPairOptions,
    changed,
    check_used,
    messages_of_options,
)
from dspa.data.records import ENDINGS, ending_of
from dspa.distributed import device_named
from dspa.errors import AdapterError, MapError, refusal, require_package
from dspa.outputs import FILE, try_folder, try_output
from dspa.schemas import Text, check, parse_json

if TYPE_CHECKING:
    from dspa.data.triples import Example
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.judges.judge import Judge
    from dspa.maps.cdmap import ConditionalDifferenceMap, MapMeta
    from dspa.models.sources import Source
    from dspa.personal.persona import Persona
    from dspa.saes.frozen import FrozenSAE
    from dspa.saes.labels import LatentSpace

T = TypeVar("T")


def check_writable(option: str, path: Path | None, others: Mapping[str, str | Path | None] | None = None) -> None:
    """Raise for a path that cannot be written, before the work and not after it.

    Args:
        option: the option that gives the path.
        path: the path, if it was given.
        others: what was given for something else, by what gave it: files, folders, or names on the Hub. None of these
            files may be overwritten, nor one in these folders, except a map. What a map or an adapter records as its
            model and SAEs counts as given.
    """
    if path is None:
        return
    given = {name: str(other) for name, other in (others or {}).items() if other is not None}
    recorded = {
        f"the {part.replace('_', '-')} of {name}": place
        for name, other in given.items()
        for part, place in _recorded_places(Path(other)).items()
    }
    for name, other in (given | recorded).items():
        if _is_same_file(path, Path(other)):
            raise refusal(ValueError, option, f"{path}, as {name} is", f"{FILE}, other than {name}")
        if _is_read_from(path, Path(other)):
            got = f"{path}, a file in the folder that {name} is"
            raise refusal(ValueError, option, got, "a new file, one elsewhere, or a map", "Name another, or delete it.")
    try_output(path, option)


def make_folder(out: Path, names: Sequence[str], read: Sequence[Path | None]) -> None:
    """Make the output folder before the work, and check that its files can be written and are none of those read."""
    if (out.exists() and not out.is_dir()) or not out.absolute().parent.is_dir():
        raise refusal(ValueError, "--out", out, "a folder, or one to make in a folder that exists")
    try_folder(out, "--out", ValueError)
    for name in names if out.exists() else ():
        check_writable("--out", out / name, {str(path): path for path in read})
    out.mkdir(exist_ok=True)


def _recorded_places(path: Path) -> dict[str, str]:
    """Return where a map or an adapter says that its model and SAEs are; nothing of anything else."""
    if not (path.is_file() or path.is_dir()):
        return {}
    from dspa.files import read_header
    from dspa.fsrl.adapter import read_record
    from dspa.models.sources import Source

    try:
        if path.is_dir():
            sources = read_record(path).sources
        else:
            sources = check(dict[Text, Source], read_header(path).get("sources", {}), MapError, str(path))
    except (AdapterError, MapError, OSError):
        return {}
    return {name: source.path for name, source in sources.items()}


def _is_same_file(path: Path, other: Path) -> bool:
    """Return True if two paths are one regular file, there or not yet, also by links of either kind."""
    if path.exists() and other.exists():
        return path.is_file() and path.samefile(other)
    return os.path.realpath(path) == os.path.realpath(other)


def _is_read_from(path: Path, folder: Path) -> bool:
    """Return True if a path is a file in a folder and no map."""
    within = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if not (within and folder.is_dir() and path.is_file()):
        return False
    from dspa.files import read_header

    try:
        return not str(read_header(path).get("format")).startswith("dspa.map.")
    except (MapError, OSError):
        return True


def check_model(options: RecordedModelOptions) -> None:
    """Raise for a --model where there is none, before SAEs are loaded."""
    from dspa.models.places import model_place

    if options.model is not None:
        model_place(options.model, "--model")


def load_sae(spec: str, layer: int | None, device: str, layer_option: str = "--layer") -> FrozenSAE:
    """Load an SAE from a path, or from RELEASE:SAE_ID; `layer_option` is what gave the layer."""
    from dspa.saes.frozen import FrozenSAE

    with messages_of_options({"layer": layer_option}):
        return FrozenSAE.from_name(spec, layer=layer, device=device)


def load_recorded(option: str, source: Source | None, load: Callable[[str], T], digest: Callable[[T], str | None]) -> T:
    """Load what a map or an adapter was made with, from where it was loaded then.

    Args:
        option: the option that gives another place.
        source: the recorded place.
        load: loads what is at a path.
        digest: identifies what was loaded. A place is no evidence of what is there now.

    Raises:
        ValueError: nothing is recorded, nothing can be loaded from there any more, or it is something else.
    """
    from safetensors import SafetensorError

    advice = f"Pass {option}."
    if source is None:
        raise ValueError(f"{option} was not given, and what was made with it does not record its place. {advice}")
    what, accepted = f"{option}, as recorded,", "what the map or adapter was made with"
    if Path(source.path).is_absolute() and not Path(source.path).exists():
        raise refusal(ValueError, what, f"{source.path}, which is not there any more", accepted, advice)
    try:
        loaded = load(source.path)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise refusal(ValueError, what, f"{source.path}, which cannot be loaded ({error})", accepted, advice) from error
    if (now := digest(loaded)) != source.digest:
        got = f"{source.path}, where there is another one now (digest {now}, and {source.digest} was recorded)"
        raise refusal(ValueError, what, got, accepted, advice)
    return loaded


def load_model(options: RecordedModelOptions, recorded: Source | None = None) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its tokenizer; without --model, from the place that is recorded."""
    from dspa.models import load
    from dspa.models.sources import model_digest

    def digest(loaded: tuple[Any, Any]) -> str | None:
        like = recorded.digest if recorded else ""
        return like if options.other_weights else model_digest(loaded[0], like)

    def load_named(name: str) -> tuple[Any, Any]:
        return load.load_model(
            name, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )

    if options.model is not None:
        return load_named(options.model)
    return load_recorded("--model", recorded, load_named, digest)


def load_tuned(path: Path, options: RecordedModelOptions) -> Any:
    """Load a tuned model from its folder, or from that of a PEFT adapter, whose weights are merged into its model."""
    if not (path / "adapter_config.json").is_file():
        return load_model(replace(options, model=str(path)))[0]
    require_package("peft", "A model with a PEFT adapter")
    from peft import PeftConfig, PeftModel

    from dspa.resuming import deprecations_silenced

    source = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not source:
        got = f"{path}, an adapter that does not record its model"
        raise refusal(
            ValueError, "--tuned", got, "a folder of a model", "Merge the adapter into its model, and save it."
        )
    model, _ = load_model(replace(options, model=source))
    with deprecations_silenced():
        return PeftModel.from_pretrained(model, str(path)).merge_and_unload()


def load_recorded_sae(
    option: str,
    spec: str | None,
    layer: int | None,
    device: str,
    recorded: Source | None,
    recorded_layer: int | None,
    loaded: Iterable[FrozenSAE] = (),
) -> FrozenSAE:
    """Return the SAE that `option` names, or without it the one that is recorded, of a place and a layer.

    One that is among those `loaded` is not loaded again.
    """
    layer_option = option.replace("sae", "layer")
    if spec is not None:
        return load_sae(spec, layer, device, layer_option)
    layer = recorded_layer if layer is None else layer
    for sae in loaded:
        if recorded is not None and (sae.fingerprint, sae.layer) == (recorded.digest, layer):
            return sae
    return load_recorded(
        option, recorded, lambda path: load_sae(path, layer, device, layer_option), lambda sae: sae.fingerprint
    )


def load_pair(
    pair: RecordedSAEPairOptions,
    device: str,
    cdmap: ConditionalDifferenceMap | None = None,
    loaded: Iterable[FrozenSAE] = (),
) -> tuple[FrozenSAE, FrozenSAE]:
    """Return the two SAEs of DSPA; without their options those of the map, which may be among those `loaded`."""
    sources, meta = (cdmap.sources, cdmap.meta) if cdmap else ({}, None)
    layers = (meta.layer_in, meta.layer_out) if meta else (None, None)
    of_sae_in = ("--sae-in", pair.sae_in, pair.layer_in, device, sources.get("sae_in"), layers[0])
    sae_in = load_recorded_sae(*of_sae_in, loaded)
    of_sae_out = ("--sae-out", pair.sae_out, pair.layer_out, device, sources.get("sae_out"), layers[1])
    return sae_in, load_recorded_sae(*of_sae_out, (*loaded, sae_in))


def load_pairs(
    pair: RecordedSAEPairOptions, device: str, maps: Iterable[ConditionalDifferenceMap]
) -> list[tuple[FrozenSAE, FrozenSAE]]:
    """Return the two SAEs of each map. What maps share is loaded once."""
    keys: list[tuple[str, str]] = []
    pairs: dict[tuple[str, str], tuple[FrozenSAE, FrozenSAE]] = {}
    for cdmap in maps:
        keys.append((cdmap.meta.sae_in, cdmap.meta.sae_out))
        if keys[-1] not in pairs:
            pairs[keys[-1]] = load_pair(pair, device, cdmap, [*chain(*pairs.values())])
    return [pairs[key] for key in keys]


def load_persona_sae(
    persona: Persona, pair: RecordedSAEPairOptions, device: str, loaded: Iterable[FrozenSAE]
) -> FrozenSAE:
    """Return the SAE of a persona: one that is loaded already, or that of --sae-out, or the one that it records."""
    for sae in loaded:
        if sae.fingerprint == persona.record.sae:
            return sae
    source, layer = persona.record.sources.get("sae"), persona.record.layer
    return load_recorded_sae("--sae-out", pair.sae_out, pair.layer_out, device, source, layer)


def load_made_with(
    cdmap: ConditionalDifferenceMap, on: RecordedModelOptions, pair: RecordedSAEPairOptions
) -> tuple[Any, Any, tuple[FrozenSAE, FrozenSAE]]:
    """Load a map's model, its tokenizer and the two SAEs in the model's dtype, and check that they are those of it."""
    from dspa.models.layers import check_model_name, loaded_name
    from dspa.models.sources import check_weights

    check_model(on)
    sae_in, sae_out = load_pair(pair, device_named(on.device), cdmap)
    cdmap.check_saes(sae_in, sae_out)
    model, tokenizer = load_model(on, cdmap.sources.get("model"))
    check_model_name("The map was made with", cdmap.meta.model_name, on.model_name or loaded_name(model))
    check_weights("The map was made with", cdmap.model_digest, model, other_weights=on.other_weights)
    return model, tokenizer, (sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype))


def load_adapter(path: Path, options: AdapterSAEOptions, device: str, backend: str = "auto") -> FSRLAdapter:
    """Load an FSRL adapter and its SAE; without --sae, the one that the adapter records."""
    from dspa.fsrl.adapter import FSRLAdapter, read_record

    record = read_record(path)
    source, layer = record.sources.get("sae"), record.sae.layer
    sae = load_recorded_sae("--sae", options.sae, options.layer, device, source, layer)
    return FSRLAdapter.load(path, sae, backend=backend)


def load_all(options: ModelOptions, pair: SAEPairOptions) -> tuple[Any, Any, FrozenSAE, FrozenSAE]:
    """Load a model, its tokenizer, and the two SAEs in the model's dtype."""
    # SAEs first: they are quick to load, and wrong more often.
    check_model(options)
    sae_in, sae_out = load_pair(pair, device_named(options.device))
    model, tokenizer = load_model(options)
    return model, tokenizer, sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype)


def open_judge(options: JudgeOptions, out: Path) -> Judge | None:
    """Return the judge of the options, None without one. Its replies are kept in the output folder by default."""
    if options.judge is None and not options.replay:
        check_used("--judge", None, changed(options))
        return None
    if options.judge_model is None:
        raise refusal(ValueError, "--judge-model", "missing", "the name of the model of the judge")
    from dspa.judges.judge import Judge

    what, accepted = "--judge-parameters", """a JSON object such as '{"temperature": 1}'"""
    given = parse_json(options.judge_parameters, ValueError, what, accepted) if options.judge_parameters else None
    if given is not None and not isinstance(given, dict):
        raise refusal(ValueError, what, options.judge_parameters, accepted)
    if not options.replay:
        require_package("openai", "--judge")
    return Judge(
        options.judge,
        options.judge_model,
        cache=options.judge_cache or out / "judge",
        parameters=given,
        concurrency=options.judge_calls,
        replay=options.replay,
    )


def described_latents(labels: Path | None, meta: MapMeta, explainer: str | None) -> dict[int, str]:
    """Read what --labels says of output latents; nothing without it."""
    if labels is None:
        if explainer is not None:
            raise refusal(ValueError, "--explainer", f"{explainer!r} without --labels", "both, or neither")
        return {}
    from dspa.saes.labels import read_descriptions

    return read_descriptions(labels, latent_space(meta), explainer=explainer)


def latent_space(meta: MapMeta) -> LatentSpace:
    """Return what labels of a map's output latents have to agree with."""
    from dspa.saes.labels import LatentSpace

    place = meta.neuronpedia_out or str(meta.layer_out)
    return LatentSpace(meta.layer_out, place, meta.d_sae_out, meta.model_name)


def triple_source(triples: str, split: str, stream: bool) -> Any:
    """Return a file of triples, or a data set from the Hub or a folder."""
    if not triples.strip():
        raise refusal(ValueError, "TRIPLES", "an empty name", "a file, a folder, or the name of a data set")
    from dspa.models.places import is_hub_name

    path = Path(triples)
    of_hub = "/" in triples and is_hub_name(triples)
    if (path.exists() and not path.is_dir()) or ending_of(path) in ENDINGS or not (path.is_dir() or of_hub):
        return path
    require_package("datasets", f"Reading the data set {triples}")
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(triples)
        if split not in splits:
            raise refusal(ValueError, "--split", repr(split), ", ".join(splits))
        return splits[split]
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return load_from_disk(triples)
    try:
        return load_dataset(triples, split=split, streaming=stream)
    except DatasetsError as error:
        raise ValueError(
            f"{triples} cannot be read as a data set ({error}); accepted: a file of triples, a folder of JSON Lines or "
            "Parquet files of triples, or the name of a data set."
        ) from error


def checked_triples(
    triples: str, split: str, first: int | None, load: Callable[[Any], Iterator[Example]] | None = None
) -> Any:
    """Return triples as `triple_source` does, all or the first; the first one is checked before a model is loaded.

    `load` reads other examples in their place.
    """
    from dspa.data.triples import load_triples

    source, load = triple_source(triples, split, stream=False), load or load_triples
    next(load(source))
    return source if first is None else islice(load(source), first)
