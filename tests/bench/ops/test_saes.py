"""Cases of an SAE as a module, with and without sae-lens."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.harness.cases import Case
from bench.harness.measure import DEVICE
from bench.ops import saes
from dspa_kernels import BackendError
from dspa_kernels.nn import FusedSAE
from dspa_kernels.testing import random_sae, same_bits

TINY = (64, 512)


def cases(names: Any) -> list[Case]:
    backends = {name: "triton" if name in saes.OURS else "torch" for name in names}
    return [case for name, backend in backends.items() for case in saes.cases([name], [backend], TINY)]


def test_fuse_without_sae_lens_makes_the_latents_of_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    weights = random_sae("jumprelu", 24, 64)
    fused, source = saes.module(saes.FUSED, weights, "torch")
    assert type(fused).__name__ == "FusedJumpReLUSAE" and source == {"sae_lens": "package"}
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    formula, source = saes.module(saes.FUSED, weights, "torch")
    assert isinstance(formula, saes.FormulaOfFuse) and source == {"sae_lens": "formula"}
    x = torch.randn(8, 24)
    with torch.no_grad():
        f = formula.encode(x)
        assert 0 < int((f > 0).sum()) < f.numel() and same_bits(f, fused.encode(x))


def test_only_what_of_fuse_needs_sae_lens_is_left_out_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    left_out = set()
    for case in cases((*saes.OF_SAE_LENS, saes.EAGER)):
        try:
            with case.steps() as steps:
                assert len(steps.calls) > 0
        except BackendError as error:
            assert "sae-lens is not installed" in str(error)
            left_out.add((case.op, case.name.rpartition(", ")[0]))
    assert left_out == {("SAE.decode", "fuse"), ("SAE", "fuse"), ("SAE", "fuse, sparse")}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU there are more rows")
def test_each_call_is_measured_in_both_dtypes_and_of_all_rows() -> None:
    measured = {(case.op, case.name, case.rows) for case in cases([*saes.OURS, saes.EAGER, saes.COMPILED])}
    assert measured == {
        (op, f"{name}, {dtype}", rows)
        for op in ("SAE", "SAE.encode", "SAE.decode")
        for name in ("FusedSAE", "FusedSAE, sparse", "SAELens, eager", "SAELens, compiled")
        for dtype in ("fp32", "bf16")
        for rows in (1, 8)
    }


@pytest.mark.parametrize("call", ["encode", "encode_sparse", "decode", "forward"])
def test_wrong_rows_are_not_timed(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(FusedSAE, call)

    def wrong(self: FusedSAE, x: Any) -> Any:
        out = right(self, x)
        scale = 1.1 if self.backend == "triton" else 1.0
        return replace(out, values=out.values * scale) if call == "encode_sparse" else out * scale

    monkeypatch.setattr(FusedSAE, call, wrong)
    op = {"encode_sparse": "SAE.encode", "forward": "SAE"}.get(call, f"SAE.{call}")
    name = saes.SPARSE if call == "encode_sparse" else saes.DENSE
    for case in cases([name]):
        if case.op == op and case.rows > 1:
            with case.steps() as steps, pytest.raises(AssertionError, match="rows are wrong"):
                steps.check()
