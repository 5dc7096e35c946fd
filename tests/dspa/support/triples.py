"""A preference as text and as messages."""

from __future__ import annotations

from typing import Any

PLAIN = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TURNS: dict[str, Any] = {
    "prompt": [user("what")],
    "chosen": [assistant("blue")],
    "rejected": [assistant("green")],
}
