"""Compilation of the Triton kernels ahead of time, through their own launchers.

A stand-in for Triton's driver names the target, and a launch compiles, or records its specialisation, instead of
running. So the specialisation, constants and options are those that the launcher would launch.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dspa_kernels import EncoderStream
from dspa_kernels.backends import IMPLEMENTED, implementation, owner
from dspa_kernels.testing import random_map, random_plan, random_sae
from dspa_kernels.weights import SCREENS

MULTIPROCESSORS = 132
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """The part of a Triton driver that is read before a compilation."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Compiled:
    """A launch of a kernel and the compiler's output."""

    name: str
    options: dict[str, Any]
    grid: tuple[int, ...]
    asm: dict[str, Any]
    shared: int

    def dump(self, option: str) -> str:
        """Return what cuobjdump prints of the machine code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def resources(self) -> dict[str, int]:
        """Return registers, and bytes of stack and local memory, per thread."""
        line = next(line for line in self.dump("--dump-resource-usage").splitlines() if "REG:" in line)
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile launches of Triton kernels for `capability`, and list them in order."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, kwargs, tuple(grid), kernel.asm, kernel.metadata.shared))
        return kernel

    with targeting(capability), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


@contextmanager
def specialising(capability: int) -> Iterator[set[tuple[str, str]]]:
    """Collect the names and specialisations of the kernels that launches would compile, without compiling them."""
    specialisations: set[tuple[str, str]] = set()

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        specialisations.add((fn.name, key))
        return True  # Triton then neither compiles nor launches.

    with targeting(capability), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", record):
        yield specialisations


@contextmanager
def targeting(capability: int) -> Iterator[None]:
    """Have launches on CPU tensors see a GPU of `capability`."""
    properties = mock.Mock(multi_processor_count=MULTIPROCESSORS)
    with (
        mock.patch.object(driver, "_active", Driver(capability)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _device: properties),
        mock.patch.object(torch.cuda, "current_stream", lambda _device: mock.Mock(cuda_stream=0)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch("dspa_kernels.launch.capability_of", lambda _device: capability),
    ):
        yield


def unguarded_tickets(ptx: str) -> int:
    """Count tickets (atomics that release) before which a warp of the block may still be storing."""
    unguarded = 0
    guarded = False
    for line in ptx.splitlines():
        if "bar.sync" in line or "barrier.sync" in line:
            guarded = True
        elif re.search(r"\b(st|red)\.(?:\w+\.)*global|\bst\.global", line):
            guarded = False
        elif "atom." in line and "acq_rel" in line:
            unguarded += not guarded
    return unguarded


def unfinished_waits(ptx: str) -> int:
    """Count loops that acquire what other programs wrote before which the block could load something of it."""
    after = ptx.split("ld.acquire.gpu.global")[1:]
    return sum("ld." in rest.partition("bar.sync")[0] or "bar.sync" not in rest for rest in after)


def unpacking_loop(sass: str) -> int:
    """Count the instructions of the loop that unpacks a screen, 0 without one. Packed multiply-adds identify it."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = ((at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in instructions)
    loops = [
        [text for place, text in instructions if int(jump[1], 16) <= place <= at]
        for at, jump in jumps
        if jump and int(jump[1], 16) < at
    ]
    unpacking = (loop for loop in loops if sum("HFMA2" in text and "RZ" not in text for text in loop) >= 32)
    return min(map(len, unpacking), default=0)


def facts(kernel: Compiled) -> dict[str, Any]:
    """Return what the tests check of a compiled kernel."""
    sass = kernel.dump("--dump-sass")
    return {
        "name": kernel.name,
        "launch": {name: value for name, value in kernel.options.items() if isinstance(value, (int, str, bool))},
        "programs": kernel.grid[0] // MULTIPROCESSORS,
        "shared": kernel.shared,
        "tickets": len(re.findall(r"atom\.[\w.]*acq_rel", kernel.asm["ptx"])),
        "unguarded_tickets": unguarded_tickets(kernel.asm["ptx"]),
        "waits": kernel.asm["ptx"].count("ld.acquire.gpu.global"),
        "unfinished_waits": unfinished_waits(kernel.asm["ptx"]),
        "tensor_cores": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
        "wide_copies": len(re.findall(r"\bLDGSTS[\w.]*\.128\b", sass)),
        "narrow_copies": len(re.findall(r"\bLDGSTS\b(?![\w.]*\.128\b)", sass)),
        "descriptor_copies": len(re.findall(r"\bUTMALDG\b", sass)),
        "products_under_way": len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", sass)),
        "unpacking_loop": unpacking_loop(sass),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        **kernel.resources(),
    }


