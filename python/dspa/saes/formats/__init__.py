"""Files that hold an SAE: one reader per format, in a file of its own.

A reader returns an SAE as its maker stored it, with SAELens' names and shapes. `FrozenSAE` checks and folds it.
Nothing is ever unpickled except tensors, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

from dspa.errors import SAEError, listed, refusal
from dspa.models.places import is_hub_name
from dspa.saes.formats.dictionary_learning import DICTIONARY_CONFIG, DICTIONARY_WEIGHTS, read_dictionary
from dspa.saes.formats.gemma_scope import GEMMA_SCOPE_WEIGHTS, read_gemma_scope
from dspa.saes.formats.gemma_scope_2 import GEMMA_SCOPE_2_WEIGHTS, read_gemma_scope_2
from dspa.saes.formats.goodfire import GOODFIRE_TENSORS, read_goodfire
from dspa.saes.formats.llama_scope import LLAMA_SCOPE_CONFIG, LLAMA_SCOPE_WEIGHTS, read_llama_scope
from dspa.saes.formats.llama_scope_r1 import LLAMA_SCOPE_R1_CONFIG, read_llama_scope_r1
from dspa.saes.formats.openai import OPENAI_TENSORS, read_openai
from dspa.saes.formats.qwen_scope import QWEN_SCOPE_WEIGHTS, read_qwen_scope
from dspa.saes.formats.saelens import SAE_LENS_CONFIG, SAE_LENS_WEIGHTS, read_sae_lens
from dspa.saes.formats.source import SourceSAE, agreed, read_state
from dspa.saes.formats.sparsify import SPARSIFY_WEIGHTS, read_sparsify

# By the name of the file, in the folder of the SAE.
READERS: dict[str, Callable[[Path], SourceSAE]] = {
    SAE_LENS_WEIGHTS: read_sae_lens,
    GEMMA_SCOPE_WEIGHTS: read_gemma_scope,
    GEMMA_SCOPE_2_WEIGHTS: read_gemma_scope_2,
    SPARSIFY_WEIGHTS: read_sparsify,
    **dict.fromkeys(LLAMA_SCOPE_WEIGHTS, read_llama_scope),
}
WEIGHTS = (*READERS, DICTIONARY_WEIGHTS)
ACCEPTED = f"a folder with one of {', '.join(WEIGHTS)} or *.pt, or such a file"
CONFIGS = (SAE_LENS_CONFIG, DICTIONARY_CONFIG, LLAMA_SCOPE_CONFIG)
# By the kind of a file of another name.
SUFFIXES = {".safetensors": read_sae_lens, ".npz": read_gemma_scope}
STATE_DICTS = (".pt", ".pth")


def read_sae(path: str | Path, dict_class: str | None = None, k: int | None = None) -> SourceSAE:
    """Read the SAE in a folder or file. The names of the file of weights and of its tensors decide the reader.

    Args:
        path: the folder, or the file of weights or the configuration in it.
        dict_class: class of an `ae.pt` of dictionary_learning that has no `config.json`.
        k: active latents per row of a topk SAE whose file does not say it.

    Raises:
        SAEError: a file that cannot be read, or is of another format.
    """
    source = _read(_weights_file(_checked_path(path)), dict_class)
    if source.arch != "topk" and k is not None:
        raise refusal(SAEError, "`k`", k, f"None, since {source.name} is a {source.arch} SAE", "Leave `k` out.")
    known = agreed(source.name, "k", source.k, k)
    if source.arch == "topk" and known is None:
        accepted = "the number of active latents per row"
        advice = "Pass it: FrozenSAE.load(path, k=...). For the command line, save that and name its folder."
        raise refusal(SAEError, f"{source.name}: `k`", "not in the file", accepted, advice)
    return replace(source, k=known)


def _read(file: Path, dict_class: str | None) -> SourceSAE:
    is_r1 = not file.with_name(SAE_LENS_CONFIG).exists() and file.with_name(LLAMA_SCOPE_R1_CONFIG).exists()
    if file.name == SAE_LENS_WEIGHTS and is_r1:
        return read_llama_scope_r1(file)
    for name, reader in READERS.items():
        if file.name == Path(name).name:
            return reader(file)
    if file.suffix in SUFFIXES:
        return SUFFIXES[file.suffix](file)
    state = read_state(file)
    if re.fullmatch(QWEN_SCOPE_WEIGHTS, file.name):
        return read_qwen_scope(file, state)
    if state.keys() >= OPENAI_TENSORS:
        return read_openai(file, state)
    if GOODFIRE_TENSORS.keys() <= state.keys():
        return read_goodfire(file, state)
    return read_dictionary(file, state, dict_class)


def _checked_path(path: str | Path) -> Path:
    if not isinstance(path, str | PathLike):
        raise refusal(SAEError, "`path`", repr(path), f"the path of {ACCEPTED}")
    return Path(path)


def _weights_file(path: Path) -> Path:
    if not path.exists():
        release, _, sae_id = str(path).partition(":")
        names = f"{release!r}, {sae_id!r}" if sae_id and is_hub_name(release) else "release, sae_id"
        raise refusal(SAEError, str(path), "not there", ACCEPTED, f"For an SAE on a hub: from_pretrained({names}).")
    if path.name in CONFIGS:
        path = path.parent
    if path.is_dir():
        files = [path / name for name in WEIGHTS if (path / name).is_file()]
        files = files or [file for file in path.iterdir() if file.suffix in STATE_DICTS]
        if len(files) == 1:
            return files[0]
        held = sorted(entry.name for entry in path.iterdir())
        got, advice = ("several", "Name the file.") if files else ("none", "")
        raise refusal(
            SAEError,
            str(path),
            f"a folder with {got} of these files ({listed(held) or 'it is empty'})",
            ACCEPTED,
            advice,
        )
    if path.suffix not in (*SUFFIXES, *STATE_DICTS):
        raise refusal(SAEError, str(path), f"a file of unknown kind {path.suffix!r}", ACCEPTED)
    return path
