"""What holds for every op: its contract with torch, inputs left alone, and no dense [N, d_sae]."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspa_kernels import (
    SteeringPlan,
    activation_bits,
    activation_counts,
    activation_sums,
    bit_counts,
    formulas,
    fsrl_residual,
    lookup_and_steer,
    map_lookup,
    n_words,
    place_tokens,
    sparse_decode,
    sparse_encode,
    steer,
    steer_,
)
from dspa_kernels.backends import OPS, implementation
from dspa_kernels.testing import KINDS, run_on, same_bits, tensors

from .cases import BF16, D_IN, D_SAE, D_SAE_IN, N_COLUMNS, N_PROMPTS, PER_PLAN, Case, integer_tensor, make_case
from .test_place_tokens import placing

CASE = make_case()
# They have no results but what they are given to write to.
IN_PLACE = ("activation_bits", "bit_counts", "place_tokens")
Call = tuple[Callable[..., Any], dict[str, Any]]


def calls(case: Case) -> dict[str, Call]:
    """One call of every public op, by its name."""
    counts = integer_tensor(0, 4, (N_PROMPTS, D_SAE_IN))
    latents = sparse_encode(case.h, case.sae, capacity=D_SAE, backend="reference")
    lookup = {"counts": counts, "k_prompt": 5, "k_diff": 3}
    residual = case.arguments()
    del residual["plan"]
    of_op: dict[str, Call] = {
        "activation_counts": (
            activation_counts,
            {"h": case.h, "sae": case.sae, "sequences": case.rows, "n_sequences": N_PROMPTS},
        ),
        "activation_sums": (
            activation_sums,
            {"h": case.h, "sae": case.sae, "sequences": case.rows, "n_sequences": N_PROMPTS},
        ),
        "activation_bits": (
            activation_bits,
            {
                "h": case.h,
                "sae": case.sae,
                "slots": torch.arange(len(case.h)).flip(0) - 1,
                "out": integer_tensor(0, 99, (len(case.h), n_words(D_SAE))),
            },
        ),
        "bit_counts": (
            bit_counts,
            {
                "bits": integer_tensor(-(2**31), 2**31 - 1, (9, n_words(D_SAE))),
                "blocks": integer_tensor(0, 3, (N_PROMPTS, 2)),
                "block_size": 3,
                "n_tokens": torch.arange(N_PROMPTS),
                "rows": torch.arange(N_PROMPTS, dtype=torch.int32) - 1,
                "out": counts.repeat(1, D_SAE)[:, :D_SAE].contiguous(),
            },
        ),
        "map_lookup": (map_lookup, {**lookup, "values": case.cdmap.values}),
        "steer": (steer, case.arguments(record=True)),
        "lookup_and_steer": (lookup_and_steer, {**lookup, **residual}),
        "sparse_encode": (sparse_encode, {"h": case.h, "sae": case.sae, "capacity": D_SAE}),
        "sparse_decode": (sparse_decode, {"latents": latents, "W_dec": case.sae.W_dec}),
        "fsrl_residual": (
            fsrl_residual,
            {
                "h": case.h,
                "sae": case.sae,
                "W_a": case.sae.W_dec.flip(0),
                "b_a": case.sae.b_enc.flip(0),
                "threshold": case.sae.threshold.abs(),
                "fraction": 0.5,
            },
        ),
        "place_tokens": (place_tokens, placing()),
    }
    assert tuple(of_op) == OPS
    return of_op


def options(case: Case) -> dict[str, dict[str, Any]]:
    """Optional tensors of ops, by the op's name."""
    counts = integer_tensor(0, 9, (N_PROMPTS, D_SAE))
    slots = torch.zeros(N_PROMPTS, 3, dtype=torch.int32)
    plan = SteeringPlan(slots, slots.to(torch.int8))
    return {
        "activation_counts": {"out": counts, "accumulate": True},
        "activation_sums": {"out": counts.float(), "accumulate": True},
        "map_lookup": {"rows": torch.tensor([1, -1], dtype=torch.int32), "out": plan},
        "steer": {"alpha": PER_PLAN},
        "lookup_and_steer": {"alpha": PER_PLAN},
        "fsrl_residual": {"rows": torch.arange(len(case.h)) % 2 == 0},
    }


