"""`dspa.serving.gates` against the gate of each sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dspa.errors import ModelError
from dspa.serving.batch import Batch
from dspa.serving.gates import RequestGates
from dspa.serving.requests import SteeringRequest, parse
from dspa.steering.decisions import EntropyGate, FirstTokens, Gate, RandomGate, prompt_key
from tests.serving.test_requests import settings

N_REQUESTS, N_TOKENS, LENGTH, VOCAB = 4, 24, 20, 12
ENTROPY = {"dspa_gate": "entropy", "dspa_gate_threshold": 1.8}
# Keys of requests, and their gates.
CASES: list[tuple[dict[str, Any], Gate | None]] = [
    ({"dspa": "on"}, None),
    (ENTROPY, EntropyGate(1.8)),
    (ENTROPY | {"dspa_gate_k": 4, "dspa_gate_threshold": 1.1}, EntropyGate(1.1, k=4)),
    (ENTROPY | {"dspa_gate_complement": "on"}, EntropyGate(1.8, complement=True)),
    ({"dspa_gate": "random", "dspa_gate_share": 0.5}, RandomGate(0.5)),
    ({"dspa_gate": "random", "dspa_gate_share": 0.5, "dspa_gate_seed": 2**40}, RandomGate(0.5, seed=2**40)),
    ({"dspa_gate": "first", "dspa_gate_n": 3}, FirstTokens(3)),
]


def request(keys: dict[str, Any], n_prompt: int) -> SteeringRequest:
    asked = parse(keys, settings())
    assert asked is not None
    return asked.of_prompt(n_prompt)


def entropy(logits: Tensor, k: int) -> float:
    """By the definition, in double precision."""
    p = logits.double().sort(descending=True).values[:k].softmax(0)
    return float(-(p * p.log()).sum())


def expected(gate: Gate | None, prompt: list[int], logits: Tensor) -> list[bool]:
    """Which residuals of a sequence of LENGTH tokens are left in the batch: logits are [LENGTH, VOCAB]."""
    first = len(prompt) - 1
    if gate is None:
        return [True] * LENGTH
    if isinstance(gate, EntropyGate):
        # The token at a position was chosen from the logits of the one before it.
        chosen = [t <= first or entropy(logits[t - 1], gate.k) >= gate.threshold for t in range(LENGTH)]
        return [t < first or one != gate.complement for t, one in enumerate(chosen)]
    ids = torch.tensor([prompt])
    key = prompt_key(ids, torch.ones_like(ids, dtype=torch.bool))
    return gate.opened(torch.arange(LENGTH)[None] - first, key)[0].tolist()


class Engine:
    """Steps over some requests, which have rows, ids, prompts, logits and numbers of computed tokens."""

    def __init__(self) -> None:
        self.batch = Batch(N_REQUESTS, N_TOKENS, 1, torch.device("cpu"), torch.float32)
        self.gates = RequestGates(self.batch, LENGTH)

    def step(self, rows: list[int], done: list[int], sizes: list[int], logits: list[Tensor]) -> list[list[bool]]:
        """Compute the next tokens of each request, and return which are left in the batch."""
        starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(n, n + size) for n, size in zip(done, sizes, strict=True)])
        positions = torch.nn.functional.pad(positions, (0, N_TOKENS - len(positions)))
        self.batch.place(torch.tensor(rows), starts, positions)
        self.gates.close(torch.tensor(rows), starts, positions)
        row, _ = self.batch.tokens(int(starts[-1]))
        left = [part.tolist() for part in (row >= 0).split(sizes)]
        self.gates.observe(torch.stack([one[n + size - 1] for one, n, size in zip(logits, done, sizes, strict=True)]))
        # As for log-probabilities of a prompt.
        self.gates.observe(torch.zeros(17, VOCAB))
        assert (self.batch.placed.row[int(starts[-1]) :] == -1).all()
        return left


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_steps_of_mixed_requests(chunk: int) -> None:
    """Prompts in chunks beside answers, rows that are used again: each request as by itself."""
    torch.manual_seed(0)
    engine, outcomes = Engine(), set[tuple[int, bool]]()
    for turn in range(len(CASES)):
        numbers = [(turn + n) % len(CASES) for n in range(3)]
        prompts = [torch.randint(9, (n,)).tolist() for n in (1, 5, 9)]
        logits = [2 * torch.randn(LENGTH, VOCAB) for _ in prompts]
        rows, done = [2, 0, 3], [0, 0, 0]
        for number, row, prompt in zip(numbers, rows, prompts, strict=True):
            engine.gates.begin(row, request(CASES[number][0], len(prompt)), f"{turn} {number}", prompt)
        left: list[list[bool]] = [[], [], []]
        while min(done) < LENGTH:
            sizes = [
                min(chunk, len(prompt) - n) if n < len(prompt) else min(1, LENGTH - n)
                for n, prompt in zip(done, prompts, strict=True)
            ]
            live = [n for n, size in enumerate(sizes) if size]
            parts = engine.step(*([one[n] for n in live] for one in (rows, done, sizes, logits)))
            for n, part in zip(live, parts, strict=True):
                left[n] += part
                done[n] += sizes[n]
        for n, number in enumerate(numbers):
            assert left[n] == expected(CASES[number][1], prompts[n], logits[n])
            outcomes |= {(number, one) for one in left[n]}
    # Each gate was open at some tokens and closed at others.
    assert outcomes >= {(number, one) for number in range(1, len(CASES)) for one in (True, False)}


def test_a_preempted_request_goes_on_as_it_began() -> None:
    """Its answer is computed again in one step, in another row, as its logits said token by token."""
    torch.manual_seed(1)
    engine, prompt, logits = Engine(), [1, 2, 3], 2 * torch.randn(LENGTH, VOCAB)
    whole = expected(EntropyGate(1.8), prompt, logits)
    engine.gates.begin(1, request(ENTROPY, 3), "a", prompt)
    left = engine.step([1], [0], [3], [logits])[0]
    for n in range(3, 12):
        left += engine.step([1], [n], [1], [logits])[0]
    engine.gates.keep(1, "a")
    # Another request has its row in the meantime, and ends.
    engine.gates.begin(1, request(ENTROPY, 1), "b", [5])
    engine.step([1], [0], [1], [2 * torch.randn(LENGTH, VOCAB)])
    engine.gates.keep(1, "b")
    engine.gates.forget("b")
    engine.gates.begin(0, request(ENTROPY, 3), "a", prompt)
    assert engine.step([0], [0], [12], [logits])[0] == left == whole[:12]
    assert engine.step([0], [12], [1], [logits])[0] == whole[12:13]
    assert True in whole[3:12] and False in whole[3:12]
    engine.gates.keep(0, "a")
    engine.gates.forget("a")
    assert (engine.gates.kept, engine.gates.gates, engine.gates.numbers) == ({}, {}, {})


def test_without_a_gate_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.gates.begin(0, request({"dspa": "on"}, 3), "a", [1, 2, 3])
    engine.gates.begin(1, None, "b", [1])
    monkeypatch.setattr("dspa.serving.gates.top_entropy", None)
    monkeypatch.setattr(engine.gates, "number", None)
    assert engine.step([0, 1], [0, 0], [3, 1], [torch.zeros(LENGTH, VOCAB)] * 2) == [[True] * 3, [True]]


def test_logits_of_other_tokens_are_refused() -> None:
    engine = Engine()
    engine.gates.begin(0, request(ENTROPY, 3), "a", [1, 2, 3])
    starts, positions = torch.tensor([0, 3], dtype=torch.int32), torch.arange(3)
    engine.batch.place(torch.tensor([0]), starts, positions)
    engine.gates.close(torch.tensor([0]), starts, positions)
    with pytest.raises(ModelError, match="a step of 1 requests has 2 rows of logits"):
        engine.gates.observe(torch.zeros(2, VOCAB))
