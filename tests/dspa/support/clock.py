"""The clock that chat templates read."""

from __future__ import annotations

from datetime import datetime

import pytest


def set_clock(monkeypatch: pytest.MonkeyPatch, now: str) -> None:
    """Let transformers take `now`, such as `2026-03-01T23:59`, for the time."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(now)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
