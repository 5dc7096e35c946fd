"""Replies of a judge on disk: one file per call, whose name is a digest of what was sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspa.errors import JudgeError
from dspa.files import digest_of
from dspa.judges.questions import Token
from dspa.outputs import write_atomically
from dspa.schemas import Text, check, read_json, schema

FORMAT = "dspa.judge.1"
ADVICE = "Remove the file, and the question is asked again."


@schema
class Reply:
    """The reply of an endpoint.

    Attributes:
        text: text of the answer.
        finish_reason: why it ends, "stop", or "length" for the limit of tokens.
        answered_by: the endpoint's name of the model.
        tokens: tokens of the text with log-probabilities, None if the endpoint does not give them.
    """

    text: Text
    finish_reason: Text
    answered_by: Text
    tokens: list[Token] | None = None


class ReplyCache:
    """Replies in a folder, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: dict[str, Any]) -> Reply | None:
        """Return the reply to a request, or None if there is none.

        Raises:
            JudgeError: a file that is damaged.
        """
        path = self._path(request)
        if not path.exists():
            return None
        entry = read_json(path, JudgeError, advice=ADVICE)
        if not isinstance(entry, dict) or entry.get("format") != FORMAT or entry.get("request") != request:
            raise JudgeError(f"{path} does not hold the request that its name is for. {ADVICE}")
        return check(Reply, entry.get("reply"), JudgeError, f"{path}: `reply`", ADVICE)

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        """Write the reply to a request.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"format": FORMAT, "request": request, "reply": asdict(reply)}
        write_atomically(path, json.dumps(entry, indent=1).encode())

    def _path(self, request: dict[str, Any]) -> Path:
        digest = digest_of(request)
        return self.folder / digest[:2] / f"{digest}.json"
