"""`place_tokens` against a loop over the tokens of a step."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, PlacedTokens, PromptRows, place_tokens

N_ROWS, N_GROUPS, N_TOKENS = 6, 2, 40

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def placing(
    rows: tuple[int, ...] = (4, 0, 3),
    lengths: tuple[int, ...] = (5, 1, 9),
    firsts: tuple[int, ...] = (0, 7, 4),
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of a step in which some sequences pass the end of their prompts."""
    parts = [torch.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)]
    # A server's buffers are longer than the step.
    positions = torch.cat([*parts, torch.full((3,), 99)])
    arguments = {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "starts": torch.tensor([0, *lengths]).cumsum(0).int(),
        "positions": positions,
        "slots": torch.arange(100, 100 + len(positions)),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()} | {
        "prompts": PromptRows(
            n_counted=torch.tensor([8, 0, 5, 13, 6, 1], device=device),
            groups=torch.tensor([[0, 1], [1, 0], [1, 1], [1, 0], [1, 1], [0, 0]], dtype=torch.bool, device=device),
            planned=torch.zeros(N_ROWS, dtype=torch.bool, device=device),
        ),
        "out": results(N_TOKENS, N_GROUPS, N_ROWS, device),
    }


def results(n_tokens: int, n_groups: int, n_rows: int, device: str) -> PlacedTokens:
    """Results of an earlier step."""
    token = torch.full((n_tokens,), 7, device=device)
    due = torch.full((n_groups, n_rows), 7, dtype=torch.int32, device=device)
    return PlacedTokens(token.int(), token.clone(), token.clone(), due)


def device_of(backend: str) -> str:
    return "cpu" if backend == "reference" or INTERPRETED else "cuda"


def expected(arguments: dict[str, Any]) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """Row, position and slot of each token, by token; the rows that are due, by group; and which rows are planned."""
    rows, starts = arguments["rows"].tolist(), arguments["starts"].tolist()
    prompts = arguments["prompts"]
    tokens, due = [], [[-1] * N_ROWS for _ in range(N_GROUPS)]
    planned = prompts.planned.tolist()
    for b, row in enumerate(rows):
        n_counted = int(prompts.n_counted[row])
        for t in range(starts[b], starts[b + 1]):
            position = int(arguments["positions"][t])
            tokens.append([row, position, int(arguments["slots"][t]) if position < n_counted else -1])
            if position >= n_counted - 1 and n_counted and not planned[row]:
                for group in prompts.groups[row].nonzero().flatten().tolist():
                    due[group][b] = row
                planned[row] = True
    return tokens, due, planned


@pytest.mark.parametrize("seed", range(8))
def test_steps(backend: str, seed: int) -> None:
    draw = random.Random(seed)
    n = draw.randrange(N_ROWS + 1)
    lengths = tuple(draw.choice((0, 1, 1, 3, 6)) for _ in range(n))
    rows, firsts = tuple(draw.sample(range(N_ROWS), n)), tuple(draw.randrange(10) for _ in range(n))
    arguments = placing(rows, lengths, firsts, device_of(backend))
    arguments["prompts"].planned[draw.randrange(N_ROWS)] = True
    tokens, due, planned = expected(arguments)
    out = place_tokens(**arguments, backend=backend)
    assert out is arguments["out"]
    placed = torch.stack([out.row.long(), out.position, out.slot], dim=1).tolist()
    assert placed[: len(tokens)] == tokens
    assert [[row, slot] for row, _, slot in placed[len(tokens) :]] == [[-1, -1]] * (N_TOKENS - len(tokens))
    assert out.due.tolist() == due and arguments["prompts"].planned.tolist() == planned


def test_a_prompt_is_due_once(backend: str) -> None:
    arguments = placing(device=device_of(backend))
    assert place_tokens(**arguments, backend=backend).due.tolist() == [[-1, -1, 3, -1, -1, -1], [-1, 0, -1, -1, -1, -1]]
    arguments["positions"] += 20
    assert place_tokens(**arguments, backend=backend).due.tolist() == [[4, -1, -1, -1, -1, -1]] * 2


def test_more_tokens_and_rows_than_a_tile(backend: str) -> None:
    n, device = 2500, device_of(backend)
    prompts = PromptRows(
        n_counted=torch.full((1500,), 2000, device=device),
        groups=torch.ones(1500, 1, dtype=torch.bool, device=device),
        planned=torch.zeros(1500, dtype=torch.bool, device=device),
    )
    rows, starts = (torch.tensor(values, device=device) for values in ([1400], [0, n]))
    token = torch.arange(n, device=device)
    out = place_tokens(rows, starts.int(), token, token, prompts, results(3000, 1, 1500, device), backend=backend)
    assert out.row.tolist() == [1400] * n + [-1] * 500
    assert out.position[:n].tolist() == list(range(n))
    assert out.slot.tolist() == list(range(2000)) + [-1] * 1000
    assert out.due.tolist() == [[1400] + [-1] * 1499]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", torch.zeros(3)),
        ("starts", torch.zeros(3, dtype=torch.int32)),
        ("positions", torch.zeros(20, dtype=torch.int32)),
        ("slots", torch.zeros(20, 2, dtype=torch.int64)),
        ("slots", torch.zeros(40, dtype=torch.int64)[::2]),
    ],
)
def test_what_is_refused(name: str, value: Tensor) -> None:
    with pytest.raises(InputError, match=f"`{name}`"):
        place_tokens(**(placing() | {name: value}))


def test_groups_that_the_results_do_not_have() -> None:
    arguments = placing()
    groups = torch.ones(N_ROWS, N_GROUPS + 1, dtype=torch.bool)
    with pytest.raises(InputError, match=r"`prompts\.groups`"):
        place_tokens(**arguments | {"prompts": replace(arguments["prompts"], groups=groups)})
