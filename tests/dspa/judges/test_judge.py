"""A judge at an endpoint in a thread: what is asked, kept and asked again, and what goes wrong there."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from dspa.errors import JudgeError
from dspa.judges.judge import Judge
from dspa.judges.questions import Question, chat, one_of

from ..support.endpoint import completion, last, serving

pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')

CITIES = ("Paris", "Rome")


def city(text: str) -> Question[str]:
    return Question(chat(text), one_of(CITIES))


def paris(request: dict[str, Any]) -> str:
    return "Paris"


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path):
    asked = [city(f"{n}") for n in range(12)]
    with serving(lambda request: CITIES[int(last(request)) % 2]) as endpoint:
        answers = Judge(endpoint.url, "m", cache=tmp_path, concurrency=4).ask_all(asked)
    assert [answer.value for answer in answers] == list(CITIES) * 6
    assert all(answer.answered for answer in answers)


def test_what_is_sent(tmp_path: Path):
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(Question(chat("where?", "be brief"), str))
        Judge(endpoint.url, "m", cache=tmp_path, parameters={"guided_choice": ["a"]}).ask(city("where?"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "where?"}]
    assert endpoint.requests == [
        {"messages": messages, "model": "m", "temperature": 0.0, "max_tokens": 1024},
        {"messages": messages[1:], "model": "m", "guided_choice": ["a"]},
    ]


def test_a_question_is_asked_once(tmp_path: Path):
    with serving(paris) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        assert [answer.value for answer in judge.ask_all([city("a"), city("a"), city("b")])] == ["Paris"] * 3
        assert len(endpoint.requests) == 2
        again = Judge(endpoint.url, "m", cache=tmp_path)
        assert again.ask(city("a")).value == "Paris"
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize("other", [{"model": "n"}, {"parameters": {"temperature": 1.0}}], ids=["model", "parameters"])
def test_what_was_asked_otherwise_is_asked_again(tmp_path: Path, other: dict[str, Any]):
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
        Judge(endpoint.url, **{"model": "m", **other}, cache=tmp_path).ask(city("a"))
    assert len(endpoint.requests) == 2


def test_a_stopped_run_goes_on(tmp_path: Path):
    """The endpoint breaks down after five questions, and the next run asks the other five alone."""
    asked = [city(str(n)) for n in range(10)]
    with serving(lambda request: "Rome" if int(last(request)) < 5 else (503, "down")) as endpoint:
        with pytest.raises(JudgeError, match=r"503.*start again"):
            Judge(endpoint.url, "m", cache=tmp_path, concurrency=1, retries=0).ask_all(asked)
        endpoint.requests.clear()
        endpoint.answer = paris
        answers = Judge(endpoint.url, "m", cache=tmp_path).ask_all(asked)
        assert sorted(int(last(request)) for request in endpoint.requests) == [5, 6, 7, 8, 9]
    assert [answer.value for answer in answers] == ["Rome"] * 5 + ["Paris"] * 5


def test_replies_under_way_are_kept_when_another_fails(tmp_path: Path):
    failed = threading.Event()

    def answer(request: dict[str, Any]) -> str | tuple[int, str]:
        if last(request) == "bad":
            failed.set()
            return 401, "{}"
        assert failed.wait(10)
        return "Rome"

    with serving(answer) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path, concurrency=2)
        with pytest.raises(JudgeError):
            judge.ask_all([city("good"), city("bad")])
    assert Judge("http://unused", "m", cache=tmp_path, replay=True).ask(city("good")).value == "Rome"


def test_calls_are_counted_before_they_are_made(tmp_path: Path):
    asked = [city("a"), city("b"), city("a"), city("c")]
    with serving(paris) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        judge.ask(city("c"))
        assert judge.n_calls(asked) == 2 and len(endpoint.requests) == 1
        judge.ask_all(asked)
        assert len(endpoint.requests) == 3 and judge.n_calls(asked) == 0


def test_tokens_are_kept_with_the_reply(tmp_path: Path):
    tokens = [("Pa", {"Pa": 0.75, "Ro": 0.25}), ("ris", {"ris": 1.0})]
    with serving(lambda request: (200, completion("Paris", tokens=tokens))) as endpoint:
        answer = Judge(endpoint.url, "m", cache=tmp_path, parameters={"logprobs": True}).ask(city("a"))
    assert answer.value == "Paris" and answer.tokens is not None
    assert [token.text for token in answer.tokens] == ["Pa", "ris"]
    assert answer.tokens[0].likely == pytest.approx({"Pa": math.log(0.75), "Ro": math.log(0.25)})
    replay = Judge(None, "m", cache=tmp_path, parameters={"logprobs": True}, replay=True)
    assert replay.ask(city("a")) == answer


def test_replies_without_tokens_are_read(tmp_path: Path):
    """Also those that an earlier version wrote, which have no entry for tokens."""
    with serving(paris) as endpoint:
        assert Judge(endpoint.url, "m", cache=tmp_path).ask(city("a")).tokens is None
    (path,) = tmp_path.rglob("*.json")
    entry = json.loads(path.read_text())
    del entry["reply"]["tokens"]
    path.write_text(json.dumps(entry))
    assert Judge(None, "m", cache=tmp_path, replay=True).ask(city("a")).value == "Paris"


def test_replay_calls_nothing(tmp_path: Path):
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
    replay = Judge(None, "m", cache=tmp_path, replay=True)
    assert replay.ask(city("a")).value == "Paris"
    with pytest.raises(JudgeError, match=r"1 of 2 questions have no reply in .*'what of b\?'"):
        replay.ask_all([city("a"), city("what of b?")])


def test_a_busy_endpoint_is_asked_again(tmp_path: Path):
    replies = iter([(429, "{}"), (500, "{}"), "Paris"])
    with serving(lambda request: next(replies)) as endpoint:
        assert Judge(endpoint.url, "m", cache=tmp_path, retries=2).ask(city("a")).value == "Paris"
    assert len(endpoint.requests) == 3


def test_calls_at_the_same_time_are_bounded(tmp_path: Path):
    """Two calls meet in the endpoint, and a third never does."""
    pair = threading.Barrier(2, timeout=10)

    def answer(request: dict[str, Any]) -> str:
        pair.wait()
        return "Paris"

    with serving(answer) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path, concurrency=2).ask_all([city(str(n)) for n in range(8)])
    assert endpoint.most_at_once == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, '{"error": {"message": "no key"}}'), "does not let you in.*no key.*DSPA_JUDGE_KEY"),
        ((404, '{"error": {"message": "no model m"}}'), "not there.*no model m.*Check the name"),
        ((429, "{}"), "did not answer after 0 retries.*fewer calls"),
        ((200, "<html>hello</html>"), "not as a chat endpoint does.*hello.*/v1"),
        ((200, "{broken"), "not as a chat endpoint does"),
        ((400, '{"error": {"message": "no such parameter"}}'), "refuses all of 1 questions.*no such parameter"),
        ((200, '{"error": {"message": "overloaded"}, "choices": []}'), "refuses all of 1 questions.*overloaded"),
        ((200, '{"choices": [{"message": null}]}'), "refuses all of 1 questions: no answer came"),
    ],
)
def test_errors_of_the_endpoint(tmp_path: Path, reply: tuple[int, str], message: str):
    with serving(lambda request: reply) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path, retries=0)
        with pytest.raises(JudgeError, match=f"(?s){message}"):
            judge.ask(city("a"))
    assert not list(tmp_path.rglob("*.json"))


def test_an_endpoint_that_is_down(tmp_path: Path):
    with serving(paris) as endpoint:
        pass
    with pytest.raises(JudgeError, match=r"cannot be reached: .*refused.*Start the endpoint"):
        Judge(endpoint.url, "m", cache=tmp_path, retries=50).ask(city("a"))


def test_an_endpoint_that_hangs(tmp_path: Path):
    done = threading.Event()

    def answer(request: dict[str, Any]) -> str:
        done.wait(10)
        return "Paris"

    with serving(answer) as endpoint:
        with pytest.raises(JudgeError, match="timed out"):
            Judge(endpoint.url, "m", cache=tmp_path, retries=0, timeout=0.2).ask(city("a"))
        done.set()


def test_a_refused_question_is_unanswered_and_asked_again(tmp_path: Path):
    def answer(request: dict[str, Any]) -> str | tuple[int, str]:
        return (400, '{"error": {"message": "filtered"}}') if last(request) == "bad" else "Rome"

    with serving(answer) as endpoint:
        good, bad = Judge(endpoint.url, "m", cache=tmp_path).ask_all([city("good"), city("bad")])
        assert good.value == "Rome"
        assert (bad.answered, bad.value, bad.text) == (False, None, "")
        assert "filtered" in bad.problem
        endpoint.answer = paris
        assert Judge(endpoint.url, "m", cache=tmp_path).ask(city("bad")).value == "Paris"


def test_an_answer_that_cannot_be_read_is_unanswered_and_kept(tmp_path: Path):
    with serving(lambda request: "I would rather not say") as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        for _ in range(2):
            answer = judge.ask(city("a"))
            assert (answer.answered, answer.value) == (False, None)
            assert answer.text == "I would rather not say"
            assert answer.problem == "the answer is 'I would rather not say'; accepted: Paris, Rome"
        assert len(endpoint.requests) == 1


def test_an_answer_that_was_cut(tmp_path: Path):
    with serving(lambda request: (200, completion("I think that", "length"))) as endpoint:
        assert "cut at the limit of tokens" in Judge(endpoint.url, "m", cache=tmp_path).ask(city("a")).problem


def test_the_key_is_sent_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPA_JUDGE_KEY", "secret-of-mine")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-others")
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
    assert endpoint.keys == ["Bearer secret-of-mine"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert "secret" not in files[0].read_text()


def test_a_key_that_no_header_can_hold_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPA_JUDGE_KEY", "sec\nret")
    with serving(paris) as endpoint, pytest.raises(JudgeError, match="DSPA_JUDGE_KEY is no key") as caught:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
    assert "ret" not in str(caught.value).partition("accepted")[0]
    monkeypatch.setenv("DSPA_JUDGE_KEY", " secret\n")
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
    assert endpoint.keys == ["Bearer secret"]


def test_no_key_of_others_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DSPA_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-others")
    with serving(paris) as endpoint:
        Judge(endpoint.url, "m", cache=tmp_path).ask(city("a"))
    assert "secret" not in endpoint.keys[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["request"]["messages"].clear(),
        lambda entry: entry.update(format="other"),
        lambda entry: entry["reply"].update(text=3),
        lambda entry: entry.pop("reply"),
    ],
)
def test_a_damaged_reply_is_refused(tmp_path: Path, damage: Any):
    with serving(paris) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        judge.ask(city("a"))
    (path,) = tmp_path.rglob("*.json")
    entry = json.loads(path.read_text())
    damage(entry)
    path.write_text(json.dumps(entry))
    with pytest.raises(JudgeError, match=f"{path.name}.*Remove the file"):
        judge.ask(city("a"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": None}, "URL of the judge is ''; accepted: an address"),
        ({"url": "localhost:8000"}, "URL of the judge.*accepted: an address"),
        ({"url": "http://me:word@host/v1"}, "password.*DSPA_JUDGE_KEY"),
        ({"parameters": {"stream": True, "n": 2}}, "`parameters` is of n, stream"),
        ({"concurrency": 0}, "`concurrency`"),
        ({"retries": -1}, "`retries`"),
        ({"timeout": 0.0}, "`timeout`"),
    ],
)
def test_bad_settings(tmp_path: Path, given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        Judge(**{"url": "http://host/v1", "model": "m", "cache": tmp_path, **given})
    assert "word" not in str(caught.value).replace("password", "")
