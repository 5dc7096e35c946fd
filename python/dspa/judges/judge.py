"""A judge: a language model behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from dspa.errors import JudgeError, listed, refusal, require_package
from dspa.files import digest_of
from dspa.judges.cache import Reply, ReplyCache
from dspa.judges.questions import Answer, Question, Token, read_answer
from dspa.schemas import Count, Positive, PositiveInt, check, parse_json

T = TypeVar("T")

# The environment variable of the key. Not OPENAI_API_KEY: that key would be sent to endpoints of others.
KEY = "DSPA_JUDGE_KEY"
PARAMETERS = {"temperature": 0.0, "max_tokens": 1024}
# What a request holds besides its parameters, and how replies come.
OWN = ("model", "messages", "stream", "n")


class Judge:
    """A language model behind an OpenAI-compatible chat endpoint.

    Each reply is written to the cache as it comes. What is in the cache is not asked again, so that a run which was
    stopped goes on where it was, and a finished one can be repeated without the endpoint. The key of the endpoint, if
    it needs one, is read from the environment variable `DSPA_JUDGE_KEY`, and written nowhere.
    """

    def __init__(
        self,
        url: str | None,
        model: str,
        *,
        cache: str | Path,
        parameters: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        replay: bool = False,
    ) -> None:
        """Make a judge. Nothing is sent yet.

        Args:
            url: address of the endpoint up to its version, such as "http://localhost:8000/v1". None with `replay`.
            model: name of the model at the endpoint.
            cache: folder of the replies, which judges can share. A reply is that to a model's name, parameters and
                messages, whatever the endpoint.
            parameters: parameters of the requests, any that the endpoint knows. Default: temperature 0 and at most
                1024 tokens per answer. With `logprobs` and `top_logprobs`, answers have tokens with log-probabilities.
            concurrency: calls at the same time.
            retries: times that a call is repeated if the endpoint is busy (429), failing (5xx) or unreachable.
            timeout: seconds until a call without a reply counts as failed.
            replay: never call the endpoint, and raise for what is not in the cache.

        Raises:
            ValueError: an invalid URL, or one that holds a password, a parameter that is the judge's own, or an invalid
                number.
        """
        if url is not None or not replay:
            _check_url(url or "")
        if own := sorted(set(OWN) & set(parameters or {})):
            raise refusal(ValueError, "`parameters`", f"of {listed(own)}", "parameters of a single answer")
        check(PositiveInt, concurrency, ValueError, "`concurrency`")
        check(Count, retries, ValueError, "`retries`")
        check(Positive, timeout, ValueError, "`timeout`")
        self.url, self.model, self.replay = url, model, replay
        # As JSON reads them again from the cache.
        text = json.dumps(PARAMETERS if parameters is None else dict(parameters))
        self.parameters: dict[str, Any] = parse_json(text, ValueError, "`parameters`")
        self._cache, self._concurrency = ReplyCache(Path(cache)), concurrency
        self._retries, self._timeout = retries, timeout

    @property
    def folder(self) -> Path:
        """Folder of the replies."""
        return self._cache.folder

    def ask(self, question: Question[T]) -> Answer[T]:
        """Return the answer to a question, as `ask_all` does for several."""
        return self.ask_all([question])[0]

    def ask_all(
        self, questions: Sequence[Question[T]], *, progress: bool = False, what: str = "questions"
    ) -> list[Answer[T]]:
        """Return the answers to questions, in their order. The same question is asked once.

        An answer that cannot be read, or a question that the endpoint refuses, counts as unanswered.

        Args:
            questions: the questions.
            progress: show a bar.
            what: name of the questions on the bar.

        Raises:
            JudgeError: an endpoint that cannot be reached, is not one, does not take the key, does not have the model,
                stays busy, or refuses all of the questions; or, with `replay`, questions without a reply. The replies
                that came before are in the cache.
            RuntimeError: the package openai is not installed.
        """
        cached, missing = self._look_up(questions)
        if missing and self.replay:
            raise JudgeError(_not_there(missing.values(), len(cached), self.folder))
        replies = {**cached, **self._call_all(missing, progress, what)}
        return [self._answer(question, replies[digest_of(self._request(question))]) for question in questions]

    def n_calls(self, questions: Sequence[Question[T]]) -> int:
        """Return how many calls `ask_all` will make, which are for what is not in the cache."""
        return len(self._look_up(questions)[1])

    def _look_up(self, questions: Sequence[Question[T]]) -> tuple[dict[str, Reply | None], dict[str, dict[str, Any]]]:
        """Return the replies in the cache by digest, None for what is not there, and the requests without a reply."""
        requests = {digest_of(request): request for request in map(self._request, questions)}
        cached = {digest: self._cache.get(request) for digest, request in requests.items()}
        return cached, {digest: requests[digest] for digest, reply in cached.items() if reply is None}

    def _request(self, question: Question[T]) -> dict[str, Any]:
        return {**self.parameters, "model": self.model, "messages": question.messages}

    def _answer(self, question: Question[T], reply: Reply | str | None) -> Answer[T]:
        if isinstance(reply, Reply):
            answer = read_answer(question, reply.text, cut=reply.finish_reason == "length")
            return replace(answer, tokens=reply.tokens)
        return Answer(None, "", f"refused by the endpoint: {reply}")

    def _call_all(self, requests: dict[str, dict[str, Any]], progress: bool, what: str) -> dict[str, Reply | str]:
        """Return the reply to each request, or the reason why the endpoint refused it."""
        if not requests:
            return {}
        # Before the threads, which would each make one.
        client, replies = self._client, dict[str, Reply | str]()
        self._check_reachable()
        with (
            ThreadPoolExecutor(self._concurrency) as threads,
            tqdm(total=len(requests), desc=what, unit="call", disable=not progress) as bar,
        ):
            calls = {threads.submit(self._call, client, request): digest for digest, request in requests.items()}
            try:
                for call in as_completed(calls):
                    replies[calls[call]] = call.result()
                    bar.update()
            except BaseException:
                # Calls under way end, and their replies are kept.
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        refused = [reply for reply in replies.values() if isinstance(reply, str)]
        if len(refused) == len(requests):
            raise JudgeError(f"{self._name} refuses all of {len(requests)} questions: {refused[0]}")
        return replies

    def _check_reachable(self) -> None:
        """Raise `JudgeError` at once if nothing is at the address, which each call would try again for long."""
        # The client's own HTTP library, with the same proxies.
        import httpx

        try:
            httpx.get(f"{str(self.url).rstrip('/')}/models", timeout=5.0)
        except httpx.ConnectError as error:
            raise JudgeError(
                f"{self._name} cannot be reached: {_reason(error)}. Start the endpoint, or correct its address."
            ) from error
        except httpx.HTTPError:
            # What else is wrong, the calls will tell, or it passes.
            return

    def _call(self, client: Any, request: dict[str, Any]) -> Reply | str:
        """Return the reply to a request, which is then in the cache, or the reason why the endpoint refused it."""
        import openai

        messages, sent = request["messages"], {k: v for k, v in request.items() if k not in ("model", "messages")}
        try:
            # As extra entries, because endpoints take more parameters than the client knows.
            completion = client.chat.completions.create(model=self.model, messages=messages, extra_body=sent)
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise JudgeError(
                f"{self._name} did not answer after {self._retries} retries: {_reason(error)}. What came before is in "
                f"{self.folder}: start again when the endpoint is up, with fewer calls at the same time if it "
                "was busy."
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            advice = f"Set the environment variable {KEY} to a key of this endpoint."
            raise JudgeError(f"{self._name} does not let you in: {_reason(error)}. {advice}") from error
        except openai.NotFoundError as error:
            advice = "Check the name of the model, and that the URL ends as the endpoint wants it, often in /v1."
            raise JudgeError(f"{self._name} is not there: {_reason(error)}. {advice}") from error
        except openai.APIStatusError as error:
            return _reason(error)
        except ValueError as error:
            raise self._no_endpoint(_reason(error)) from error
        if not isinstance(completion, openai.types.chat.ChatCompletion):
            raise self._no_endpoint(repr(str(completion)[:80]))
        choice = completion.choices[0] if completion.choices else None
        if choice is None or choice.message is None:
            return str(getattr(completion, "error", None) or "no answer came")
        text, tokens = choice.message.content or "", _tokens(choice.logprobs)
        reply = Reply(text, choice.finish_reason or "", completion.model or "", tokens)
        self._cache.put(request, reply)
        return reply

    def _no_endpoint(self, got: str) -> JudgeError:
        return JudgeError(
            f"{self.url} answered, but not as a chat endpoint does: {got}. Check the URL, which often ends in /v1."
        )

    @property
    def _name(self) -> str:
        return f"The judge {self.model!r} at {self.url}"

    @cached_property
    def _client(self) -> Any:
        require_package("openai", "Asking a judge")
        from openai import OpenAI

        # The client wants a key, and endpoints without keys ignore it.
        key = os.environ.get(KEY, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            # No header can hold it, and the error about that would show it.
            raise refusal(JudgeError, KEY, "no key: it has characters that no key has", "the key of the endpoint")
        return OpenAI(base_url=self.url, api_key=key, max_retries=self._retries, timeout=self._timeout)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise refusal(ValueError, "The URL of the judge", repr(url), "an address such as http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise refusal(ValueError, "The URL of the judge", "one with a password", "one without", f"Set {KEY}.")


def _tokens(logprobs: Any) -> list[Token] | None:
    """Return the tokens of a reply, None without log-probabilities."""
    if logprobs is None or not logprobs.content:
        return None
    tokens = []
    for one in logprobs.content:
        likely = {other.token: float(other.logprob) for other in (one, *(one.top_logprobs or ()))}
        tokens.append(Token(one.token, {text: value for text, value in likely.items() if math.isfinite(value)}))
    return tokens


def _reason(error: Exception) -> str:
    """Return the message of an endpoint or a connection, in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text} ({error.__cause__})" if error.__cause__ else text


def _not_there(requests: Iterable[Mapping[str, Any]], n_questions: int, folder: Path) -> str:
    """Return the message about questions that are not in the cache."""
    starts = [repr(request["messages"][-1]["content"][:60]) for request in requests]
    return (
        f"{len(starts)} of {n_questions} questions have no reply in {folder}, and the judge may not be called: "
        f"{listed(starts, 3)}. Ask without replay, or name the folder, model and parameters of the earlier run."
    )
