# %% [markdown]
# # Align a model with 250 preferences
#
# You have a model, two sparse autoencoders (SAEs) of its layers, and a few hundred pairs of answers of which one
# is better. This tutorial turns the pairs into a *map*, steers the model with it, and looks at what was edited
# and at what that is worth. No weight changes. [Concepts](../concepts.md) explains the words.

# %% [markdown]
# ## A model, its SAEs, and preferences
#
# Everything below works with any transformers model: `load_world` only loads one, with SAEs and data. The world
# is `tiny`, a model of half a million parameters that comes with the package, unless `DSPA_TUTORIAL_WORLD` names
# another.

# %%
import os

import dspa
from dspa.demo.tutorial import load_world

world = load_world(os.environ.get("DSPA_TUTORIAL_WORLD", "tiny"))
model, tokenizer, sae_in, sae_out = world.model, world.tokenizer, world.sae_in, world.sae_out
print(f"{world.name}: {model.config.num_hidden_layers} layers, d = {model.config.hidden_size}")
print(f"input SAE:  layer {sae_in.layer}, {sae_in.d_sae} latents")
print(f"output SAE: layer {sae_out.layer}, {sae_out.d_sae} latents")
print(f"{len(world.triples)} triples for the map, {len(world.held_out)} held out")
print(world.preference)

# %% [markdown]
# A triple is a prompt, a chosen response and a rejected one:


# %%
def text_of(text):
    """Return a text, or the text of the last message of a conversation."""
    return text if isinstance(text, str) else text[-1]["content"]


triple = world.triples[0]
for name in ("prompt", "chosen", "rejected"):
    print(f"{name + ':':9s} {text_of(getattr(triple, name))}")

# %% [markdown]
# ## Make the map
#
# The model reads each prompt and both responses once. What is kept are counts: how often each latent is active.

# %%
cdmap = dspa.build_map(model, tokenizer, world.triples, sae_in, sae_out, progress=False)
print(cdmap)
print(f"{len(cdmap.columns)} of {sae_out.d_sae} output latents can be steered")

# %% [markdown]
# A *column* is an output latent whose frequency differs between chosen and rejected responses, for at least some
# kind of prompt. Only these latents can ever be edited. Which of them are edited depends on the prompt.

# %% [markdown]
# ## Steer
#
# While a `Steering` is attached, `generate()` is steered. We answer a few held-out prompts greedily, without and
# with it.


# %%
def prompt_ids(prompts):
    """Return prompts as the model reads them: texts as they are, conversations through the chat template."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def answer(prompts):
    inputs = prompt_ids(prompts)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


prompts = [triple.prompt for triple in world.held_out[:4]]
base = answer(prompts)
steering = dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.5), record=True)
with steering.attach(model):
    steered = answer(prompts)
for prompt, *answers in zip(prompts, base, steered, strict=True):
    print("prompt: ", text_of(prompt))
    print("base:   ", answers[0])
    print("steered:", answers[1], end="\n\n")

# %% [markdown]
# Do not judge by four texts, which may differ by luck. First see *what* was done, then measure.

# %% [markdown]
# ## What was planned
#
# Before the first token, each prompt chose up to 16 output latents to weaken: its plan. If the preference depends
# on the prompt, plans should differ between prompts of different kinds and resemble each other within a kind. The
# Jaccard index is the share of latents that two plans have in common.

# %%
latents = steering.plan.latents(cdmap.columns)
plans = [set(row[sign < 0].tolist()) for row, sign in zip(latents, steering.plan.signs, strict=True)]
for n, plan in enumerate(plans):
    print(f"prompt {n}: {len(plan):2d} latents to weaken; in common with the others:", end="")
    print("".join(f"  {len(plan & other) / max(1, len(plan | other)):.2f}" for other in plans))

# %% [markdown]
# And what are these latents? The decoder row of a latent, read through the model's output layer (the *logit
# lens*), shows which tokens it makes more likely. These are the first five of two plans, and so the tokens that
# steering makes *less* likely after these prompts:

# %%
meanings = dspa.top_tokens(sae_out, model, tokenizer, set().union(*plans))
for n in (0, 1):
    print("prompt:", text_of(prompts[n]))
    for latent in [latent for latent in latents[n].tolist() if latent in plans[n]][:5]:
        print(f"  weakens {latent}, which promotes {', '.join(map(repr, meanings[latent]))}")

# %% [markdown]
# ## What was edited
#
# A planned latent is edited only on tokens where it is active. The trace holds every edit.

# %%
steering.trace.tokenizer = tokenizer
print(steering.trace)

# %% [markdown]
# Each row of the first table is a latent with the tokens that it promotes: on how many tokens it was weakened,
# from what mean value to what, and on which tokens most often. The second table has the tokens. The edit at a
# token changes the prediction of the *next* one.

# %% [markdown]
# ## What it is worth
#
# On triples that the map has not seen: does the model give the chosen response a higher log-probability, compared
# with the rejected one, than before? And does it still write text that the base model finds likely?
# `dspa.compare` measures both, together with what DSPA has to beat:
#
# - *Static-SAE* edits one fixed set of latents whatever the prompt is;
# - *random set* edits as many random latents, and *shuffled map* exchanges rows of the map, so that a prompt
#   looks up what belongs to other latents.
#
# Brackets are 95 % intervals of the difference to the base model, and a * marks a gain above those of all
# controls.

# %%
from rich import print as show

methods = [
    dspa.Method.dspa(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=alpha, mode=mode))
    for mode, alpha in (("ablate", 0.2), ("ablate", 1.0), ("both", 0.5))
]
comparison = dspa.compare(
    model,
    tokenizer,
    [triple.prompt for triple in world.held_out[:20]],
    [*methods, dspa.Method.static(methods[1])],
    held_out=world.held_out[:40],
    controls=["random set", "shuffled map"],
    seeds=[0],
    max_new_tokens=32,
    progress=False,
)
for table in comparison.tables()[:2]:
    show(table.rich())
show(comparison.recommendation.reason)

# %% [markdown]
# How to read this: a DSPA row means something if its interval in the column *over base* lies above 0 *and* above
# those of its controls, which are indented below it. A control that gains as much shows that any edit of this
# size would have done it. If Static-SAE gains as much, the preference does not depend on the prompt, and a fixed
# set would do. If the perplexity rises much, alpha is too large.
#
# ## Keep it
#
# The map is one file. With the same model and SAEs it steers in any later program, or with `dspa generate --map`.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

with TemporaryDirectory() as folder:
    path = Path(folder) / "preferences.dspa.safetensors"
    cdmap.save(path)
    again = dspa.ConditionalDifferenceMap.load(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {again.meta.n_triples} triples")

# %% [markdown]
# Next: the same with [a model and SAEs of your own](own_sae.ipynb), or what [a
# map](../maps.md#before-trusting-a-map) should show before you trust it.
