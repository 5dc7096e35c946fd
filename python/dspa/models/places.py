"""Places of models, by the names that users give: a folder, a GGUF file, or a model of the Hub."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dspa.archives import check_archive
from dspa.errors import refusal, require_package
from dspa.models.layers import is_model_name

ACCEPTED = "a folder with config.json, a GGUF file, or a name on the Hub"
# Files by which transformers knows a folder of weights, or of a PEFT adapter.
WEIGHTS = ("*.safetensors", "*.bin")
RECORDS = ("config.json", "adapter_config.json")
# Endings of files, which no name on the Hub has.
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".json")
# One of several files of one model, which transformers does not join.
PART = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class ModelPlace:
    """Arguments by which transformers loads a model.

    Attributes:
        name: a folder, or a name on the Hub.
        gguf_file: name of a GGUF file in the folder, None for weights in other files.
    """

    name: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, str]:
        """Arguments of `from_pretrained` besides the name."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def path(self) -> str:
        """The path of the GGUF file, and else the name."""
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name


def model_place(name: str, option: str = "`model`") -> ModelPlace:
    """Return what the name of a model means, and ask the Hub nothing.

    Args:
        name: a path, or a name on the Hub.
        option: what gave the name, for messages.

    Raises:
        ValueError: a path where there is no model, or a folder with several GGUF files.
        RuntimeError: a package that reads GGUF files is not installed.
    """
    if not name.strip():
        raise refusal(ValueError, option, "an empty name", ACCEPTED)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, option)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise refusal(ValueError, option, f"{name}, a file of another kind", ACCEPTED)
        return _gguf(path, option)
    if not is_hub_name(name):
        here = "/" in name and path.parent.is_dir() and is_model_name(name)
        advice = "Start in another folder to load it from the Hub." if here else ""
        raise refusal(ValueError, option, f"{name}, where there is nothing", ACCEPTED, advice)
    if HF_HUB_OFFLINE and not any(isinstance(try_to_load_from_cache(name, record), str) for record in RECORDS):
        got = f"{name!r}, which is no folder here and not in the cache of the Hub, and HF_HUB_OFFLINE is set"
        raise refusal(ValueError, option, got, ACCEPTED, "Unset HF_HUB_OFFLINE to load it from the Hub.")
    return ModelPlace(name)


def is_hub_name(name: str) -> bool:
    """Return True for a name of the Hub, and False for one that looks like a path, or that the Hub cannot have.

    The file or folder of a path need not exist. "models/gemma" is a path where there is a folder "models".
    """
    path = Path(name)
    if not is_model_name(name) or path.suffix.lower() in FILES or ("/" in name and path.parent.is_dir()):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _in_folder(folder: Path, option: str) -> ModelPlace:
    known = any((folder / record).is_file() for record in RECORDS)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if known and (not files or any(file for pattern in WEIGHTS for file in folder.glob(pattern))):
        return ModelPlace(str(folder))
    if not files:
        raise refusal(ValueError, option, f"{folder}, a folder without config.json and without a GGUF file", ACCEPTED)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise refusal(ValueError, option, f"{folder}, which holds several GGUF files", f"the path of one of {names}")
    return _gguf(files[0], option)


def _gguf(path: Path, option: str) -> ModelPlace:
    if PART.search(path.stem):
        advice = "Join the parts: llama-gguf-split --merge."
        raise refusal(ValueError, option, f"{path}, one of several parts of a model", "a whole GGUF file", advice)
    require_gguf(f"{path.name}, a GGUF file,")
    return ModelPlace(str(path.parent), path.name)


@contextmanager
def reading_model(place: ModelPlace) -> Iterator[None]:
    """Turn what transformers raises for the files of a model into `ValueError`, except for `OSError`.

    For a GGUF file, which is here, also an `OSError`: transformers raises it for what it does not find in the file.

    Raises:
        ValueError: files that are damaged, that unpack to far more than their size, that hold more than tensors, or
            that bring code which may not run.
    """
    for file in [] if place.gguf_file else Path(place.name).glob("*.bin"):
        check_archive(file, ValueError)
    passed: tuple[type[Exception], ...] = (ImportError, MemoryError, *([] if place.gguf_file else [OSError]))
    try:
        yield
    except passed:
        raise
    except pickle.UnpicklingError:
        got, advice = f"{place.path}, whose weights are pickled with other objects", "Convert them to safetensors."
        # Without torch's own error, which advises to unpickle them.
        raise refusal(ValueError, "`model`", got, "weights in safetensors, or tensors alone", advice) from None
    # A damaged file leads to an error of any class, in transformers and in what it reads files with.
    except Exception as error:
        if "trust_remote_code" in str(error):
            got = f"{place.path}, which brings Python code of its own"
            accepted, advice = "a model that transformers knows", "Read that code, then pass `trust_remote_code`."
        else:
            got = f"{place.path}, which transformers {version('transformers')} cannot load "
            got += f"({type(error).__name__}: {error})"
            accepted, advice = "undamaged files of a causal language model", "Download or save it again."
            if place.gguf_file:
                accepted, advice = "a GGUF file of an architecture that it reads", "Or use what it was made from."
        raise refusal(ValueError, "`model`", got, accepted, advice) from error


def require_gguf(what: str) -> None:
    """Raise `RuntimeError` unless the packages that read GGUF files are installed; `what` needs them."""
    for package in ("gguf", "accelerate"):
        require_package(package, what)