def plain_steering(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], n: int, normalize: str, screen: str, record: bool
) -> dict[str, Any]:
    """Return arguments of the custom op `steer` with rows of 256 numbers and few latents."""
    h_dtype, W_dtype = dtypes
    sae = random_sae(kind, 256, 512, dtype=W_dtype, normalize=normalize)
    plan = random_plan(n, 16, 40)
    stream = EncoderStream.of(sae, hot=torch.arange(64), screen=screen)
    return {
        "h": torch.zeros(n, 256, dtype=h_dtype),
        **stream.arguments(),
        **random_map(sae, 64, 40).latents(),
        "slots": plan.slots,
        "signs": plan.signs,
        "strengths": None,
        "rows": None,
        "positions": torch.zeros(n, dtype=torch.int64),
        "start": torch.zeros(n, dtype=torch.int64),
        "paths": torch.zeros(6, dtype=torch.int64),
        "alpha": 0.2,
        "alphas": None,
        "record": record,
    }


# One pair of dtypes per way to multiply, in the order of PRECISION's values, and its normalisation.
DTYPES = (
    ((torch.bfloat16, torch.bfloat16), "none"),
    ((torch.bfloat16, torch.bfloat16), "layer_norm"),
    ((torch.float32, torch.float32), "none"),
)
ROWS = (1, 32, 64, 640)


def adapting(activation: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], n: int, x: bool) -> dict[str, Any]:
    """Return arguments that `fsrl_residual` and its backward share, with `x` for an encoder that normalises."""
    h_dtype, W_dtype = dtypes
    sae = random_sae(kind, 256, 512, dtype=W_dtype)
    encoder = sae.encoder()
    del encoder["normalize"]
    encoder["sae_threshold"] = encoder.pop("threshold")
    return {
        "h": torch.zeros(n, 256, dtype=h_dtype),
        "x": torch.zeros(n, 256) if x else None,
        **encoder,
        "W_dec": sae.W_dec,
        "W_a": torch.zeros(512, 256, dtype=h_dtype),
        "b_a": torch.zeros(512),
        "threshold": None if activation == "relu" else torch.zeros(512),
        "activation": activation,
        "bandwidth": 1e-3,
        "mask": torch.ones(512, dtype=torch.bool) if kind == "topk" else None,
        "rows": None,
        "fraction": 0.5 if kind == "topk" else 1.0,
    }


def calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ops and arguments that launch every entry of the table, and every kernel without an entry."""
    for (i, (dtypes, normalize)), kind, screen, (j, n) in itertools.product(
        enumerate(DTYPES), ("jumprelu", "topk"), SCREENS, enumerate(ROWS)
    ):
        yield "steer", plain_steering(kind, dtypes, n, normalize, screen, record=(i + j) % 2 == 1)
    for kind, screen, n in itertools.product(("jumprelu", "topk"), SCREENS, ROWS):
        steering = plain_steering(kind, DTYPES[0][0], n, "none", screen, record=False)
        yield "steer", {**steering, "alphas": torch.zeros(n)}
        with_strengths = {**steering, "strengths": torch.zeros(steering["slots"].shape)}
        yield "steer", {**with_strengths, "record": screen != "none"}
        del steering["record"], with_strengths["record"]
        yield "steer_", {**steering, "residual": steering["h"].clone()}
        yield "steer_", {**with_strengths, "residual": steering["h"].clone()}
    for (dtypes, normalize), n in itertools.product(DTYPES[1:], ROWS):
        steering = plain_steering("jumprelu", dtypes, n, normalize, "none", record=False)
        del steering["record"]
        yield "steer_", {**steering, "residual": None if n == 1 else steering["h"].clone()}
    for (dtypes, normalize), n in itertools.product(DTYPES[1:], ROWS):
        steering = plain_steering("jumprelu", dtypes, n, normalize, "none", record=n == 1)
        yield "steer", {**steering, "strengths": torch.zeros(steering["slots"].shape)}
    fp16 = (torch.float16, torch.float16)
    yield "steer", plain_steering("relu", fp16, 1, "none", "none", record=False)
    yield (
        "steer",
        plain_steering("relu", (torch.float32, torch.bfloat16), 1, "constant_norm_rescale", "none", record=True),
    )
    counts, values = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(64, 40)
    for mode in ("ablate", "both"):
        lookup = {"counts": counts, "values": values, "k_prompt": 32, "k_diff": 16}
        slots = torch.zeros(4, 32 if mode == "both" else 16, dtype=torch.int32)
        for rows in (None, torch.zeros(4, dtype=torch.int32)):
            plan = {"slots": slots, "signs": slots.to(torch.int8)}
            yield "map_lookup", {**lookup, "rows": rows, "lookup_mode": mode, **plan}
        steering = plain_steering("jumprelu", DTYPES[0][0], 4, "none", "none", record=False)
        del steering["slots"], steering["signs"], steering["strengths"]
        yield "lookup_and_steer", {**steering, **lookup, "lookup_mode": mode}
    ints, longs = torch.zeros(4, dtype=torch.int32), torch.zeros(64, dtype=torch.int64)
    prompts = {
        "n_counted": longs[:4],
        "groups": torch.zeros(4, 2, dtype=torch.bool),
        "planned": torch.zeros(4, dtype=torch.bool),
    }
    step = {"rows": longs[:3], "starts": ints, "positions": longs, "slots": longs}
    placed = {"row": longs.int(), "position": longs.clone(), "slot": longs.clone(), "due": ints.expand(2, 4).clone()}
    yield "place_tokens", {**step, **prompts, **placed}
    kept = {"bits": torch.zeros(64, 16, dtype=torch.int32), "blocks": torch.zeros(4, 4, dtype=torch.int32)}
    counted = {"block_size": 16, "n_tokens": longs[:4], "rows": ints}
    for d_sae in (512, 500):
        yield "bit_counts", {**kept, **counted, "counts": torch.zeros(4, d_sae, dtype=torch.int32)}
    for (dtypes, normalize), kind, n in itertools.product(DTYPES, ("jumprelu", "topk"), ROWS):
        h_dtype, W_dtype = dtypes
        sae = random_sae(kind, 256, 512, dtype=W_dtype, normalize=normalize)
        h, sequences = torch.zeros(n, 256, dtype=h_dtype), torch.zeros(n, dtype=torch.int32)
        yield (
            "activation_counts",
            {"h": h, **sae.encoder(), "sequences": sequences, "counts": torch.zeros(1, 512, dtype=torch.int32)},
        )
        yield (
            "activation_sums",
            {"h": h, **sae.encoder(), "sequences": sequences, "sums": torch.zeros(1, 512)},
        )
        yield (
            "activation_bits",
            {"h": h, **sae.encoder(), "slots": sequences.long(), "bits": torch.zeros(n, 16, dtype=torch.int32)},
        )
        yield "sparse_encode", {"h": h, **sae.encoder(), "capacity": 64}
        latents = {"indices": torch.zeros(n, 64, dtype=torch.int32), "values": torch.zeros(n, 64)}
        yield "sparse_decode", {**latents, "W_dec": sae.W_dec, "b_dec": None}
    adapted = [
        *itertools.product(("soft_threshold",), ("jumprelu",), range(3), ROWS),
        *(("soft_threshold", "topk", 0, n) for n in ROWS[::3]),
        *itertools.product(("relu", "jumprelu"), ("jumprelu",), (0,), ROWS[::3]),
    ]
    for activation, kind, i, n in adapted:
        arguments = adapting(activation, kind, DTYPES[i][0], n, x=i == 1)
        yield "fsrl_residual", {**arguments, "keep": n % 2 == 0}
        yield "fsrl_residual", {**arguments, "keep": False, "rows": torch.ones(n, dtype=torch.bool)}
        if n > 1:
            # The change of normalised rows is returned in fp32, and so is its gradient.
            gradients = {"grad": torch.zeros(n, 256, dtype=torch.float32 if i == 1 else DTYPES[i][0][0])}
            gradients |= {"grad_l1": torch.zeros(n), "codes": torch.zeros(n, 512, dtype=torch.uint8)}
            names = ("h", "encoder_rows", "W_dec", "W_a", "b_a", "threshold", "activation", "bandwidth")
            needs = {"adds": i != 1, "needs_h": True, "needs_x": i == 1}
            yield "fsrl_residual_backward", gradients | needs | {name: arguments[name] for name in names}


def main(capability: int, output: str) -> None:
    """Write a JSON list with, per call, the op, its rows, if it ranks or streams latents, and facts of its launches."""
    results: list[dict[str, Any]] = []
    for op, arguments in calls():
        if (owner(op), "triton") not in IMPLEMENTED:
            continue
        with compiling(capability) as compiled:
            implementation(op, "triton")(**arguments)
        # Ranking needs whole rows of latents, from launches that come first.
        ranked = bool(arguments.get("k")) or arguments.get("fraction", 1) < 1
        # With strengths, nothing needs a row's largest latent.
        streams = ranked or arguments.get("strengths") is None
        n_rows = len(arguments.get("h", ()))
        launches = [facts(kernel) for kernel in compiled]
        results.append({"op": op, "rows": n_rows, "ranked": ranked, "streams": streams, "launches": launches})
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
