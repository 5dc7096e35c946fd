"""The server as its users see it: `dspa serve`, asked over HTTP by the `openai` client."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.serving.conftest import ASKED, PROMPTS, World, engine_environment

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")


@pytest.fixture(scope="module")
def world(make_world: Any) -> World:
    return make_world("llama")


@pytest.fixture(scope="module")
def client(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start the server, and stop it."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "dspa", "serve", world.model, "--port", str(port)]
    command += [word for name, path in world.maps.items() for word in ("--map", f"{name}={path}")]
    command += [word for name, path in world.adapters.items() for word in ("--adapter", f"{name}={path}")]
    command += [word for name, path in world.vectors.items() for word in ("--vector", f"{name}={path}")]
    command += [word for name, path in world.latents.items() for word in ("--latents", f"{name}={path}")]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "128"]
    command += ["--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--served-model-name", "tiny"]
    command += ["--enable-scale-out"]
    with log.open("w") as file, subprocess.Popen(command, env=engine_environment(), stdout=file, stderr=file) as server:
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health", log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()
            assert server.wait(60) is not None


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        try:
            urlopen(url, timeout=2)
            return
        except (URLError, OSError):
            assert server.poll() is None, log.read_text()[-6000:]
            time.sleep(0.5)
    pytest.fail(log.read_text()[-6000:])


def ask(client: Any, prompt: list[int], extra: dict[str, Any] | None, **settings: Any) -> list[int]:
    body: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True} | ({"vllm_xargs": extra} if extra else {})
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=16, temperature=0, extra_body=body, **settings
    )
    return answer.choices[0].token_ids


def test_many_at_once(world: World, client: Any) -> None:
    cases = [(n, name) for _ in range(3) for n in range(len(PROMPTS)) for name in ASKED]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda case: ask(client, PROMPTS[case[0]], ASKED[case[1]][0]), cases))
    expected = {case: world.answers(PROMPTS[case[0]], ASKED[case[1]][1]) for case in dict.fromkeys(cases)}
    wrong = [case for case, answer in zip(cases, answers, strict=True) if answer != expected[case]]
    assert len(cases) > 100 and wrong == []


def test_streaming(world: World, client: Any) -> None:
    with stream(client, PROMPTS[3], ASKED["both"][0], 16) as parts:
        tokens = [token for part in parts if part.choices for token in part.choices[0].token_ids or []]
    assert tokens == world.answers(PROMPTS[3], ASKED["both"][1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspa_alfa": 1}, "dspa_alfa"),
        ({"dspa_alpha": -1}, "a number from 0 to 100"),
        ({"dspa_alpha": 1e39}, "a number from 0 to 100"),
        ({"DSPA": "on"}, "DSPA"),
        ({"dspa_mode": "x"}, "ablate, augment, both"),
        ({"dspa_positions": "all"}, "response, generated"),
        ({"dspa_start": 99}, "1 to 11"),
        ({"dspa_map": "other"}, "low, same, high"),
        ({"dspa_adapter": "other"}, "early, late"),
        ({"dspa_vector": "other"}, "all, answer"),
        ({"dspa_vector": "all", "dspa_mode": "both"}, "dspa_mode: not for a request that `dspa_vector` steers"),
        ({"dspa_latents": "other"}, "loud, mute"),
        ({"dspa_latents": "mute", "dspa_alpha": 0.5}, "dspa_alpha: not for a request that `dspa_latents` steers"),
        ({"dspa_adapter": "late", "dspa_alpha": 0.5}, "dspa_alpha: not for a request that `dspa_adapter` steers"),
        ({"dspa_adapter": "late", "dspa_map": "low"}, "dspa_adapter: not for a request that `dspa_map` steers"),
        # By vLLM itself, which takes flat values alone.
        ({"dspa": {"alpha": 1}}, "vllm_xargs"),
    ],
)
def test_a_request_that_cannot_be_steered(keys: dict[str, Any], message: str, client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, PROMPTS[1], keys)
    # The engine goes on.
    assert len(ask(client, PROMPTS[1], {"dspa": "on"})) == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("5", "accepted: a JSON object"), ('{"dspa": {}}', "is with dspa"), ('{"architectures": ["X"]}', "architectures")],
)
def test_overrides_that_would_replace_ours(overrides: str, message: str, world: World) -> None:
    from dspa.serving.server import serve

    with pytest.raises(ValueError, match=message):
        serve(world.model, world.options(), ["--hf-overrides", overrides])


def test_keys_in_another_place_are_refused(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="dspa_alpha: put it into `vllm_xargs`"):
        client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=4, extra_body={"dspa_alpha": 1})
    with pytest.raises(openai.BadRequestError, match="dspa: put it into `vllm_xargs`"):
        client.responses.create(model="tiny", input="w5 w6", max_output_tokens=4, extra_body={"dspa": "on"})


WORDS = "w5 w9 w40 w7 w11"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 8, "temperature": 0}
BATCH = CHAT | {"messages": [CHAT["messages"]]}
TEXT = {"model": "tiny", "prompt": f"{WORDS} ", "max_tokens": 8, "temperature": 0}
RESPONSE = {"model": "tiny", "input": WORDS, "max_output_tokens": 8, "temperature": 0}


RENDERED = {"chat": ("/v1/chat/completions/render", CHAT), "text": ("/v1/completions/render", TEXT)}
RENDERED |= {"message": ("/v1/messages/render", CHAT), "response": ("/v1/responses/render", RESPONSE)}


@pytest.mark.parametrize(
    ("route", "body", "where", "kind"),
    [
        ("/v1/chat/completions", CHAT, ("choices", 0, "message", "content"), "chat"),
        ("/v1/chat/completions/batch", BATCH, ("choices", 0, "message", "content"), "chat"),
        ("/v1/completions", TEXT, ("choices", 0, "text"), "text"),
        ("/v1/messages", CHAT, ("content", 0, "text"), "message"),
        ("/v1/responses", RESPONSE, ("output", 0, "content", 0, "text"), "response"),
        ("/invocations", CHAT, ("choices", 0, "message", "content"), "chat"),
        ("/invocations", TEXT, ("choices", 0, "text"), "text"),
    ],
)
def test_routes_that_take_keys_steer(
    route: str, body: dict[str, Any], where: tuple[Any, ...], kind: str, world: World, client: Any
) -> None:
    """So do those that render a request for the route that generates, which takes the same keys in another place."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    texts = {}
    for name in ("base", "both"):
        keys, config = ASKED[name]
        extra = {"vllm_xargs": keys} if keys else {}
        render, rendered = RENDERED[kind]
        rendered = post(client, render, rendered | extra)
        rendered = rendered[0] if isinstance(rendered, list) else rendered
        expected = world.answers(rendered["token_ids"], config, 8)
        assert post(client, "/inference/v1/generate", rendered)["choices"][0]["token_ids"] == expected
        answer = post(client, route, body | extra)
        for part in where:
            answer = answer[part]
        assert answer.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        texts[name] = answer
    assert texts["base"] != texts["both"]


