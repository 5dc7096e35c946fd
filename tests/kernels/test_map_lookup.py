import os
from typing import Any

import pytest
import torch

from dspa_kernels import InputError, SteeringPlan, map_lookup
from dspa_kernels.testing import run_on

from . import oracle
from .cases import D_SAE_IN, N_COLUMNS, integer_tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODES = ("ablate", "augment", "both")
COUNTS = integer_tensor(0, 4, (4, D_SAE_IN))
# Quarters: exact sums, and ties among the scores.
VALUES = integer_tensor(-8, 9, (D_SAE_IN, N_COLUMNS)) / 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k_diff", [1, 4, N_COLUMNS, N_COLUMNS + 9])
@pytest.mark.parametrize("k_prompt", [1, 2, 5, D_SAE_IN])
def test_lookup(backend: str, k_prompt: int, k_diff: int, mode: str) -> None:
    plan = run_on(backend, map_lookup, COUNTS, VALUES, k_prompt=k_prompt, k_diff=k_diff, mode=mode)
    slots, signs = oracle.lookup(COUNTS, VALUES, k_prompt, k_diff, mode)
    assert plan.slots.tolist() == slots and plan.slots.dtype == torch.int32
    assert plan.signs.tolist() == signs and plan.signs.dtype == torch.int8


@pytest.mark.parametrize("mode", MODES)
def test_real_values(backend: str, mode: str) -> None:
    values = torch.randn(D_SAE_IN, N_COLUMNS, generator=torch.Generator().manual_seed(0))
    plan = run_on(backend, map_lookup, COUNTS, values, k_prompt=7, k_diff=5, mode=mode)
    assert (plan.slots.tolist(), plan.signs.tolist()) == oracle.lookup(COUNTS, values, 7, 5, mode)


@pytest.mark.parametrize(
    ("counts", "values", "k_prompt", "slots"),
    [
        ([1, 3, 2], [[-1, 0, 0], [0, -1, 0], [0, 0, -1]], 1, [1, -1, -1]),
        # Of equal counts the smaller index enters.
        ([2, 2, 2], [[0, -1, 0], [-1, 0, 0], [0, 0, -1]], 1, [1, -1, -1]),
        ([1, 2, 2], [[-1, 0, 0], [0, -1, 0], [0, 0, -1]], 1, [1, -1, -1]),
        # A count of 0 never enters, even when there is room.
        ([0, 3, 0], [[-9, 0, 0], [0, 0, -1], [0, -9, 0]], 3, [2, -1, -1]),
        ([0, 0, 0], [[-9, 0, 0], [0, 0, -1], [0, -9, 0]], 3, [-1, -1, -1]),
        # Of equal scores the smaller slot comes first.
        ([1, 0, 0], [[-1, -2, -1], [0, 0, 0], [0, 0, 0]], 1, [1, 0, 2]),
        ([1, 1, 0], [[-1, -1, 0], [0, 0, -1], [0, 0, 0]], 2, [0, 1, 2]),
        # A score of 0, or of the other sign, never steers.
        ([1, 0, 0], [[0, 2, -1], [0, 0, 0], [0, 0, 0]], 1, [2, -1, -1]),
        ([1, 1, 0], [[-1, 0, 3], [1, -0.0, 1], [0, 0, 0]], 2, [-1, -1, -1]),
        # Counts up to the end of their range.
        ([5, 2**30, 1], [[-1, 0, 0], [0, -1, 0], [0, 0, -1]], 1, [1, -1, -1]),
        ([2**31 - 2, 2**31 - 1, 5], [[-1, 0, 0], [0, -1, 0], [0, 0, -1]], 1, [1, -1, -1]),
        # The sum runs from the largest count to the smallest: 1e8 + 1 rounds to 1e8.
        ([3, 2, 1], [[1e8, 0, 0], [-1, 0, 0], [-1e8, 0, 0]], 3, [-1, -1, -1]),
        ([3, 1, 2], [[1e8, 0, 0], [-1, 0, 0], [-1e8, 0, 0]], 3, [0, -1, -1]),
    ],
)
def test_ties_zeros_and_order(
    backend: str, counts: list[int], values: list[list[float]], k_prompt: int, slots: list[int]
) -> None:
    c, v = torch.tensor([counts], dtype=torch.int32), torch.tensor(values, dtype=torch.float32)
    for mode, sign in (("ablate", -1), ("augment", 1)):
        plan = run_on(backend, map_lookup, c, -sign * v, k_prompt=k_prompt, k_diff=3, mode=mode)
        assert plan.slots.tolist() == [slots]
        assert plan.signs.tolist() == [[sign if slot >= 0 else 0 for slot in slots]]


def test_both_is_augment_then_ablate(backend: str) -> None:
    both, augment, ablate = (
        run_on(backend, map_lookup, COUNTS, VALUES, k_prompt=5, k_diff=4, mode=mode)
        for mode in ("both", "augment", "ablate")
    )
    assert torch.equal(both.slots, torch.cat([augment.slots, ablate.slots], dim=1))
    assert torch.equal(both.signs, torch.cat([augment.signs, ablate.signs], dim=1))


