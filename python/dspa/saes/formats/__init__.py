"""Files that hold an SAE: SAELens folders, Gemma Scope's `params.npz`, dictionary_learning's `ae.pt`.

A reader returns an SAE as its maker stored it, with SAELens' names and shapes. `FrozenSAE` checks and folds it.
Nothing is ever unpickled except tensors, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from pathlib import Path

from dspa.errors import SAEError, refusal
from dspa.saes.formats.dictionary_learning import DICTIONARY_WEIGHTS, read_dictionary
from dspa.saes.formats.gemma_scope import GEMMA_SCOPE_WEIGHTS, read_gemma_scope
from dspa.saes.formats.saelens import SAE_LENS_CONFIG, SAE_LENS_WEIGHTS, read_sae_lens
from dspa.saes.formats.source import SourceSAE


def read_sae(path: Path, dict_class: str | None = None) -> SourceSAE:
    """Read the SAE in a folder or file of SAELens, Gemma Scope or dictionary_learning. The file's name decides which.

    Args:
        path: the folder or file.
        dict_class: class of an `ae.pt` that has no `config.json` next to it.

    Raises:
        SAEError: a file that cannot be read, or is none of these.
    """
    file = _weights_file(path)
    if file.suffix == ".safetensors":
        return read_sae_lens(file)
    if file.suffix == ".npz":
        return read_gemma_scope(file)
    return read_dictionary(file, dict_class)


def _weights_file(path: Path) -> Path:
    names = (SAE_LENS_WEIGHTS, GEMMA_SCOPE_WEIGHTS, DICTIONARY_WEIGHTS)
    accepted = f"a folder with one of {', '.join(names)}, or the path of such a file"
    if path.is_dir():
        files = [path / name for name in names if (path / name).is_file()]
        if len(files) == 1:
            return files[0]
        held = sorted(entry.name for entry in path.iterdir())[:8]
        raise refusal(SAEError, str(path), f"a folder with {len(files)} of these ({held})", accepted, "Name the file.")
    if not path.exists():
        raise refusal(SAEError, str(path), "not there", accepted, "For an SAE on a hub: FrozenSAE.from_pretrained.")
    if path.name == SAE_LENS_CONFIG:
        return path.with_name(SAE_LENS_WEIGHTS)
    if path.suffix not in (".safetensors", ".npz", ".pt"):
        raise refusal(SAEError, str(path), f"a file of unknown kind {path.suffix!r}", accepted)
    return path
