"""HTTP requests that ask for steering where vLLM would ignore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, Request
from starlette.requests import HTTPConnection
from vllm.exceptions import VLLMValidationError

from dspa.schemas import parse_json
from dspa.serving.requests import places

XARGS = "vllm_xargs"
# By the path of a route, where it takes what goes to an engine with a request. Any other route ignores all of it.
ROUTES = dict.fromkeys(
    (
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/v1/completions/render",
        "/v1/messages",
        "/v1/messages/render",
        "/v1/responses",
        "/v1/responses/render",
        # A chat or a completion, for engines that generate.
        "/invocations",
    ),
    XARGS,
) | {"/inference/v1/generate": "sampling_params.extra_args"}


def with_places_checked(register_api_routers: Callable[..., None]) -> Callable[..., None]:
    """Return the function that adds vLLM's routes to a server such that each of them checks its requests first."""

    def register(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        app.router.dependencies.append(Depends(_check_connection))
        register_api_routers(args, app, *rest, **kwargs)

    return register


def with_batch_checked(model_validate_json: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that reads a line of vLLM's batch runner such that the request in it is checked first."""

    def read(line: str | bytes, *args: Any, **kwargs: Any) -> Any:
        request = model_validate_json(line, *args, **kwargs)
        text = line if isinstance(line, str) else line.decode()
        check_places(request.url, parse_json(text, ValueError, "A line of the batch")["body"])
        return request

    return read


def check_places(route: str, body: Any) -> None:
    """Refuse keys of steering in a place that a route ignores.

    Args:
        route: path of the route, such as "/v1/completions".
        body: the request, as JSON.

    Raises:
        VLLMValidationError: a key in such a place, which names the one that is read.
    """
    where = ROUTES.get(route)
    if wrong := [place for place in places(body) if place.rpartition(".")[0] != where]:
        advice = f"put it into `{where}`" if where else f"{route} cannot steer. Those that can: {', '.join(ROUTES)}"
        raise VLLMValidationError(f"{', '.join(wrong)}: {advice}.", parameter=XARGS)


async def _check_connection(connection: HTTPConnection) -> None:
    # Routes of websockets have no body, and forms are read by what speaks: neither is of a model that can be steered.
    if isinstance(connection, Request) and "form" not in connection.headers.get("content-type", ""):
        try:
            body = await connection.json()
        except ValueError:
            # No body, or none that vLLM will read.
            return
        check_places(connection.scope["route"].path, body)
