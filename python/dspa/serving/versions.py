"""The versions of vLLM whose insides this package knows."""

from __future__ import annotations

from dspa.errors import refusal

# Of vLLM, as in the extra `vllm`: from the first, and before the second.
FIRST, END = (0, 32), (0, 34)


def is_supported() -> bool:
    """Return True for a version of vLLM whose insides are known."""
    from vllm import __version_tuple__

    return FIRST <= tuple(__version_tuple__[:2]) < END


def check_version() -> None:
    """Raise `RuntimeError` for a version of vLLM whose insides are not known."""
    from vllm import __version__

    if not is_supported():
        accepted = f">= {'.'.join(map(str, FIRST))}, < {'.'.join(map(str, END))}"
        raise refusal(RuntimeError, "The version of vLLM", __version__, accepted)
