"""Persistent grids: their number of programs, their launch, and a barrier between programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dspa_kernels.ops.shared.triton_tiles import INTERPRETED

# CUDA's text for a cooperative launch of more programs than run at the same time. Triton raises a RuntimeError with it.
TOO_LARGE = "too many blocks in cooperative launch"
# The largest grid that a stream of a partition accepted, by stream and by the grid that it refused.
_largest: dict[tuple[torch.cuda.Stream | None, int], int] = {}


def n_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Return the number of programs that run at the same time, or 3 in the interpreter."""
    if INTERPRETED:
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


def launch_cooperative(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel with `programs` programs, or with as many as run at the same time, if these are fewer.

    A green context or an MPS partition has only some multiprocessors of its device, and CUDA refuses larger grids. A
    refused launch has no effect, so it is repeated with one program less. The grid that fits is remembered.

    Args:
        kernel: a Triton kernel that takes `n_programs`.
        programs: the largest grid, for which scratch is allocated.
        **arguments: all other arguments and launch options of the kernel.
    """
    # Looking up the stream takes time, which launches in whole devices need not spend.
    stream = torch.cuda.current_stream() if _largest else None
    fits = _largest.get((stream, programs), programs)
    while True:
        try:
            kernel[(fits,)](**arguments, n_programs=fits, launch_cooperative_grid=True)
            break
        except RuntimeError as error:
            if TOO_LARGE not in str(error) or fits == 1:
                raise
            fits -= 1
    if fits < programs:
        _largest[torch.cuda.current_stream(), programs] = fits


@triton.jit
def grid_arrive(p_barrier, n_programs):
    """Arrive at the barrier, release everything that this program has written, and return the token to wait with.

    word += 2^31 - (n_programs - 1) in the first program, 1 in the others. The sign of the word flips once all programs
    have arrived, and its other bits are as before. So nothing has to be reset, for any number of rounds.
    """
    # Without this a warp's stores could still be in flight when another warp's atomic releases them.
    tl.debug_barrier()
    b_increment = tl.where(tl.program_id(0) == 0, -2147483648 - (n_programs - 1), 1)
    return tl.atomic_add(p_barrier, b_increment.to(tl.int32), sem="acq_rel", scope="gpu")


# One thread polls, because more would compete with the atomics of the programs that arrive. The block barrier that
# follows passes on what it has acquired.
_WAIT = tl.constexpr("""{
    .reg .pred p_other, p_early;
    .reg .b32 r_thread, r_word;
    mov.u32 r_thread, %tid.x;
    setp.ne.u32 p_other, r_thread, 0;
    @p_other bra passed;
poll:
    ld.acquire.gpu.global.b32 r_word, [$1];
    xor.b32 r_word, r_word, $2;
    setp.ge.s32 p_early, r_word, 0;
    @p_early bra poll;
passed:
    bar.warp.sync 0xffffffff;
    mov.b32 $0, 0;
}""")


@triton.jit
def grid_wait(p_barrier, b_token):
    """Wait until all programs have arrived, and acquire what they wrote. They have to run at the same time."""
    tl.inline_asm_elementwise(_WAIT, "=r,l,r", [p_barrier.to(tl.int64), b_token], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def prefetch(p):
    """Bring the cache lines at pointers p into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
