"""Threads that share a model and what is attached to it: each call has the result that it has alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.fsrl import FSRLAdapter
from dspa.testing import L_OUT, make_model

from ..support.adapters import make_adapter
from .test_generate import PROMPTS

N_THREADS, N_CALLS, N_NEW = 8, 4, 4
LONGER = [[*prompt, 33, 20] for prompt in PROMPTS]
ALL = [torch.tensor([prompt]) for prompt in (*PROMPTS, *LONGER, PROMPTS[0][::-1], LONGER[1][::-1])]
SEQUENCES = [torch.cat([ids, torch.tensor([[44, 12, 31, 7]])], dim=1) for ids in ALL]


@pytest.fixture(autouse=True)
def short_turns() -> Iterator[None]:
    """Let threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], Any], n_threads: int = N_THREADS, n_calls: int = N_CALLS) -> list[list[Any]]:
    """Return what the calls of each thread return, or the exceptions that they raise."""
    results: list[list[Any]] = [[] for _ in range(n_threads)]
    start = threading.Barrier(n_threads)

    def run(n: int) -> None:
        start.wait()
        for _ in range(n_calls):
            try:
                results[n].append(work(n))
            except Exception as error:
                results[n].append(error)

    threads = [threading.Thread(target=run, args=[n], daemon=True) for n in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return results


def check(results: list[list[Any]], wanted: list[Any]) -> None:
    for n, calls in enumerate(results):
        for result in calls:
            if isinstance(result, Exception):
                raise AssertionError(f"thread {n}: {result}") from result
            assert result == wanted[n], f"thread {n}"


def generated(model: Any, n: int) -> list[int]:
    ids = ALL[n]
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False)
    return tokens[0].tolist()


@torch.no_grad()
def logits(model: Any, n: int) -> list[float]:
    return [float(value) for value in model(SEQUENCES[n]).logits[0, -1]]


@pytest.fixture
def adapter(gemma, sae_out) -> FSRLAdapter:
    return make_adapter(sae_out)


@pytest.mark.parametrize("call", [generated, logits])
def test_an_adapter_that_half_of_the_threads_disable(gemma, adapter, call):
    def work(n: int) -> Any:
        with adapter.disabled() if n % 2 else nullcontext():
            return call(gemma, n)

    base = [call(gemma, n) for n in range(N_THREADS)]
    with adapter.attach(gemma):
        acting = [call(gemma, n) for n in range(N_THREADS)]
        assert all(one != other for one, other in zip(base, acting, strict=True))
        check(together(work), [base[n] if n % 2 else acting[n] for n in range(N_THREADS)])


def test_a_steering_that_some_threads_disable_and_others_score_with(gemma, steering):
    def work(n: int) -> Any:
        if n % 4 == 1:
            with steering.disabled():
                return generated(gemma, n)
        if n % 4 == 2:
            with steering.responses([ALL[n].shape[1]]):
                return logits(gemma, n)
        if n % 4 == 3:
            with steering.disabled():
                return logits(gemma, n)
        return generated(gemma, n)

    with steering.attach(gemma):
        alone = [work(n) for n in range(N_THREADS)]
        check(together(work), alone)


def test_traces(gemma, sae_in, sae_out, cdmap):
    """Each edit is of the call that made it, and a thread's own trace holds its own edits alone."""
    config = dspa.SteeringConfig(alpha=0.6, mode="both")

    def work(n: int) -> list[Any]:
        with steering.recording() as trace:
            generated(gemma, n)
        assert len({edit.call for edit in trace}) == 1
        return [(edit.position, edit.latents, edit.after) for edit in trace]

    with dspa.Steering(sae_in, sae_out, cdmap, config, record=True).attach(gemma) as steering:
        alone = [work(n) for n in range(N_THREADS)]
        assert all(alone)
        steering.trace.clear()
        check(together(work), alone)
        calls: dict[int, list[Any]] = {}
        for edit in steering.trace:
            calls.setdefault(edit.call, []).append((edit.position, edit.latents, edit.after))
    assert sorted(calls.values()) == sorted(alone * N_CALLS)


def test_moves(gemma, adapter):
    def work(n: int) -> list[Any]:
        with adapter.recording() as moves:
            logits(gemma, n)
        return [tensor.tolist() for tensor in (*moves.l1, *moves.l0)]

    with adapter.attach(gemma):
        check(together(work), [work(n) for n in range(N_THREADS)])


def test_residuals_that_are_not_finite_fail_their_own_call(sae_in, sae_out, cdmap):
    model = make_model("gemma2")
    layer = model.model.layers[L_OUT]

    def spoil(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output * float("nan") if threading.current_thread().name == "bad" and output.shape[1] == 1 else output

    handle = layer.mlp.register_forward_hook(spoil)

    def work(n: int) -> Any:
        if n == 0:
            threading.current_thread().name = "bad"
            with pytest.raises(dspa.ModelError, match="layer 2 are NaN or infinite"):
                generated(model, n)
            return None
        return generated(model, n)

    with dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.6)).attach(model):
        wanted = [None, *(generated(model, n) for n in range(1, N_THREADS))]
        check(together(work), wanted)
    handle.remove()


def test_a_hook_that_did_not_run_is_not_hidden_by_another_call(gemma, adapter):
    """Two calls run at the same time, and the pass of one of them does not reach the layer."""
    begun, ended = threading.Event(), threading.Event()

    def acting() -> None:
        with adapter.checked_call():
            begun.wait(60)
            gemma(ALL[0])
            ended.set()

    with adapter.attach(gemma):
        thread = threading.Thread(target=acting)
        thread.start()
        with pytest.raises(dspa.ModelError, match="did not run"), adapter.checked_call():
            begun.set()
            assert ended.wait(60)
        thread.join()


def test_assistants(gemma, steering):
    """Threads that share an assistant as well, which takes the plans of each call."""
    assistant = make_model("gemma2", seed=5)

    def work(n: int) -> list[int]:
        ids = ALL[n]
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": N_NEW, "do_sample": False}
        return gemma.generate(ids, assistant_model=assistant, **settings)[0].tolist()

    with steering.attach(gemma):
        wanted = [generated(gemma, n) for n in range(4)]
        check(together(work, n_threads=4), wanted)
    assert "prepare_inputs_for_generation" not in assistant.__dict__


@pytest.mark.parametrize("name", ["config", "record"])
def test_settings_cannot_be_changed(steering, name):
    """Another thread may be in the middle of a call."""
    with pytest.raises(AttributeError, match=f"'{name}'"):
        setattr(steering, name, getattr(steering, name))


def test_the_config_of_an_adapter_cannot_be_changed(adapter):
    with pytest.raises(AttributeError, match="'config'"):
        adapter.config = adapter.config
