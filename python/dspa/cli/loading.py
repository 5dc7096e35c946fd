"""Models, SAEs and data, loaded as the command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.cli.options import DType
from dspa.distributed import local_rank

if TYPE_CHECKING:
    from dspa.saes.frozen import FrozenSAE


def check_writable(option: str, path: Path | None) -> None:
    """Raise before the work, not after it."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise ValueError(f"{option} is {path}; accepted: a file in a folder that exists.")


def device_named(name: str) -> str:
    """The device that --device means: of several processes, each has the GPU of its own number."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device is {name!r}; accepted: auto, cuda, cuda:1, cpu, mps.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r} and no CUDA device was found; accepted here: cpu, auto.")
    if name != "cuda":
        return name
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"This is process {local_rank()} on a machine of {torch.cuda.device_count()} GPUs; accepted: at most one "
            "process a GPU. Start fewer, or use --device cpu."
        )
    return f"cuda:{local_rank()}"


def load_sae(spec: str, layer: int | None, device: str) -> FrozenSAE:
    """An SAE from a path, or from RELEASE:SAE_ID."""
    from dspa.saes.frozen import FrozenSAE

    release, _, sae_id = spec.partition(":")
    if sae_id and not Path(spec).exists():
        return FrozenSAE.from_pretrained(release, sae_id, device=device, layer=layer)
    return FrozenSAE.load(spec, layer=layer, device=device)


def load_model(model: str, device: str, dtype: DType) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device_named(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    load: Any = AutoModelForCausalLM.from_pretrained
    return load(model, dtype=dtype.value).to(place).eval(), tokenizer


def load_all(
    model: str, sae_in: tuple[str, int | None], sae_out: tuple[str, int | None], device: str, dtype: DType
) -> tuple[Any, Any, FrozenSAE, FrozenSAE]:
    """Model, tokenizer and the two SAEs, the SAEs in the model's dtype."""
    # SAEs first: they are quick to load, and wrong more often.
    place = device_named(device)
    saes = [load_sae(spec, layer, place) for spec, layer in (sae_in, sae_out)]
    lm, tokenizer = load_model(model, place, dtype)
    read, edit = (sae.to(dtype=lm.dtype) for sae in saes)
    return lm, tokenizer, read, edit


def triple_source(triples: str, split: str, stream: bool) -> Any:
    """A file of triples, or a data set of the Hub or in a folder."""
    if not triples.strip():
        raise ValueError("The triples have an empty name; accepted: a JSON Lines file, a folder, or a data set's name.")
    path = Path(triples)
    if path.is_file() or path.suffix in (".json", ".jsonl") or not (path.is_dir() or "/" in triples):
        return path
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f'{triples} is a data set, which needs datasets ({error}): pip install "datasets>=4".'
        ) from error
    try:
        return load_dataset(triples, split=split, streaming=stream)
    except DatasetsError as error:
        raise ValueError(
            f"{triples} cannot be read as a data set ({error}); accepted: a JSON Lines file, a folder of JSON Lines or "
            "Parquet files of triples, or a data set's name."
        ) from error