@pytest.mark.parametrize("n_columns", [0, 1, N_COLUMNS])
@pytest.mark.parametrize("n_prompts", [0, 1, 4])
def test_few_prompts_and_columns(backend: str, n_prompts: int, n_columns: int) -> None:
    counts, values = COUNTS[:n_prompts], VALUES[:, :n_columns].contiguous()
    plan = run_on(backend, map_lookup, counts, values, k_prompt=3, k_diff=2, mode="both")
    assert plan.slots.shape == plan.signs.shape == (n_prompts, 4)
    assert (plan.slots.tolist(), plan.signs.tolist()) == oracle.lookup(counts, values, 3, 2, "both")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [[2, -1, 0, -1], [-1, -1], [3], [], [1, 0, 3, 2], None], ids=str)
def test_only_named_prompts_are_planned(backend: str, rows: list[int] | None, mode: str) -> None:
    """Plans of other prompts, and their neighbours in memory, stay."""
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    width = 8 if mode == "both" else 4
    slots = integer_tensor(0, N_COLUMNS, (6, width), seed=3)
    signs = torch.full_like(slots, 7, dtype=torch.int8)
    before = slots.clone(), signs.clone()
    wanted = oracle.lookup(COUNTS, VALUES, 5, 4, mode)
    slots, signs = slots.to(device), signs.to(device)
    out = SteeringPlan(slots[1:-1], signs[1:-1])
    named = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    moved = COUNTS.to(device), VALUES.to(device)
    plan = map_lookup(*moved, k_prompt=5, k_diff=4, mode=mode, rows=named, out=out, backend=backend)
    assert plan is out
    for row in range(4):
        expected = (
            [part[row] for part in wanted] if rows is None or row in rows else [b[row + 1].tolist() for b in before]
        )
        assert [slots[row + 1].tolist(), signs[row + 1].tolist()] == expected
    for outer in (0, -1):
        assert [slots[outer].tolist(), signs[outer].tolist()] == [b[outer].tolist() for b in before]


def test_published_defaults(backend: str) -> None:
    counts = integer_tensor(0, 9, (2, 50))
    values = (integer_tensor(-8, 9, (50, 40)) / 4).float()
    plan = run_on(backend, map_lookup, counts, values)
    assert (plan.slots.tolist(), plan.signs.tolist()) == oracle.lookup(counts, values, 32, 16, "ablate")


def test_views(backend: str) -> None:
    counts, values = COUNTS.T.contiguous().T, VALUES.repeat_interleave(2, dim=1)[:, ::2]
    assert not counts.is_contiguous() and not values.is_contiguous()
    plan = run_on(backend, map_lookup, counts, values, k_prompt=5, k_diff=4)
    assert (plan.slots.tolist(), plan.signs.tolist()) == oracle.lookup(COUNTS, VALUES, 5, 4, "ablate")


ROWS = torch.arange(4, dtype=torch.int32)
OUT = SteeringPlan(torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.int8))
VALID = {"counts": COUNTS, "values": VALUES, "k_prompt": 5, "k_diff": 4}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"values": VALUES[0]}, ("`values`", "[23]", "[d_sae_in, C]")),
        ({"values": VALUES.double()}, ("`values`", "torch.float64", "torch.float32", "values.to(")),
        ({"counts": COUNTS[:, 1:]}, ("`counts`", "[4, 30]", "[B, 31]")),
        ({"counts": COUNTS.long()}, ("`counts`", "torch.int64", "torch.int32")),
        ({"counts": COUNTS.to("meta")}, ("`counts`", "meta", "cpu", "`values`")),
        ({"k_prompt": 0}, ("`k_prompt`", "is 0", "from 1 to")),
        ({"k_prompt": 32}, ("`k_prompt`", "is 32", "31")),
        ({"k_diff": 0}, ("`k_diff`", "is 0", "from 1 to")),
        ({"k_diff": 10**9}, ("`k_diff`", "is 1000000000", "1048576")),
        ({"rows": ROWS.long(), "out": OUT}, ("`rows`", "torch.int64", "torch.int32")),
        ({"rows": ROWS[None], "out": OUT}, ("`rows`", "[1, 4]", "[n]")),
        ({"rows": ROWS.to("meta"), "out": OUT}, ("`rows`", "meta", "cpu")),
        ({"rows": ROWS}, ("`out`", "None", "the plan to write to")),
        ({"out": OUT, "mode": "both"}, ("`out`", "[4, 4]", "[4, 8]")),
        ({"out": OUT.to("meta")}, ("`out`", "meta", "cpu")),
        ({"mode": "remove"}, ("`mode`", "'remove'", "ablate, augment, both")),
        ({"backend": "gpu"}, ("`backend`", "'gpu'", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        map_lookup(**(VALID | change))
    assert all(part in str(error.value) for part in parts), error.value
