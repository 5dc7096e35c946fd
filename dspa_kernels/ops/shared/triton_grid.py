"""One grid of programs: how many run at once, and how they wait for each other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspa_kernels.ops.shared.triton_tiles import INTERPRETED


def n_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a persistent grid: as many as run at one time; three in the interpreter."""
    if INTERPRETED:
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def grid_arrive(p_barrier, n_programs):
    """Announce, after everything this program wrote, that it came this far; returns what to wait on.

    The first program adds what turns the word's sign once all have come, and leaves its other bits as they
    were: two arrivals leave the word as it was found, and nothing has to be reset.
    """
    # Without it a warp's stores could still be on their way when another warp's atomic tells of them.
    tl.debug_barrier()
    b_step = tl.where(tl.program_id(0) == 0, -2147483648 - (n_programs - 1), 1)
    return tl.atomic_add(p_barrier, b_step.to(tl.int32), sem="acq_rel", scope="gpu")


@triton.jit
def grid_wait(p_barrier, b_ticket):
    """Wait until all programs have arrived. The launch has to be cooperative."""
    # Plain loads look for the sign to turn; one atomic then makes what the others wrote visible. It compares with
    # and stores the same value, since to add 0 is optimised away, and the acquire with it.
    while (tl.load(p_barrier, volatile=True) ^ b_ticket) >= 0:
        pass
    tl.atomic_cas(p_barrier, b_ticket, b_ticket, sem="acquire", scope="gpu")
    tl.debug_barrier()
