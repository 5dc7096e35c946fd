"""Engines against transformers with `dspa.Steering` or an adapter: the same tokens, whatever else is in the batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from dspa.testing import D_SAE_IN
from dspa_kernels import n_words
from tests.serving.conftest import ASKED, NO_GPU, PROMPTS, SAES, World

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")


def differences(
    world: World, answers: dict[str, Any], n_tokens: int = 16, asked: dict[str, tuple[Any, Any]] = ASKED
) -> list[str]:
    """Compare all answers with those of transformers."""
    expected = {
        (n, name): world.answers(prompt, config, n_tokens)
        for n, prompt in enumerate(PROMPTS)
        for name, (_, config) in asked.items()
    }
    requests = list(expected)
    moved = {name for (n, name), tokens in expected.items() if tokens != expected[n, "base"]}
    assert moved == set(asked) - {"base"}, "some steering changes nothing here"
    for name, (_, config) in asked.items():
        if isinstance(config, tuple):
            ungated = [world.answers(prompt, config[0], n_tokens) for prompt in PROMPTS]
            assert ungated != [expected[n, name] for n in range(len(PROMPTS))], "a gate changes nothing here"
    for several, single in (("two maps", "both"), ("three maps", "generated")):
        if several in asked:
            assert any(expected[n, several] != expected[n, single] for n in range(len(PROMPTS))), several
    return [
        f"round {number}, prompt {requests[i]}: {answer['tokens']} != {expected[requests[i]]}"
        for number, answered in enumerate(answers["rounds"])
        for i, answer in enumerate(answered)
        if answer["tokens"] != expected[requests[i]]
    ]


MEMORY = int(NO_GPU["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
REQUESTS = [[n, extra] for n in range(len(PROMPTS)) for extra, _ in ASKED.values()]
# By the name of a case, the options of its engine.
CASES: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunks and the prefix cache": {"max_num_batched_tokens": 24, "enable_prefix_caching": True},
    "preemptions": {"num_gpu_blocks_override": 10, "enable_prefix_caching": True},
    "compiled, in chunks": {"enforce_eager": False, "max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "two ranks": {"tensor_parallel_size": 2, "max_num_batched_tokens": 48, "enable_prefix_caching": True},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_each_architecture(family: str, make_world: Any, run_engine: Callable[..., dict[str, Any]]) -> None:
    world = make_world(family)
    answers = run_engine(options=world.options(), prompts=PROMPTS, requests=REQUESTS)
    assert differences(world, answers) == []


@pytest.mark.parametrize("case", CASES)
def test_each_way_of_scheduling(case: str, make_world: Any, run_engine: Callable[..., dict[str, Any]]) -> None:
    world = make_world("qwen3")
    # Gates by entropy are for one rank.
    by_entropy = {name for name, (keys, _) in ASKED.items() if keys and keys.get("dspa_gate") == "entropy"}
    asked = {name: one for name, one in ASKED.items() if case != "two ranks" or name not in by_entropy}
    requests = [[n, extra] for n in range(len(PROMPTS)) for extra, _ in asked.values()]
    # Long answers need more blocks than were there for their prompts.
    n_tokens = 28 if case == "preemptions" else 16
    options, sampling = world.options() | CASES[case], {"max_tokens": n_tokens}
    # More rounds show what builds up.
    rounds = 2 * int(os.environ.get("DSPA_SOAK", "1"))
    answers = run_engine(options=options, prompts=PROMPTS, requests=requests, rounds=rounds, sampling=sampling)
    assert differences(world, answers, n_tokens, asked) == []
    if case == "preemptions":
        assert answers["preemptions"] > 0
    if case == "chunks and the prefix cache":
        cached = {extra is not None: 0 for _, extra in REQUESTS}
        for answer, (_, extra) in zip(answers["rounds"][1], requests, strict=True):
            cached[extra is not None] += answer["cached"]
        assert cached[False] > 0 and cached[True] > 0


def test_second_turns(make_world: Any, run_engine: Callable[..., dict[str, Any]]) -> None:
    """A second turn reads the first prompt from the cache, and not what was computed under edits after it."""
    world = make_world("qwen3")
    prompts, requests, expected = [], [], []
    for name in ("both", "late", "all", "answer"):
        for first in (PROMPTS[3], PROMPTS[7][:60]):
            turn = first + world.answers(first, ASKED[name][1]) + PROMPTS[1]
            for prompt, kind in ((first, name), (turn, "base"), (turn, name)):
                requests.append([len(prompts), ASKED[kind][0]])
                prompts.append(prompt)
                expected.append(world.answers(prompt, ASKED[kind][1]))
    # One at a time, so that a first turn is over when the second ones begin.
    options = world.options() | {"enable_prefix_caching": True, "max_num_seqs": 1}
    (answers,) = run_engine(options=options, prompts=prompts, requests=requests)["rounds"]
    assert [answer["tokens"] for answer in answers] == expected
    # The second block of 32 tokens of a first turn has edits of its map, which the second turn's prompt has not.
    assert [answers[turn]["cached"] for turn in (2, 5)] == [32, 32]


def test_prompts_that_another_steering_left_in_the_cache(make_world: Any, run_engine: Any) -> None:
    """One request at a time, all kinds over the same prompts in both orders: answers are those of an empty cache."""
    world = make_world("qwen3")
    cases = [(n, name) for names in (reversed(ASKED), ASKED) for name in names for n in (4, 7)]
    options = world.options() | {"enable_prefix_caching": True, "max_num_seqs": 1}
    requests = [[n, ASKED[name][0]] for n, name in cases]
    (answers,) = run_engine(options=options, prompts=PROMPTS, requests=requests)["rounds"]
    expected = {case: world.answers(PROMPTS[case[0]], ASKED[case[1]][1]) for case in set(cases)}
    wrong = [case for case, answer in zip(cases, answers, strict=True) if answer["tokens"] != expected[case]]
    assert wrong == []
    # Each finds at least what it left itself.
    assert all(answer["cached"] >= 64 for answer in answers[len(cases) // 2 :])


def test_unsteered_requests_are_those_of_plain_vllm(make_world: Any, run_engine: Any) -> None:
    world = make_world("qwen3")
    steered = run_engine(options=world.options(), prompts=PROMPTS, requests=REQUESTS)
    plain = run_engine(options=world.plain(), prompts=PROMPTS, requests=[[n, None] for n, _ in REQUESTS])
    assert [
        (mine["tokens"], mine["logprobs"])
        for mine, (_, extra) in zip(steered["rounds"][0], REQUESTS, strict=True)
        if extra is None
    ] == [
        (other["tokens"], other["logprobs"])
        for other, (_, extra) in zip(plain["rounds"][0], REQUESTS, strict=True)
        if extra is None
    ]
    # Latents lie beside the cache, in the same memory.
    latents = 4 * (n_words(D_SAE_IN) + n_words(SAES["sae_gate"][1])) * world.plain()["block_size"]
    assert steered["blocks"] == pytest.approx(MEMORY / (MEMORY / plain["blocks"] + latents), abs=2) != plain["blocks"]


def test_windows_alone(make_world: Any, run_engine: Callable[..., dict[str, Any]]) -> None:
    """Whose layers all attend to a window keeps no whole prompt; prompts of one window are served as without it."""
    world = make_world("mistral")
    windowed = world.options() | {"hf_overrides": world.options()["hf_overrides"] | {"sliding_window": 64}}
    requests = [[n, extra] for n, extra in REQUESTS if len(PROMPTS[n]) <= 40]
    with pytest.raises(AssertionError, match="--disable-sliding-window"):
        run_engine(options=windowed, prompts=PROMPTS, requests=requests)
    whole = windowed | {"max_model_len": 64, "disable_sliding_window": True}
    (answers,) = run_engine(options=whole, prompts=PROMPTS, requests=requests)["rounds"]
    names = [name for n in range(len(PROMPTS)) if len(PROMPTS[n]) <= 40 for name in ASKED]
    expected = [world.answers(PROMPTS[n], ASKED[name][1]) for (n, _), name in zip(requests, names, strict=True)]
    assert [answer["tokens"] for answer in answers] == expected


def test_ways_past_the_checks_of_a_running_engine(make_world: Any, run_engine: Callable[..., dict[str, Any]]) -> None:
    """Other weights are refused, requests that a caller built are checked, and the engine answers on as before."""
    world = make_world("llama")
    keys, config = ASKED["both"]
    answers = run_engine(
        options=world.options() | {"enable_prefix_caching": True},
        prompts=PROMPTS,
        requests=REQUESTS,
        rounds=2,
        calls=["reload_weights", "reset_weights"],
        built=[[4, keys], [5, keys], [4, {"dspa_alfa": 1}], [4, {"dspa_start": 99}], [4, {"vllm_xargs": keys}]],
    )
    assert ["made for the weights that it started with" in error for error in answers["calls"]] == [True, True]
    assert answers["built"][:2] == [world.answers(PROMPTS[n], config) for n in (4, 5)]
    for error, part in zip(answers["built"][2:], ("`dspa_alfa`", "1 to 75", "vllm_xargs.dspa_alpha"), strict=True):
        assert part in error
    assert differences(world, answers) == []
