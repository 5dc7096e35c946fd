"""Models, SAEs and data, loaded by the names that the command line has for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.cli.options import ModelOptions, SAEPairOptions, errors_of_options
from dspa.data.records import ENDINGS, ending_of
from dspa.distributed import local_rank
from dspa.errors import missing_package, refusal

if TYPE_CHECKING:
    from dspa.saes.frozen import FrozenSAE


def check_writable(option: str, path: Path | None) -> None:
    """Raise for a path that cannot be written, before the work and not after it."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise refusal(ValueError, option, path, "a file in a folder that exists")


def device_named(name: str) -> str:
    """Return the device that --device means; each of several processes has the GPU of its own number."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps"):
        raise refusal(ValueError, "--device", repr(name), "auto, cuda, cuda:1, cpu, mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise refusal(ValueError, "--device", f"{name!r}, and this machine has no CUDA device", "cpu, auto")
    if name != "cuda":
        return name
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"This is process {local_rank()} on a machine of {torch.cuda.device_count()} GPUs; accepted: at most one "
            "process per GPU. Start fewer, or use --device cpu."
        )
    return f"cuda:{local_rank()}"


def load_sae(spec: str, layer: int | None, device: str, layer_option: str = "--layer") -> FrozenSAE:
    """Load an SAE from a path, or from RELEASE:SAE_ID; `layer_option` is what gave the layer."""
    from dspa.saes.frozen import FrozenSAE

    release, _, sae_id = spec.partition(":")
    with errors_of_options({"layer": layer_option}):
        if sae_id and not Path(spec).exists():
            return FrozenSAE.from_pretrained(release, sae_id, device=device, layer=layer)
        return FrozenSAE.load(spec, layer=layer, device=device)


def load_model(options: ModelOptions) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device_named(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    load: Any = AutoModelForCausalLM.from_pretrained
    return load(options.model, dtype=options.dtype).to(device).eval(), tokenizer


def load_all(options: ModelOptions, pair: SAEPairOptions) -> tuple[Any, Any, FrozenSAE, FrozenSAE]:
    """Load a model, its tokenizer, and the two SAEs in the model's dtype."""
    # SAEs first: they are quick to load, and wrong more often.
    device = device_named(options.device)
    sae_in = load_sae(pair.sae_in, pair.layer_in, device, "--layer-in")
    sae_out = load_sae(pair.sae_out, pair.layer_out, device, "--layer-out")
    model, tokenizer = load_model(options)
    return model, tokenizer, sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype)


def triple_source(triples: str, split: str, stream: bool) -> Any:
    """Return a file of triples, or a data set from the Hub or a folder."""
    if not triples.strip():
        raise refusal(ValueError, "TRIPLES", "an empty name", "a file, a folder, or the name of a data set")
    path = Path(triples)
    if path.is_file() or ending_of(path) in ENDINGS or not (path.is_dir() or "/" in triples):
        return path
    try:
        from datasets import load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise missing_package(f"Reading the data set {triples}", "datasets") from error
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
