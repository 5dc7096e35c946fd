"""Which calls PyTorch sees as a custom op: all that something intercepts, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

from dspa_kernels import EncoderStream, backends, steer
from dspa_kernels.testing import same_bits

from .cases import make_case

CASE = make_case(integers=True)
Transform = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


def edit(h: Tensor) -> Tensor:
    return steer(**CASE.arguments(h=h))


EXPECTED = edit(CASE.h)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The custom ops that are called from now on."""
    names, call = [], CustomOpDef.__call__

    def counted(self: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        names.append(self._qualname)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(CustomOpDef, "__call__", counted)
    return names


@pytest.mark.parametrize("gradients", [False, True])
def test_a_plain_call_is_not_dispatched(dispatched: list[str], gradients: bool) -> None:
    """Parameters are plain tensors, too, where they get no gradient."""
    with torch.set_grad_enabled(gradients):
        assert same_bits(edit(CASE.h), EXPECTED)
        assert same_bits(edit(Parameter(CASE.h, requires_grad=False)), EXPECTED)
    with torch.no_grad():
        assert same_bits(edit(Parameter(CASE.h)), EXPECTED)
    assert dispatched == []


@pytest.mark.parametrize("alpha", [1, True, np.float32(1), np.int64(1), torch.tensor(1.0)], ids=repr)
def test_plain_calls_convert_numbers_as_the_dispatcher_does(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    received: dict[str, Any] = {}
    implementation = backends.implementation

    def observed(op: str, backend: str) -> Callable[..., Any]:
        return lambda **arguments: received.update(arguments) or implementation(op, backend)(**arguments)

    monkeypatch.setattr(backends, "implementation", observed)
    case = make_case("topk", integers=True)
    sae: Any = replace(case.sae, k=np.int64(4))
    stream = EncoderStream.of(sae, hot=torch.arange(9), n_large=np.int64(5))
    steer(**case.arguments(sae=sae, stream=stream, alpha=alpha, record=np.bool_(True)))
    assert [type(received[name]) for name in ("k", "n_large", "alpha", "record")] == [int, int, float, bool]
    assert received["k"] == 4 and received["n_large"] == 5 and received["alpha"] == 1


def test_a_gradient_is_dispatched(dispatched: list[str]) -> None:
    assert edit(Parameter(CASE.h)).requires_grad and dispatched == ["dspa::steer"]


class Subclass(Tensor):
    pass


def test_a_subclass_is_dispatched(dispatched: list[str]) -> None:
    assert same_bits(edit(CASE.h.as_subclass(Subclass)).as_subclass(Tensor), EXPECTED)
    assert dispatched == ["dspa::steer"]


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
def test_transformations_without_a_rule_refuse_the_op(transform: Transform) -> None:
    with pytest.raises(RuntimeError, match="dspa::steer"):
        transform(edit)(CASE.h if transform is torch.func.functionalize else CASE.h[None])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traces_have_the_op(mode: str, pre_dispatch: bool) -> None:
    graph = make_fx(edit, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(CASE.h)
    assert torch.ops.dspa.steer.default in [node.target for node in graph.graph.nodes]
    assert same_bits(graph(CASE.h), EXPECTED)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_trace_has_the_op() -> None:
    assert "dspa::steer" in str(torch.jit.trace(edit, CASE.h).graph)  # type: ignore[no-untyped-call]


def test_a_fake_tensor_is_dispatched_outside_of_its_mode(dispatched: list[str]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert edit(mode.from_tensor(CASE.h)).shape == CASE.h.shape and dispatched == ["dspa::steer"]


def test_meta_tensors_are_dispatched(dispatched: list[str]) -> None:
    arguments = CASE.arguments()
    moved = {name: value.to("meta") if hasattr(value, "to") else value for name, value in arguments.items()}
    assert steer(**moved).is_meta and dispatched == ["dspa::steer"]


def test_what_is_written_to_has_a_new_version() -> None:
    paths = torch.zeros(6, dtype=torch.int64)
    doubled = torch.zeros(6, requires_grad=True) * paths
    steer(**CASE.arguments(), paths=paths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        doubled.sum().backward()
