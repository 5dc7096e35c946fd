"""A chat endpoint in a thread: an HTTP server that answers as a test wants, and counts what it was asked."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

# Text of the answer to a request, or a status and the body of another reply.
Reply: TypeAlias = "str | tuple[int, str]"


@dataclass
class Endpoint:
    """An endpoint at `url`. `requests` and `keys` hold what came, in its order."""

    answer: Callable[[dict[str, Any]], Reply]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    """Serve an endpoint that replies by `answer`, which takes the request."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(request)
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            reply = endpoint.answer(request) if self.path == "/v1/chat/completions" else (404, "no such path")
            with endpoint.lock:
                endpoint.at_once -= 1
            status, body = (200, completion(reply)) if isinstance(reply, str) else reply
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if body.startswith("<") else "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            # The client waits this long before it tries again.
            self.send_header("Retry-After-Ms", "10")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str, finish_reason: str = "stop", tokens: Sequence[tuple[str, dict[str, float]]] = ()) -> str:
    """The body of a reply with this text, and with the probabilities of its tokens if they are given."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    if tokens:
        choice["logprobs"] = {"content": [_token(*token) for token in tokens]}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice], "usage": None}
    )


def _token(text: str, likely: dict[str, float]) -> dict[str, Any]:
    top = [{"token": other, "logprob": math.log(p), "bytes": None} for other, p in likely.items()]
    return {"token": text, "logprob": math.log(likely[text]), "bytes": None, "top_logprobs": top}


def last(request: dict[str, Any]) -> str:
    """The last message of a request."""
    text: str = request["messages"][-1]["content"]
    return text
