"""The formulations that the kernels are compared with."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from bench.ops.dense import SAELensFormula, sae_lens
from dspa_kernels.testing import random_sae


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_sae_lens_is_that_of_the_package(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae = random_sae("jumprelu", 24, 64, dtype=dtype)
    theirs, source = sae_lens(sae)
    assert source == "package"

    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sae_lens":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ours, source = sae_lens(sae)
    assert source == "formula" and isinstance(ours, SAELensFormula)
    h = torch.randn(8, 24).to(dtype)
    f = theirs.encode(h)
    assert 0 < int((f > 0).sum()) < f.numel()
    assert torch.equal(ours.encode(h), f) and torch.equal(ours.decode(f), theirs.decode(f))
