"""Cooperative launches where fewer programs run at the same time than the device has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from dspa_kernels import fsrl_residual
from dspa_kernels.ops.fsrl_residual import triton_impl
from dspa_kernels.ops.shared import triton_grid
from dspa_kernels.ops.shared.triton_grid import launch_cooperative
from dspa_kernels.testing import random_sae, same_bits

REFUSAL = "Triton Error [CUDA]: too many blocks in cooperative launch"


class PartitionedKernel:
    """A kernel for streams on which only some programs run at the same time, with the grids that were tried."""

    def __init__(self, fits: int, kernel: Any = None) -> None:
        self.fits, self.kernel = fits, kernel
        self.grids: list[int] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda **arguments: self.launch(*grid, **arguments)

    def launch(self, programs: int, **arguments: Any) -> None:
        assert arguments["n_programs"] == programs and arguments["launch_cooperative_grid"]
        self.grids.append(programs)
        if programs > self.fits:
            raise RuntimeError(REFUSAL)
        if self.kernel:
            self.kernel[(programs,)](**arguments)


@pytest.fixture
def stream() -> Iterator[mock.Mock]:
    """Replace the current stream, whose `return_value` can be set, and forget what streams accepted."""
    with (
        mock.patch.object(torch.cuda, "current_stream", return_value="stream") as current,
        mock.patch.object(triton_grid, "_largest", {}),
    ):
        yield current


def test_a_grid_that_fits_is_launched_once_and_asks_for_no_stream(stream: mock.Mock) -> None:
    kernel = PartitionedKernel(132)
    launch_cooperative(kernel, 132, x=1)
    assert kernel.grids == [132] and not stream.called


def test_the_largest_grid_that_fits_is_launched_and_remembered_for_its_stream(stream: mock.Mock) -> None:
    kernel = PartitionedKernel(129)
    launch_cooperative(kernel, 132)
    launch_cooperative(kernel, 132)
    assert kernel.grids == [132, 131, 130, 129, 129]
    kernel.grids.clear()
    stream.return_value, kernel.fits = "another stream", 132
    launch_cooperative(kernel, 132)
    stream.return_value = "stream"
    launch_cooperative(kernel, 132)
    # Another kernel fills a multiprocessor with two programs, of which more fit.
    launch_cooperative(kernel, 131)
    assert kernel.grids == [132, 129, 131]


def test_the_error_is_raised_if_not_even_one_program_is_accepted(stream: mock.Mock) -> None:
    kernel = PartitionedKernel(0)
    with pytest.raises(RuntimeError, match="too many blocks"):
        launch_cooperative(kernel, 3)
    assert kernel.grids == [3, 2, 1] and not triton_grid._largest


def test_other_errors_are_raised_at_once(stream: mock.Mock) -> None:
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.side_effect = RuntimeError("Triton Error [CUDA]: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch_cooperative(kernel, 3)
    assert kernel.__getitem__.call_count == 1


@pytest.mark.skipif(not triton_grid.INTERPRETED, reason="needs grids of three programs")
@pytest.mark.parametrize("fits", [1, 2])
def test_the_step_of_an_adapter_is_the_same_in_a_partition(fits: int, stream: mock.Mock) -> None:
    sae = random_sae("jumprelu", 40, 300)
    g = torch.Generator().manual_seed(0)
    # The sums of integers do not depend on the programs that add them.
    arguments = {
        "h": torch.randint(-2, 3, (5, 40), generator=g).float(),
        "sae": sae,
        "W_a": torch.randint(-2, 3, (300, 40), generator=g).float(),
        "b_a": torch.zeros(300),
        "activation": "relu",
        "backend": "triton",
    }
    arguments["sae"].W_dec.copy_(torch.randint(-2, 3, sae.W_dec.shape, generator=g))
    whole = fsrl_residual(**arguments)
    kernel = PartitionedKernel(fits, triton_impl.step_kernel)
    with mock.patch.object(triton_impl, "step_kernel", kernel):
        partitioned = fsrl_residual(**arguments)
    assert kernel.grids == [*range(3, fits - 1, -1), fits]
    assert all(map(same_bits, whole, partitioned))
