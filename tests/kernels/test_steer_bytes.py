"""Bytes that `steer` reads on each path, counted load by load in the interpreter, compared with what it should read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa_kernels import EncoderStream, MapWeights, SAEWeights, SteeringPlan, steer
from dspa_kernels.launch import FULL, Launch, table
from dspa_kernels.ops.steer import triton_impl
from dspa_kernels.testing import random_sae

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="loads are counted in Triton's interpreter"
)
D_IN, D_SAE, N_SLOTS, N_LARGE = 48, 150, 4, 8


@dataclass
class Loads:
    """Addresses loaded, with repetition."""

    seen: list[Any] = field(default_factory=list)

    def of(self, tensor: Tensor) -> int:
        """Bytes loaded from a tensor."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = sum(int(((addresses >= first) & (addresses < last)).sum()) for addresses in self.seen)
        return inside * tensor.element_size()


@contextmanager
def counted() -> Iterator[Loads]:
    from triton.runtime.interpreter import InterpreterBuilder

    loads, load = Loads(), InterpreterBuilder.create_masked_load

    def counting(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        loads.seen.append(np.broadcast_to(ptrs.data, np.shape(mask.data))[np.asarray(mask.data, bool)].ravel())
        return load(self, ptrs, mask, *rest)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", counting):
        yield loads


def settled_or_not(n: int, value: float) -> dict[str, Any]:
    """n rows whose selected latents 0..3 are `value` and whose largest latent, 9, is 5: settled up to 1."""
    W = torch.zeros(D_SAE, D_IN, dtype=torch.bfloat16)
    W[torch.arange(40), torch.arange(40)] = 1
    h = torch.zeros(n, D_IN, dtype=torch.bfloat16)
    h[:, :N_SLOTS] = value
    h[:, 9] = 5
    sae = SAEWeights(W, torch.zeros(D_SAE), torch.zeros(D_SAE), W.clone())
    plan = SteeringPlan(
        torch.arange(N_SLOTS, dtype=torch.int32).expand(n, -1).contiguous(),
        torch.full((n, N_SLOTS), -1, dtype=torch.int8),
    )
    return {"h": h, "sae": sae, "cdmap": MapWeights.gather(torch.arange(20), torch.zeros(1, 20), sae), "plan": plan}


def hot(sae: SAEWeights, screen: str = "none") -> EncoderStream:
    return EncoderStream.of(sae, hot=torch.arange(9, 9 + N_LARGE), n_large=N_LARGE, screen=screen)


ROW = D_IN * 2  # bytes of one row in bf16


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("value", "streams"), [(-1.0, False), (1.0, False), (1.5, True)])
def test_an_encoder_is_read_once_or_not_at_all(n: int, value: float, streams: bool) -> None:
    arguments = settled_or_not(n, value)
    stream = hot(arguments["sae"])
    with counted() as loads:
        steer(**arguments, stream=stream, backend="triton")
    # For all rows together.
    assert loads.of(stream.encoder_rows) == (N_LARGE + streams * D_SAE) * ROW
    assert loads.of(arguments["cdmap"].encoder_rows) == n * N_SLOTS * ROW
    changed = 0 if value < 0 else n * N_SLOTS
    assert loads.of(arguments["cdmap"].W_dec) == changed * ROW
    assert loads.of(arguments["sae"].W_dec) == loads.of(arguments["sae"].encoder_rows) == 0


@pytest.mark.parametrize("n", [1, 33, 64])
def test_a_screened_stream_reads_five_bits_a_number_and_few_rows(n: int) -> None:
    arguments = settled_or_not(n, 1.5)
    stream, paths = hot(arguments["sae"], "int5"), torch.zeros(6, dtype=torch.int64)
    assert stream.screen_rows is not None and stream.screen_latents is not None
    with counted() as loads:
        steer(**arguments, stream=stream, paths=paths, backend="triton")
    read = int(paths[-1])
    # A block of each row, once for all rows together.
    assert loads.of(stream.screen_rows) == D_SAE * 160
    assert loads.of(stream.screen_latents) == D_SAE * 5 * 4
    # Large latents are evaluated for 16 rows at a time where phases are launches of their own.
    assert loads.of(stream.encoder_rows) == (-(-n // 16) * N_LARGE + read) * ROW and read < D_SAE / 10
    assert loads.of(arguments["sae"].encoder_rows) == 0


@pytest.mark.parametrize("BLOCK_N", [64, 128])
def test_more_than_64_rows_read_the_encoder_instead_of_a_screen(BLOCK_N: int) -> None:
    arguments = settled_or_not(70, 1.5)
    stream = hot(arguments["sae"], "int5")
    assert stream.screen_rows is not None
    wide = Launch(BLOCK_N=BLOCK_N, BLOCK_L=64, BLOCK_K=32, num_stages=2)
    with counted() as loads, mock.patch.object(triton_impl, "launch_parameters", lambda *_: wide):
        steer(**arguments, stream=stream, backend="triton")
    assert loads.of(stream.screen_rows) == 0 and loads.of(stream.encoder_rows) >= D_SAE * ROW


def test_products_in_fp32_read_the_encoder_instead_of_a_screen() -> None:
    arguments = settled_or_not(1, 1.5)
    arguments["h"] = arguments["h"].half()
    sae = random_sae("relu", D_IN, D_SAE, dtype=torch.float16)
    arguments["sae"] = replace(sae, encoder_rows=arguments["sae"].encoder_rows.half())
    arguments["cdmap"] = MapWeights.gather(torch.arange(20), torch.zeros(1, 20), arguments["sae"])
    for dtype, screened in ((torch.float16, True), (torch.float32, False)):
        arguments["h"] = arguments["h"].to(dtype)
        stream = hot(arguments["sae"], "int5")
        assert stream.screen_rows is not None
        with counted() as loads:
            steer(**arguments, stream=stream, backend="triton")
        assert (loads.of(stream.screen_rows) > 0) == screened


def test_many_rows_read_each_tile_for_every_block_of_rows() -> None:
    """More rows than a tile holds: the tiles come again, one right after the other, from the cache."""
    arguments, n = settled_or_not(70, 1.5), 70
    narrow = Launch(BLOCK_N=32, BLOCK_L=64, BLOCK_K=32, num_warps=4, num_stages=2, programs=1)
    with counted() as loads, mock.patch.object(triton_impl, "launch_parameters", lambda *_: narrow):
        steer(**arguments, backend="triton")
    assert loads.of(arguments["sae"].encoder_rows) == -(-n // narrow.BLOCK_N) * D_SAE * ROW


def test_up_to_64_rows_of_16_bits_are_one_block_on_hopper() -> None:
    """Then a step costs one read of the encoder: 75.5, 117 and 537 MB at the published shapes, in bf16."""
    for entry in table():
        if entry.capability == 90 and entry.precision < FULL and entry.rows and entry.kernel.startswith("steer"):
            assert entry.rows <= entry.launch.BLOCK_N, entry
    shapes = {(2304, 16384): 75.5, (3584, 16384): 117, (4096, 65536): 537}
    for (d_in, d_sae), megabytes in shapes.items():
        assert d_in * d_sae * 2 / 1e6 == pytest.approx(megabytes, rel=0.005)
