"""What tests/ and bench/ share: random weights, maps and plans, running an op on a backend, comparing results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dspa_kernels.weights import MapWeights, SAEWeights, SteeringPlan

# The backends that the tests of every op run on. All but "reference" need a GPU.
BACKENDS: tuple[str, ...] = ("reference",)
KINDS = ("relu", "jumprelu", "topk")


def random_sae(
    kind: str,
    d_in: int,
    d_sae: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    normalize: str = "none",
    k: int | None = None,
    integers: bool = False,
) -> SAEWeights:
    """An SAE of `kind` in KINDS: unit decoder rows, and encoder rows near them.

    On standard normal rows about half (relu), a quarter (jumprelu) or `k`, by default `d_sae / 8` (topk), of
    the latents are active.

    `integers` draws small integers for all weights instead: on small integer rows every sum is exact, in any
    order and dtype, and ties and `pre = threshold` abound, so that results have to be equal bit for bit.

    Shapes: W_enc, W_dec [d_sae, d_in] in `dtype`; b_enc, threshold [d_sae] fp32 (fp64 for fp64).
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    g = torch.Generator().manual_seed(seed)
    if integers:
        W_enc, W_dec = torch.randint(-2, 3, (2, d_sae, d_in), generator=g).double()
        b_enc = torch.randint(-1, 2, (d_sae,), generator=g).double()
        threshold = torch.randint(-1, 6, (d_sae,), generator=g).double()
    else:
        W_dec = torch.randn(d_sae, d_in, generator=g, dtype=torch.float64)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        W_enc = W_dec + 0.1 * torch.randn(d_sae, d_in, generator=g) / d_in**0.5
        b_enc = 0.1 * torch.randn(d_sae, generator=g)
        threshold = 0.2 + torch.rand(d_sae, generator=g)
    full = torch.promote_types(dtype, torch.float32)
    return SAEWeights(
        W_enc=W_enc.to(dtype),
        b_enc=b_enc.to(full),
        threshold=(threshold if kind == "jumprelu" else torch.zeros(d_sae)).to(full),
        W_dec=W_dec.to(dtype),
        k=(k or max(1, d_sae // 8)) if kind == "topk" else 0,
        normalize=normalize,
    )


def random_map(sae: SAEWeights, d_sae_in: int, n_columns: int, seed: int = 0) -> MapWeights:
    """A map from `d_sae_in` latents to `n_columns` random latents of `sae`, with values [d_sae_in, C]."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(sae.d_sae, generator=g)[:n_columns].sort().values
    return MapWeights.gather(columns, torch.randn(d_sae_in, n_columns, generator=g), sae)


def random_plan(n_prompts: int, n_slots: int, n_columns: int, *, mode: str = "both", seed: int = 0) -> SteeringPlan:
    """A plan of slots and signs [n_prompts, n_slots]: distinct columns a row, about a quarter left empty."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(n_prompts, max(n_columns, n_slots), generator=g).argsort(dim=1)[:, :n_slots]
    empty = (order >= n_columns) | (torch.rand(order.shape, generator=g) < 0.25)
    signs = {"ablate": -torch.ones(order.shape), "augment": torch.ones(order.shape)}
    signs["both"] = torch.randint(0, 2, order.shape, generator=g) * 2.0 - 1
    return SteeringPlan(
        slots=torch.where(empty, -1, order).to(torch.int32),
        signs=torch.where(empty, 0, signs[mode]).to(torch.int8),
    )


def run_on(backend: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`op(*args, **kwargs)` on `backend`: inputs go to its device (views stay views), results come back.

    Raises if the op changed an input.
    """
    device = "cpu" if backend == "reference" else "cuda"
    args, kwargs = _moved(args, device), {name: _moved(value, device) for name, value in kwargs.items()}
    inputs = tensors((args, kwargs))
    before = [each.clone() for each in inputs]
    result = op(*args, **kwargs, backend=backend)
    assert all(same_bits(now, then) for now, then in zip(inputs, before, strict=True)), "an input changed"
    return _moved(result, "cpu")


def tensors(value: Any) -> list[Tensor]:
    """All tensors in arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in tensors(item)] if isinstance(value, (list, tuple)) else []


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        # `.to` alone would make a strided view contiguous on its way.
        storage = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_moved(getattr(value, each.name), device) for each in fields(value)))
    return value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit: a NaN equals itself, -0.0 differs from 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8) if values.dim() and values.numel() else values


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise unless `actual` is about as near to `exact` (fp64) as `plain`, a plain computation in its dtype.

    About: at most twice its largest error, and 16 units in the last place of the largest value, in which the
    order of a sum of few terms may show. NaNs have to be at the same places.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.equal(actual.isnan(), exact.isnan())
    if not actual.numel():
        return
    exact = exact.nan_to_num()
    error, allowed = ((each.double().nan_to_num() - exact).abs().max() for each in (actual, plain))
    unit = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps * exact.abs().max()
    assert error <= 2 * allowed + 16 * unit, f"error {error:.3g}, of a plain computation {allowed:.3g}"
