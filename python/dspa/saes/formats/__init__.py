"""Files that hold an SAE: one reader per format, in a file of its own.

A reader returns an SAE as its maker stored it, with SAELens' names and shapes. `FrozenSAE` checks and folds it.
Nothing is ever unpickled except tensors, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dspa.errors import SAEError, refusal
from dspa.saes.formats.dictionary_learning import DICTIONARY_CONFIG, DICTIONARY_WEIGHTS, read_dictionary
from dspa.saes.formats.gemma_scope import GEMMA_SCOPE_WEIGHTS, read_gemma_scope
from dspa.saes.formats.gemma_scope_2 import GEMMA_SCOPE_2_WEIGHTS, read_gemma_scope_2
from dspa.saes.formats.llama_scope import LLAMA_SCOPE_CONFIG, LLAMA_SCOPE_WEIGHTS, read_llama_scope
from dspa.saes.formats.saelens import SAE_LENS_CONFIG, SAE_LENS_WEIGHTS, read_sae_lens
from dspa.saes.formats.source import SourceSAE, read_state
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
CONFIGS = (SAE_LENS_CONFIG, DICTIONARY_CONFIG, LLAMA_SCOPE_CONFIG)
# By the kind of a file of another name.
SUFFIXES = {".safetensors": read_sae_lens, ".npz": read_gemma_scope}


def read_sae(path: Path, dict_class: str | None = None) -> SourceSAE:
    """Read the SAE in a folder or file. The name of the file of weights decides which reader reads it.

    Args:
        path: the folder, or the file of weights or the configuration in it.
        dict_class: class of an `ae.pt` that has no `config.json` next to it.

    Raises:
        SAEError: a file that cannot be read, or is of another format.
    """
    file = _weights_file(path)
    for name, reader in READERS.items():
        if file.name == Path(name).name:
            return reader(file)
    if file.suffix in SUFFIXES:
        return SUFFIXES[file.suffix](file)
    return read_dictionary(file, read_state(file), dict_class)


def _weights_file(path: Path) -> Path:
    accepted = f"a folder with one of {', '.join(WEIGHTS)}, or the path of such a file"
    if not path.exists():
        raise refusal(SAEError, str(path), "not there", accepted, "For an SAE on a hub: FrozenSAE.from_pretrained.")
    if path.name in CONFIGS:
        path = path.parent
    if path.is_dir():
        files = [path / name for name in WEIGHTS if (path / name).is_file()]
        if len(files) == 1:
            return files[0]
        held = sorted(entry.name for entry in path.iterdir())[:8]
        raise refusal(SAEError, str(path), f"a folder with {len(files)} of these ({held})", accepted, "Name the file.")
    if path.suffix not in (*SUFFIXES, ".pt"):
        raise refusal(SAEError, str(path), f"a file of unknown kind {path.suffix!r}", accepted)
    return path
