# %% [markdown]
# # A drop-in SAE, and a kernel microbenchmark of your own
#
# The kernels of `dspa_kernels` know tensors and nothing of models. This tutorial puts one in the place of a
# SAELens SAE, calls `steer` without a model, checks both against a few lines of PyTorch, and only then times
# them.
#
# Every cell runs with and without a GPU: on one with the Triton kernels, and without one with the reference,
# which is plain PyTorch. The reason why a backend cannot run is in its `reason`.

# %%
import os

import torch

from dspa.demo.tutorial import load_world
from dspa_kernels import available_backends

device = "cuda" if torch.cuda.is_available() else "cpu"
backend = "triton" if device == "cuda" else "reference"
for name, status in available_backends().items():
    print(f"{name:10s} {'runs here' if status.available else 'cannot run here'}")
print(f"this page uses {backend} on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}")

# %% [markdown]
# ## Residuals to work on
#
# Real ones, from the layer of the SAE, because how many latents are active decides what a kernel has to do.

# %%
world = load_world(os.environ.get("DSPA_TUTORIAL_WORLD", "tiny"))
model, tokenizer, sae = world.model, world.tokenizer, world.sae_out.to(device)
texts = [triple.chosen if isinstance(triple.chosen, str) else triple.chosen[-1]["content"] for triple in world.held_out]
kept = []
layer = model.get_submodule("model.layers")[sae.layer]
hook = layer.register_forward_hook(lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
with torch.no_grad():
    for text in texts[:32]:
        model(**tokenizer(text, return_tensors="pt"))
hook.remove()
# The first token of a text is an outlier in many models.
h = torch.cat([row[0, 1:] for row in kept]).to(device, sae.dtype)
print(f"h: {list(h.shape)}, {h.dtype}; SAE: {sae.d_in} x {sae.d_sae}, {sae.dtype}")

# %% [markdown]
# ## A drop-in SAE
#
# `FusedSAE` returns what SAELens' `encode`, `decode` and call return. It reads the same weights, so it can take
# the place of an SAE in inference code. (This cell needs the extra `saelens`.)

# %%
from tempfile import TemporaryDirectory

from sae_lens import SAE

from dspa_kernels.nn import FusedSAE

with TemporaryDirectory() as folder:
    sae.save(folder)
    theirs = SAE.load_from_disk(folder, device=device)
fused = FusedSAE(sae.weights, sae.b_dec, backend=backend)
print(fused)


def difference(ours, other):
    """Return the largest difference, relative to the largest value."""
    return float((ours.float() - other.float()).abs().max() / other.float().abs().max())


with torch.no_grad():
    for name in ("encode", "__call__"):
        ours, other = getattr(fused, name)(h), getattr(theirs, name)(h)
        print(f"{name:10s} {list(ours.shape)}  largest difference {difference(ours, other):.1e}")
        assert difference(ours, other) < 1e-2

# %% [markdown]
# What is left is rounding. Most of that dense result is zeros, which nobody has to write: `encode_sparse` returns
# the active latents alone. It needs to know how many there can be at most per row.

# %%
active = (fused.encode(h) > 0).sum(dim=1)
capacity = int(active.max())
sparse = fused.encode_sparse(h, capacity=capacity)
dense_bytes = len(h) * sae.d_sae * h.element_size()
sparse_bytes = sum(t.numel() * t.element_size() for t in (sparse.indices, sparse.values, sparse.counts))
print(f"active latents per row: {float(active.float().mean()):.1f}, at most {capacity} of {sae.d_sae}")
print(f"dense result {dense_bytes / 1e3:.0f} KB, sparse {sparse_bytes / 1e3:.0f} KB")
assert torch.equal(sparse.counts.long(), active)

# %% [markdown]
# ## `steer`, without a model
#
# The op behind DSPA takes rows, an SAE, the latents that may be steered and a plan per prompt. Here the plan
# weakens those 16 latents that are active most often, on every row. `paths` counts which way each row took.

# %%
from dspa_kernels import PATHS, MapWeights, SteeringPlan, steer

columns = (fused.encode(h) > 0).float().mean(dim=0).topk(16).indices.sort().values
cdmap = MapWeights.gather(columns, torch.zeros(1, 16), sae.weights)
slots = torch.arange(16, dtype=torch.int32, device=device)[None]
plan = SteeringPlan(slots=slots, signs=torch.full_like(slots, -1, dtype=torch.int8))
rows = torch.zeros(len(h), dtype=torch.int32, device=device)
paths = torch.zeros(6, dtype=torch.int64, device=device)
steered = steer(h, sae.weights, cdmap, plan, rows, alpha=0.2, paths=paths, backend=backend)
for name, count in zip(PATHS, paths.tolist(), strict=False):
    print(f"{name:12s} {count:6d} rows")

# %% [markdown]
# *inactive* rows had none of the 16 latents active and came back bit for bit. For *settled* rows a lower bound on
# the row's largest latent was enough to know that every edited latent goes to 0. Only *streamed* rows needed the
# largest latent itself, and with it the whole encoder: [these rows are what the kernels are
# about](../kernels.md#what-is-not-read).
#
# Is it right? The formula in plain PyTorch:

# %%
f = sae.weights.latents(h)
largest = f.max(dim=1, keepdim=True).values
edited = (f[:, columns] - 0.2 * largest).clamp(min=0)
edited = torch.where(f[:, columns] > 0, edited, f[:, columns])
expected = h.float() + (edited - f[:, columns]) @ sae.W_dec[columns].float()
print(f"largest difference {difference(steered, expected):.1e}")
assert difference(steered, expected) < 1e-2

# %% [markdown]
# ## A microbenchmark of your own
#
# Rules that keep you from fooling yourself: check the result first, as above; warm up; let a tool repeat and
# synchronise (`torch.utils.benchmark` does); say what was measured on which device; compare with a bound. A
# decoding step reads the encoder at most once, so bytes divided by time is a rate that you can compare with the
# memory's.

# %%
from torch.utils.benchmark import Timer

step = h[:1].contiguous()
one = rows[:1].contiguous()
cases = {
    "SAELens encode, 1 row": lambda: theirs.encode(step),
    "FusedSAE.encode, 1 row": lambda: fused.encode(step),
    "FusedSAE.encode_sparse, 1 row": lambda: fused.encode_sparse(step, capacity=capacity),
    "steer, 1 row": lambda: steer(step, sae.weights, cdmap, plan, one, backend=backend),
    f"FusedSAE.encode, {len(h)} rows": lambda: fused.encode(h),
}
encoder_bytes = sae.weights.encoder_rows.numel() * sae.weights.encoder_rows.element_size()
where = f"{torch.cuda.get_device_name()}" if device == "cuda" else f"a CPU with {torch.get_num_threads()} thread(s)"
print(f"backend {backend} on {where}; encoder of {encoder_bytes / 1e6:.2f} MB in {sae.dtype}")
with torch.inference_mode():
    for name, call in cases.items():
        time = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median
        print(f"{name:32s} {time * 1e6:9.1f} us")

# %% [markdown]
# **A time on a CPU says nothing about a GPU.** On a CPU the reference runs PyTorch operations one by one. It is
# exact, not fast, and for one row you see little but their overhead; SAELens' own `encode` can be faster there.
# On a GPU, run this page as it is, with the SAE in bf16 (`sae.to(dtype=torch.bfloat16)`) and at the size of a
# real model; a small SAE fits into the cache, which flatters every result. The suite of this repository also
# empties the cache between calls and compares with the rate of a plain read: [benchmarks](../benchmarks.md).
