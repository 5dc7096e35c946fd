"""`map_lookup`: the output latents that each prompt steers, from its active latents."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_contiguous, check_device, check_dtype, check_shape, refuse
from dspa_kernels.weights import SteeringPlan, check_k

MODES = ("ablate", "augment", "both")
# The width of the widest SAEs. A plan has as many slots, used or not.
MAX_K_DIFF = 1 << 20


def map_lookup(
    counts: Tensor,
    values: Tensor,
    *,
    k_prompt: int = 32,
    k_diff: int = 16,
    mode: str = "ablate",
    rows: Tensor | None = None,
    out: SteeringPlan | None = None,
    backend: str = "auto",
) -> SteeringPlan:
    """Choose the latents that each prompt steers (DSPA, online steps 1 to 3).

    Scores are the sum of the map's rows for the `k_prompt` most frequent prompt latents. Among equal counts the smaller
    index comes first, and a count of 0 never enters. The `k_diff` largest scores augment, if positive, and the
    `k_diff` smallest ablate, if negative.

    Args:
        counts: [B, d_sae_in] int32, the `activation_counts` of the prompts.
        values: [d_sae_in, C] fp32, the map at its columns.
        k_prompt: number of prompt latents (published: 32).
        k_diff: number of latents to augment, and to ablate (published: 16), up to 2**20.
        mode: "ablate", "augment" or "both". It holds for all prompts. Where requests differ, plan "both" and clear the
            signs and slots of the half that a request does not use: the first `k_diff` slots augment.
        rows: [n] int32, with `out`: the prompts to plan in this call, -1 for none. No prompt may come twice. Nothing is
            read on the host, and kernels do not check that a row is below B.
        out: the plan of B rows to write to, contiguous. Those that `rows` does not name stay as they are. By default a
            new plan of all prompts.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        A plan of B rows and `k_diff` slots, or `2 k_diff` for "both", augmenting ones first, which is `out` if
        it was passed. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype, device or value.
        BackendError: the named backend cannot run.
    """
    check_lookup(counts, values, k_prompt, k_diff, mode)
    chosen = choose("map_lookup", counts.device, backend)
    shape = (len(counts), n_slots(k_diff, mode))
    if rows is not None:
        check_shape("rows", rows, ("n",))
        check_dtype("rows", rows, (torch.int32,))
        check_device("rows", rows, counts, "counts")
        if out is None:
            raise refuse("out", None, "the plan to write to, with `rows`", "Pass a plan, or leave `rows` out.")
    if out is None:
        out = SteeringPlan(counts.new_empty(shape), counts.new_empty(shape, dtype=torch.int8))
    check_shape("out", out.slots, shape)
    check_device("out", out.slots, counts, "counts")
    check_contiguous("out.slots", out.slots, "Pass a plan of its own.")
    check_contiguous("out.signs", out.signs, "Pass a plan of its own.")
    _map_lookup(
        counts=counts,
        values=values,
        rows=rows,
        k_prompt=k_prompt,
        k_diff=k_diff,
        lookup_mode=mode,
        slots=out.slots,
        signs=out.signs,
        backend=chosen,
    )
    return out


def check_lookup(counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, mode: str) -> None:
    """Raise `InputError` unless the arguments of a lookup fit each other."""
    check_shape("values", values, ("d_sae_in", "C"))
    check_dtype("values", values, (torch.float32,))
    check_shape("counts", counts, ("B", values.shape[0]))
    check_dtype("counts", counts, (torch.int32,))
    check_device("counts", counts, values, "values")
    check_k("k_prompt", k_prompt, values.shape[0])
    check_k("k_diff", k_diff, MAX_K_DIFF)
    if mode not in MODES:
        raise refuse("mode", repr(mode), ", ".join(MODES))


def n_slots(k_diff: int, mode: str) -> int:
    """Return the number of slots in a row of a plan."""
    return 2 * k_diff if mode == "both" else k_diff


def _fake(**_: object) -> None:
    return None


_map_lookup = define_op(
    "map_lookup",
    "(Tensor counts, Tensor values, Tensor? rows, int k_prompt, int k_diff, str lookup_mode, Tensor(a!) slots,"
    " Tensor(b!) signs) -> ()",
    _fake,
    mutates=("slots", "signs"),
)
