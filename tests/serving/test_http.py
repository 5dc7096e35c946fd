"""`dspa.serving.http`: keys of steering that a route of vLLM's server, or its batch runner, would ignore."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

KEYS = {"dspa": "on"}
# By the place of the keys, bodies that have them there.
BODIES: dict[str, dict[str, Any]] = {
    "dspa": KEYS,
    "Dspa_alpha": {"Dspa_alpha": 1},
    "vllm_xargs.dspa": {"vllm_xargs": KEYS},
    "vllm_xargs.vllm_xargs.dspa": {"vllm_xargs": {"vllm_xargs": KEYS}},
    "extra_args.dspa": {"extra_args": KEYS},
    "extra_body.vllm_xargs.dspa": {"extra_body": {"vllm_xargs": KEYS}},
    "sampling_params.dspa": {"sampling_params": KEYS},
    "sampling_params.extra_args.dspa": {"sampling_params": {"extra_args": KEYS}},
}


@pytest.fixture(scope="module")
def app() -> Any:
    """Return vLLM's server for an engine that generates, without one."""
    from dspa.serving.plugin import attach

    attach()
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["model", "--enable-scale-out"])
    return build_app(arguments, ("generate",))


@pytest.fixture(scope="module")
def client(app: Any) -> Any:
    from fastapi.testclient import TestClient

    return TestClient(app, raise_server_exceptions=False)


def test_every_route_refuses_keys_that_it_would_ignore(app: Any, client: Any) -> None:
    from dspa.serving.http import ROUTES

    posts = {route.path for route in app.routes if "POST" in (getattr(route, "methods", None) or ())}
    # Those of this version, and of another a name that is not here.
    assert set(ROUTES) <= posts and "/generative_scoring" in posts and "/v1/systemone" in posts
    for path in posts:
        for place, body in BODIES.items():
            answer = client.post(path, json=body)
            where = ROUTES.get(path)
            if place == f"{where}.dspa":
                assert "put it into" not in answer.text, (path, place)
            else:
                assert answer.status_code == 400, (path, place, answer.text)
                message = answer.json()["error"]["message"]
                assert message.startswith(f"{place}: {f'put it into `{where}`' if where else path}"), (path, message)


def test_requests_without_keys_reach_their_route(client: Any) -> None:
    assert "items" in client.post("/generative_scoring", json={"query": "a", "metadata": {"dspa": "on"}}).text
    assert "application/json" in client.post("/generative_scoring", data={"dspa": "on"}).text
    malformed = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert malformed.status_code == 400 and "JSON" in malformed.text
    assert client.post("/v1/completions", json=[1]).status_code == 400
    assert client.get("/version").status_code == 200


@contextmanager
def refused(place: str | None) -> Iterator[None]:
    from vllm.exceptions import VLLMValidationError

    if place is None:
        yield
    else:
        with pytest.raises(VLLMValidationError, match=f"^{place}: "):
            yield


@pytest.mark.parametrize(
    ("url", "keys", "place"),
    [
        ("/v1/chat/completions", {"vllm_xargs": KEYS}, None),
        ("/v1/chat/completions", KEYS, "dspa"),
        ("/v1/score", {"vllm_xargs": KEYS}, "vllm_xargs.dspa"),
        ("/v1/score", {}, None),
    ],
)
def test_lines_of_the_batch_runner(app: Any, url: str, keys: dict[str, Any], place: str | None) -> None:
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]} if "chat" in url else {"text_1": "a"}
    line = {"custom_id": "1", "method": "POST", "url": url, "body": body | {"text_2": "b"} | keys}
    with refused(place):
        assert BatchRequestInput.model_validate_json(json.dumps(line)).url == url