def test_routes_that_cannot_steer(client: Any) -> None:
    """They answer, and refuse keys, also the one that would turn off what the server steers by default."""
    import openai

    scoring = {"model": "tiny", "query": WORDS, "items": ["w1", "w2"], "label_token_ids": [5, 6]}
    assert len(post(client, "/generative_scoring", scoring)["data"]) == 2
    for keys in ({"dspa": "on"}, {"dspa": "off"}):
        with pytest.raises(openai.BadRequestError, match="/generative_scoring cannot steer"):
            post(client, "/generative_scoring", scoring | {"vllm_xargs": keys})


def post(client: Any, route: str, body: Any) -> Any:
    return client.post(str(client.base_url).removesuffix("/v1/") + route, body=body, cast_to=object)


def test_beam_search_is_refused(client: Any) -> None:
    import openai

    body = {"use_beam_search": True, "vllm_xargs": {"dspa": "on"}}
    with pytest.raises(openai.BadRequestError, match="beam search"):
        client.completions.create(model="tiny", prompt=PROMPTS[1], n=2, max_tokens=4, temperature=0, extra_body=body)


def test_a_load_of_random_requests(world: World, client: Any) -> None:
    """Random settings, lengths and cancellations: every token that came is right, and nothing is left at the end."""
    chance = random.Random(0)
    jobs = [
        (chance.randrange(len(PROMPTS)), chance.choice(list(ASKED)), chance.randrange(1, 17), chance.random() < 0.3)
        for _ in range(40 * int(os.environ.get("DSPA_SOAK", "1")))
    ]

    def run(job: tuple[int, str, int, bool]) -> list[int]:
        prompt, name, n_tokens, cancelled = job
        tokens: list[int] = []
        with stream(client, PROMPTS[prompt], ASKED[name][0], n_tokens) as parts:
            for part in parts:
                tokens += part.choices[0].token_ids or [] if part.choices else []
                if cancelled and len(tokens) > n_tokens // 2:
                    return tokens
        assert len(tokens) == n_tokens
        return tokens

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(run, jobs))
    expected = {(n, name): world.answers(PROMPTS[n], ASKED[name][1]) for n, name in {job[:2] for job in jobs}}
    wrong = [job for job, answer in zip(jobs, answers, strict=True) if answer != expected[job[:2]][: len(answer)]]
    assert wrong == [] and all(answers)
    assert left_over(client) == {"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, USAGE: 0}


USAGE = "vllm:kv_cache_usage_perc"


def left_over(client: Any) -> dict[str, float]:
    """The server's metrics of requests that run, once they had some seconds to end."""
    for _ in range(20):
        lines = urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=10).read().decode().splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", USAGE)
        values = {
            name: float(line.rsplit(" ", 1)[1]) for line in lines for name in names if line.startswith(f"{name}{{")
        }
        if not any(values.values()):
            break
        time.sleep(0.5)
    return values


def stream(client: Any, prompt: list[int], extra: dict[str, Any] | None, n_tokens: int) -> Any:
    body: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True} | ({"vllm_xargs": extra} if extra else {})
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=n_tokens, temperature=0, stream=True, extra_body=body
    )