class Recorded(TorchDispatchMode):
    """The call of a custom op of this package, and the largest tensor that any op made."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dspa":
            self.call = (func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        # A view of an input is no memory.
        made = [tensor for tensor in tensors(result) if not tensor._is_view()]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result


def recorded(function: Callable[..., Any], **arguments: Any) -> Recorded:
    with Recorded() as record:
        function(**arguments)
    return record


@pytest.mark.parametrize(("kind", "dtype"), [("jumprelu", torch.float32), ("topk", torch.bfloat16)])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, kind: str, dtype: torch.dtype) -> None:
    function, arguments = calls(make_case(kind, (dtype, dtype)))[op]
    call = recorded(function, **arguments).call
    assert call is not None
    func, args, kwargs = call
    assert func is getattr(torch.ops.dspa, op).default
    torch.library.opcheck(func, args, kwargs)


def in_place(residual: Tensor | None) -> dict[str, Any]:
    """Arguments of `steer_`, which returns nothing."""
    return make_case(integers=True).arguments(residual=residual, paths=torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("residual", [None, torch.ones(8, D_IN)])
def test_opcheck_in_place(residual: Tensor | None) -> None:
    call = recorded(steer_, **in_place(residual)).call
    assert call is not None and call[0] is torch.ops.dspa.steer_.default
    torch.library.opcheck(*call)


@pytest.mark.parametrize("residual", [None, torch.ones(8, D_IN)])
@pytest.mark.parametrize("mode", ["compiled", "inference", "autocast"])
def test_in_place_is_eager(mode: str, residual: Tensor | None) -> None:
    arguments, expected = copy.deepcopy(in_place(residual)), copy.deepcopy(in_place(residual))
    steer_(**expected)
    assert not same_bits(expected["h"], arguments["h"])
    if mode == "compiled":
        torch._dynamo.reset()
        torch.compile(lambda: steer_(**arguments), fullgraph=True)()
    else:
        with torch.inference_mode() if mode == "inference" else torch.autocast("cpu", torch.bfloat16):
            steer_(**arguments)
    assert all(same_bits(*pair) for pair in zip(tensors(arguments), tensors(expected), strict=True))


@pytest.mark.parametrize("op", options(CASE))
def test_opcheck_with_options(op: str) -> None:
    case = make_case()
    function, arguments = calls(case)[op]
    call = recorded(function, **arguments | options(case)[op]).call
    assert call is not None
    torch.library.opcheck(*call)


@pytest.mark.parametrize(("op", "with_options"), [*((op, False) for op in OPS), *((op, True) for op in options(CASE))])
def test_compiled_is_eager(op: str, with_options: bool) -> None:
    case = make_case("topk", (torch.bfloat16, torch.bfloat16), integers=True)
    function, arguments = calls(case)[op]
    if with_options:
        arguments |= options(case)[op]
    expected = tensors(function(**copy.deepcopy(arguments)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: function(**arguments), fullgraph=True)
    for ours, eager in zip(tensors(compiled()), expected, strict=True):
        assert same_bits(ours, eager)


def test_compiled_with_neighbours_and_other_numbers_of_rows() -> None:
    torch._dynamo.reset()
    case = make_case(integers=True)

    def layer(h: Tensor, rows: Tensor) -> Tensor:
        return 2 * steer(2 * h, case.sae, case.cdmap, case.plan, rows)

    # Inductor would call a C++ compiler for the neighbours, for most of a minute.
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (11, 4, 7):
        assert same_bits(compiled(case.h[:n], case.rows[:n]), layer(case.h[:n], case.rows[:n]))


def differentiable() -> Case:
    case = make_case()
    case.h.requires_grad_()
    case.sae.W_dec.requires_grad_()
    return case


@pytest.mark.parametrize("op", ["steer", "lookup_and_steer", "sparse_encode", "sparse_decode"])
def test_backward_raises(op: str) -> None:
    case = differentiable()
    function, arguments = calls(case)[op]
    message = r"gradients with dspa_kernels\.fuse" if op.startswith("sparse") else "no autograd formula was registered"
    for result in tensors(function(**arguments)):
        if result.is_floating_point():
            with pytest.raises(RuntimeError, match=message):
                result.sum().backward()
    assert case.h.grad is None and case.sae.W_dec.grad is None


def test_backward_raises_beside_another_path_and_without_edits() -> None:
    case = differentiable()
    steered = steer(**case.arguments(rows=torch.full_like(case.rows, -1)))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (case.h + steered).sum().backward()


@pytest.mark.parametrize("op", ["activation_counts", "activation_sums"])
def test_totals_have_no_gradient(op: str) -> None:
    function, arguments = calls(differentiable())[op]
    assert not function(**arguments).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_runs_in_inference_mode(op: str) -> None:
    function, arguments = calls(make_case(integers=True))[op]
    expected = tensors(function(**arguments))
    with torch.inference_mode():
        results = tensors(function(**arguments))
    assert all(same_bits(ours, other) for ours, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str) -> None:
    function, arguments = calls(make_case())[op]
    expected = tensors(function(**arguments))
    with torch.autocast("cpu", torch.bfloat16):
        results = tensors(function(**arguments))
    assert all(same_bits(ours, other) for ours, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", [op for op in OPS if op not in IN_PLACE])
def test_inputs_stay_and_outputs_are_new(backend: str, op: str, kind: str) -> None:
    function, arguments = calls(make_case(kind, BF16))[op]
    outputs = tensors(run_on(backend, function, **arguments))  # raises if an input changed
    ours = {tensor.untyped_storage().data_ptr() for tensor in tensors(arguments)}
    assert outputs and not ours & {tensor.untyped_storage().data_ptr() for tensor in outputs}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "op", ["activation_counts", "activation_sums", "steer", "lookup_and_steer", "sparse_encode", "fsrl_residual"]
)
def test_no_dense_latents(monkeypatch: pytest.MonkeyPatch, op: str, kind: str) -> None:
    """Blocks change no result, and nothing of the size [N, d_sae] is made."""
    n = 300
    case = make_case(kind, n=n, integers=True)
    function, arguments = calls(replace(case, rows=case.rows.remainder(2)))[op]
    if op == "sparse_encode":
        arguments["capacity"] = 20
    whole = tensors(function(**arguments, backend="reference"))
    run = recorded(function, **arguments, backend="reference")
    assert run.call is not None
    names = [argument.name for argument in run.call[0]._schema.arguments]
    inner = dict(zip(names, run.call[1], strict=False)) | run.call[2]
    del inner["backend"]

    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 1000)
    blocked = tensors(function(**arguments, backend="reference"))
    assert all(same_bits(ours, other) for ours, other in zip(blocked, whole, strict=True))
    # Rows of h, changes of the map's columns and sparse results may be held; pre-activations may not.
    most = n * max(D_IN, N_COLUMNS, 20)
    assert recorded(implementation(op, "reference"), **inner).largest <= most < n * D_SAE / 2
    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 1 << 24)
    assert recorded(implementation(op, "reference"), **inner).largest > most, "the meter sees nothing"
