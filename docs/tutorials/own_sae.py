# %% [markdown]
# # Your own model and SAE, from a text file to steered text
#
# No published SAE fits your model? Train two, from text. This tutorial starts with a text file, trains an SAE for
# an early and one for a late layer, checks whether they are any good, makes a map with them, and steers. It needs
# the extra `saelens` (`pip install -e ".[saelens]"`).

# %%
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import dspa
from dspa.demo.tutorial import load_world

world = load_world(os.environ.get("DSPA_TUTORIAL_WORLD", "tiny"))
model, tokenizer = world.model, world.tokenizer
layers = [world.sae_in.layer, world.sae_out.layer]
temporary = TemporaryDirectory()
folder = Path(temporary.name)
print(f"{world.name}: {model.config.num_hidden_layers} layers, SAEs for layers {layers}")

# %% [markdown]
# Replace this cell by your own model and tokenizer. Which layers? One at a quarter to a third of the depth to
# read prompts with, and one at about three quarters to edit at, are a good start.
#
# ## The text
#
# An SAE should see text like that which it will be used on: prompts *and* answers. Any file with a document per
# line, or JSON Lines with `text`, will do. Here the responses of the preference triples are all the text that
# there is, so we write them with their prompts into a file.

# %%
texts = folder / "text.jsonl"
with texts.open("w") as file:
    for triple in world.triples + world.held_out:
        for response in (triple.chosen, triple.rejected):
            if isinstance(triple.prompt, str):
                text = triple.prompt + response
            else:
                text = tokenizer.apply_chat_template([*triple.prompt, *response], tokenize=False)
            file.write(json.dumps({"text": text}) + "\n")
print(f"{sum(1 for _ in texts.open())} documents, {texts.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## Train
#
# `d_sae` is how many latents there are, usually 4 to 16 times the model's width; `k` how many are active per
# token. The number of tokens here is far too small for a real model: it is chosen so that this page runs in
# minutes. Take tens of millions, and see [training your own SAE](../saes.md#what-makes-an-sae-worth-steering-with).

# %%
from dspa.saes.config import SAETrainingConfig
from dspa.saes.training import read_qualities, train_saes

d_sae = 4 * model.config.hidden_size
config = SAETrainingConfig(n_tokens=100_000, batch_size=1024, held_out_tokens=4096)
sae_in, sae_out = train_saes(
    model, tokenizer, texts, layers, folder / "saes", d_sae=d_sae, k=16, config=config, progress=False
)

# %% [markdown]
# The command line does the same:
#
# ```
# dspa sae train text.jsonl --model M --layer 8 --layer 20 --d-sae 16384 --k 64 --out saes
# dspa sae show saes/layer_8
# ```
#
# ## Are they any good?
#
# The first documents of the file were held out. On them:

# %%
for layer in layers:
    quality = read_qualities(folder / "saes" / f"layer_{layer}")["after"]
    print(f"layer {layer}, {quality.n_tokens} tokens: explained variance {quality.explained_variance:.3f},", end=" ")
    print(f"L0 {quality.l0:.1f}, never active {quality.dead} of {d_sae}")

# %% [markdown]
# - *Explained variance* is the share of the residual's variance that the reconstruction keeps. An SAE worth
#   steering with has about 0.8 or more.
# - *L0* is the mean number of active latents per token, which should be near k.
# - *Never active* counts latents that no held-out token activates. Some are rare, and some are dead: they never
#   learned anything. If it is more than a tenth, train for longer or with fewer latents.
#
# ## What the latents mean
#
# A number is not a meaning. Two looks at a latent: which tokens it makes more likely, and where it is most
# active.

# %%
contexts = dspa.top_contexts(sae_out, model, tokenizer, texts, range(40), n=2, progress=False)
shown = [latent for latent in contexts if contexts[latent]][:6]
for latent, promoted in dspa.top_tokens(sae_out, model, tokenizer, shown, n=3).items():
    print(f"latent {latent}, promotes {', '.join(map(repr, promoted))}")
    for context in contexts[latent]:
        print(f"  {context.value:5.1f}  ...{context.before[-50:]}[{context.token}]{context.after[:30]}...")

# %% [markdown]
# ## Map and steer
#
# From here on it is as with any SAE. The two are folders that SAELens reads, too.

# %%
cdmap = dspa.build_map(model, tokenizer, world.triples, sae_in, sae_out, progress=False)
print(cdmap)

# %%
comparison = dspa.compare(
    model,
    tokenizer,
    [triple.prompt for triple in world.held_out[:10]],
    [dspa.Method.dspa(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=1.0, mode="both"))],
    held_out=world.held_out[:40],
    controls=["random set", "shuffled map"],
    temperature=0,
    max_new_tokens=48,
    progress=False,
)
from rich import print as show

show(comparison.tables()[0].rich())
for n in range(3):
    answer = comparison.answer("DSPA both 1", n)
    print(f"prompt:  {answer.prompt}\nbase:    {answer.base}\nsteered: {answer.text}\n")

# %% [markdown]
# The margin rises beyond that of both controls. The answers show what that costs: with SAEs of so few tokens and
# `alpha=1` some of them begin in the register of their letter, and then repeat themselves. More tokens for the SAEs
# and a smaller `alpha` ([which?](../compare.md)) come first.
#
# If the margin does not rise above that of the controls, look at the SAEs first: too few tokens, too many dead
# latents, or a layer at which the preference is not visible. Then look at the map: `dspa map show` warns of what
# is unusual, and `dspa map stability` shows whether more triples would help.

# %%
temporary.cleanup()
