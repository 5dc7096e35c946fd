from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, lookup_and_steer, map_lookup, steer
from dspa_kernels.backends import IMPLEMENTED
from dspa_kernels.testing import KINDS, assert_as_accurate, run_on, same_bits
from dspa_kernels.weights import NORMALIZATIONS

from ..rounding import rounding
from . import oracle
from .cases import D_IN, D_SAE_IN, DTYPES, MARGIN, N_PROMPTS, PER_PLAN, ROUNDINGS, VIEWS, integer_tensor, make_case

LOOKUP = {"k_prompt": 5, "k_diff": 4}


def make_arguments(**case: Any) -> dict[str, Any]:
    """Everything but k_prompt, k_diff, mode and alpha; the last prompt has no active latent."""
    arguments = make_case(**case).arguments()
    del arguments["plan"]
    counts = integer_tensor(0, 4, (N_PROMPTS, D_SAE_IN))
    counts[-1] = 0
    return arguments | {"counts": counts}


@pytest.mark.parametrize("alpha", [0.5, 1, PER_PLAN], ids=repr)
@pytest.mark.parametrize("mode", ["ablate", "augment", "both"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], mode: str, alpha: float | Tensor
) -> None:
    arguments = make_arguments(kind=kind, dtypes=dtypes, integers=True)
    out, plan, edits = run_on(backend, lookup_and_steer, **arguments, **LOOKUP, mode=mode, alpha=alpha)
    counts, cdmap = arguments.pop("counts"), arguments["cdmap"]
    assert (plan.slots.tolist(), plan.signs.tolist()) == oracle.lookup(counts, cdmap.values, **LOOKUP, mode=mode)
    exact, before, after, maximum = oracle.steer(**arguments, plan=plan, alpha=alpha)
    assert torch.equal(out, exact.to(out.dtype)) and out.dtype == dtypes[0]
    assert torch.equal(edits.before.double(), before)
    assert torch.equal(edits.after.double(), after)
    assert torch.equal(edits.maximum.double(), maximum)
    unedited = (before == after).all(dim=1)
    assert not unedited.all() and same_bits(out[unedited], arguments["h"][unedited])


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(backend: str, kind: str, normalize: str) -> None:
    arguments = make_arguments(kind=kind, normalize=normalize)
    assert oracle.margin(arguments["h"], arguments["sae"]) > MARGIN
    out, plan, edits = run_on(backend, lookup_and_steer, **arguments, **LOOKUP, mode="both")
    del arguments["counts"]
    exact = oracle.steer(**arguments, plan=plan, alpha=0.2)
    plain = oracle.steer(**arguments, plan=plan, alpha=0.2, dtype=oracle.plain_dtype(out, arguments["sae"]))
    for actual, like, wanted in zip((out, edits.before, edits.after, edits.maximum), plain, exact, strict=True):
        assert_as_accurate(actual, like, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_two_ops(backend: str, kind: str) -> None:
    arguments = make_arguments(kind=kind, dtypes=DTYPES[1], integers=True)
    out, plan, edits = run_on(backend, lookup_and_steer, **arguments, **LOOKUP)
    counts = arguments.pop("counts")
    looked_up_by = backend if ("map_lookup", backend) in IMPLEMENTED else "reference"
    expected_plan = run_on(looked_up_by, map_lookup, counts, arguments["cdmap"].values, **LOOKUP)
    expected, expected_edits = run_on(backend, steer, **arguments, plan=expected_plan, record=True)
    assert torch.equal(plan.slots, expected_plan.slots) and torch.equal(plan.signs, expected_plan.signs)
    assert same_bits(out, expected)
    for name in ("before", "after", "maximum"):
        assert same_bits(getattr(edits, name), getattr(expected_edits, name))


@pytest.mark.parametrize("n_columns", [0, 23])
@pytest.mark.parametrize("n_prompts", [0, 1])
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows_prompts_and_columns(backend: str, n: int, n_prompts: int, n_columns: int) -> None:
    arguments = make_arguments(n=n, n_columns=n_columns)
    arguments["counts"] = arguments["counts"][:n_prompts]
    arguments["rows"] = torch.full((n,), n_prompts - 1, dtype=torch.int32)
    out, plan, edits = run_on(backend, lookup_and_steer, **arguments, **LOOKUP)
    assert plan.slots.shape == (n_prompts, 4) and edits.before.shape == (n, 4)
    expected = oracle.steer(
        **{name: value for name, value in arguments.items() if name != "counts"}, plan=plan, alpha=0.2
    )
    atol = rounding(ROUNDINGS, D_IN**0.5 * float(expected[0].abs().max())) if n else 0
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=atol)


def test_nothing_selected_changes_no_bit(backend: str) -> None:
    arguments = make_arguments(dtypes=DTYPES[1])
    arguments["counts"].zero_()
    arguments["h"][arguments["h"].abs() < 0.5] = -0.0
    out, plan, edits = run_on(backend, lookup_and_steer, **arguments, **LOOKUP)
    assert same_bits(out, arguments["h"])
    assert (plan.slots == -1).all() and not plan.signs.any()
    assert not edits.maximum.any()


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    arguments = make_arguments(dtypes=DTYPES[1], integers=True)
    viewed = arguments | {
        "h": VIEWS[view](arguments["h"]),
        "counts": arguments["counts"].T.contiguous().T,
        "rows": arguments["rows"].repeat_interleave(2)[::2],
    }
    out, _, _ = run_on(backend, lookup_and_steer, **viewed, **LOOKUP)
    assert same_bits(out, run_on(backend, lookup_and_steer, **arguments, **LOOKUP)[0])


VALID = make_arguments(n=11)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": torch.zeros(11, 20)}, ("`h`", "[11, 20]", "[N, 19]")),
        ({"counts": torch.zeros(3, 30, dtype=torch.int32)}, ("`counts`", "[3, 30]", "[B, 31]")),
        ({"counts": torch.zeros(3, 31)}, ("`counts`", "torch.float32", "torch.int32")),
        ({"cdmap": make_case().cdmap.to("meta")}, ("`counts`", "cpu", "meta", "`values`")),
        ({"sae": make_case().sae.to("meta")}, ("`sae`", "meta", "cpu")),
        ({"rows": torch.zeros(11)}, ("`rows`", "torch.float32", "torch.int32")),
        ({"k_prompt": 99}, ("`k_prompt`", "99", "31")),
        ({"k_diff": 0}, ("`k_diff`", "is 0", "from 1 to")),
        ({"mode": "none"}, ("`mode`", "'none'", "ablate, augment, both")),
        ({"alpha": -1.0}, ("`alpha`", "-1.0", "finite number >= 0")),
        ({"backend": "cpu"}, ("`backend`", "'cpu'", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        lookup_and_steer(**(VALID | LOOKUP | change))
    assert all(part in str(error.value) for part in parts), error.value
