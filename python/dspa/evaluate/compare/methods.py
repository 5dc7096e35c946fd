"""The methods of a comparison: the base model, DSPA, what it is compared with, and its controls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, cast

from torch import Generator, Tensor, nn

from dspa.baselines.junction.processor import JunctionProcessor
from dspa.baselines.junction.value import ValueHead, ValueModel
from dspa.baselines.matching import matched_permutation
from dspa.baselines.random_change import random_change
from dspa.baselines.random_set import random_set_map
from dspa.baselines.random_vector import random_vector
from dspa.baselines.shuffled_map import shuffled_map
from dspa.baselines.static_sae import static_map
from dspa.baselines.wrong_layer import at_layer, wrong_layer
from dspa.config import SteeringConfig
from dspa.errors import AdapterError, ModelError, refusal
from dspa.files import checksum, digest_of
from dspa.maps.cdmap import TENSORS, ConditionalDifferenceMap
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, base_model, find_layers
from dspa.models.sources import model_digest
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.steering.decisions import Gate, RandomGate
from dspa.steering.dspa import Steering
from dspa.steering.gated import Gated
from dspa.steering.joint import JointSteering, check_layers
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering
from dspa.steering.vector import SteeringVector

BASE = "base"
OF_GATES = ("random gate", "complement gate")
CONTROLS = ("random set", "shuffled map", "wrong layer", "random latents", "random vector", "random change", *OF_GATES)
# What a method steers by: returns it, not attached, for a seed.
Maker: TypeAlias = Callable[[int], Attachable | JointSteering]
# What a control is made of: what attaches for a draw, its settings besides those of its method, and if it draws.
Made: TypeAlias = tuple[Maker | None, dict[str, Any], bool]


@dataclass(frozen=True, eq=False)
class Parts:
    """All that a `Steering` is made of."""

    sae_in: FrozenSAE
    sae_out: FrozenSAE
    cdmap: ConditionalDifferenceMap
    config: SteeringConfig
    backend: str = "auto"
    screen: str = "none"

    def steering(self) -> Steering:
        """Return a new `Steering`."""
        return Steering(self.sae_in, self.sae_out, self.cdmap, self.config, backend=self.backend, screen=self.screen)

    def at_layer(self, layer: int) -> Parts:
        """Return the same with edits at another layer, for the control "wrong layer"."""
        sae_out, cdmap = at_layer(self.sae_out, self.cdmap, layer)
        return replace(self, sae_out=sae_out, cdmap=cdmap)

    def settings(self) -> dict[str, Any]:
        """Return the settings, and digests of the map and the SAEs."""
        tensors = {name: getattr(self.cdmap, name).cpu() for name in TENSORS}
        return {
            "config": asdict(self.config),
            "map": checksum(tensors)[:16],
            "sae_in": self.sae_in.fingerprint,
            "sae_out": self.sae_out.fingerprint,
            "layers": [self.sae_in.layer, self.sae_out.layer],
        }


@dataclass(frozen=True, eq=False)
class Method:
    """One way to answer prompts; `base` is in every comparison.

    Make it with `dspa`, `joint`, `static`, `adapted`, `vector`, `latents`, `tuned`, `prefixed`, `gated` or `junction`.

    Attributes:
        name: name in tables and files, different from the others'.
        kind: "base", "DSPA", "Static-SAE", "adapter", "vector", "latents", "tuned", "prefix", "gated", "junction", or
            "control".
        settings: all that its answers depend on, as JSON: digests of maps, SAEs and adapters are among them.
        attachable: returns what steers, not attached, for a seed; None for nothing.
        drawn: True if that is another one for each seed.
        weights: parameters by name that take the place of the model's; None to keep those.
        redraw: what a draw makes of the change of each of them; None for the change itself.
        prefix: text that is put in as a system message, or before a prompt that is plain text.
        parts: what a DSPA method is made of, one for each map, from which its controls are made.
        gate: which tokens of an answer it acts on; None for all.
        processor: returns what changes the logits of a call, a `JunctionProcessor`, for a model and the token that pads
            prompts; None for nothing. Its log-probabilities of given responses are not measured: it gives most tokens a
            probability of 0.
        control_of: name of the method that this is a control of.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    attachable: Maker | None = None
    drawn: bool = False
    weights: Mapping[str, Tensor] | None = None
    redraw: Callable[[Tensor, Generator], Tensor] | None = None
    prefix: str = ""
    parts: tuple[Parts, ...] = ()
    gate: Gate | None = None
    processor: Callable[[CausalLM, int], JunctionProcessor] | None = None
    control_of: str = ""

    @classmethod
    def base(cls) -> Method:
        """Return the base model, as it is."""
        return cls(BASE, "base")

    @classmethod
    def dspa(
        cls,
        sae_in: FrozenSAE,
        sae_out: FrozenSAE,
        cdmap: ConditionalDifferenceMap,
        config: SteeringConfig | None = None,
        *,
        name: str = "",
        backend: str = "auto",
        screen: str = "none",
    ) -> Method:
        """Return steering by DSPA, with the arguments of `dspa.Steering`.

        Args:
            sae_in: as for `dspa.Steering`, like all others but the name.
            sae_out: the SAE whose latents are edited.
            cdmap: the map.
            config: settings of steering.
            name: by default the mode and alpha.
            backend: implementation that computes the edits.
            screen: copy of the encoder that is read first.
        """
        part = Parts(sae_in, sae_out, cdmap, config or SteeringConfig(), backend, screen)
        name = name or f"DSPA {part.config.mode} {part.config.alpha:g}"
        return cls(name, "DSPA", _settings([part]), _steering([part]), parts=(part,))

    @classmethod
    def joint(cls, methods: Sequence[Method], *, name: str = "") -> Method:
        """Return DSPA methods as a single one that steers by the maps of all at once, see `dspa.JointSteering`.

        Args:
            methods: methods that `Method.dspa` made, of different output layers.
            name: by default their names, joined by "+".

        Raises:
            ValueError: another kind of method, no method, or two of one output layer.
        """
        if not methods:
            raise refusal(ValueError, "`methods`", "empty", "methods that Method.dspa made")
        for method in methods:
            _check_parts("`methods`", method)
        parts = tuple(part for method in methods for part in method.parts)
        check_layers("`methods`", [required_layer(part.sae_out) for part in parts])
        name = name or " + ".join(method.name for method in methods)
        return cls(name, "DSPA", _settings(parts), _steering(parts), parts=parts)

    @classmethod
    def static(cls, dspa: Method, *, name: str = "") -> Method:
        """Return Static-SAE at the `k_diff`, `alpha` and `mode` of a DSPA method.

        Args:
            dspa: a method that `Method.dspa` or `Method.joint` made.
            name: by default the mode and alpha.

        Raises:
            ValueError: another kind of method.
        """
        _check_parts("`dspa`", dspa)
        parts = [
            replace(part, cdmap=static_map(part.cdmap), config=replace(part.config, k_prompt=1)) for part in dspa.parts
        ]
        name = name or "Static-SAE " + " + ".join(f"{part.config.mode} {part.config.alpha:g}" for part in parts)
        return cls(name, "Static-SAE", _settings(parts), _steering(parts))

    @classmethod
    def adapted(cls, adapter: Attachable, *, fraction: float = 1.0, name: str = "") -> Method:
        """Return an FSRL adapter, of whose v only the top fraction of each token is kept.

        Args:
            adapter: an `FSRLAdapter`, not attached.
            fraction: share of a token's nonzero v_j that is kept, the largest by size.
            name: by default "FSRL" and the fraction.

        Raises:
            AdapterError: an invalid fraction, or something else than an adapter.
        """
        if not isinstance(adapter, nn.Module) or not hasattr(adapter, "fraction"):
            raise refusal(AdapterError, "`adapter`", f"a {type(adapter).__name__}", "an FSRLAdapter")
        tensors = {key: parameter.detach().cpu() for key, parameter in adapter.named_parameters()}
        mask: Tensor | None = getattr(adapter, "mask", None)
        settings = {
            "adapter": checksum(tensors)[:16],
            "mask": None if mask is None else mask.nonzero().flatten().tolist(),
            "fraction": fraction,
            "layers": [adapter.layer],
        }

        def make(_seed: int) -> Attachable:
            # The same parameters with a fraction of its own, so that the adapter stays as it is.
            kept = copy.copy(adapter)
            kept.fraction = fraction  # type: ignore[assignment]
            return kept

        # An invalid fraction raises here.
        make(0)
        name = name or ("FSRL" if fraction == 1 else f"FSRL top {fraction:.3g}")
        return cls(name, "adapter", settings, make)

    @classmethod
    def vector(cls, vector: SteeringVector, *, name: str = "") -> Method:
        """Return a vector that is added at one layer, as RepE's.

        Args:
            vector: the vector, not attached.
            name: by default "vector" and its scale.
        """
        settings = {
            "vector": checksum({"vector": vector.vector.cpu()})[:16],
            "scale": vector.scale,
            "positions": vector.positions,
            "layers": [vector.layer],
        }
        return cls(name or f"vector {vector.scale:g}", "vector", settings, lambda _seed: vector)

    @classmethod
    def latents(
        cls,
        sae: FrozenSAE,
        latents: Mapping[int, float | None] | Sequence[int] | LatentSet,
        positions: str = "response",
        *,
        name: str = "",
    ) -> Method:
        """Return steering by latents that are chosen by hand, as `Steering.of_latents`.

        Args:
            sae: the SAE.
            latents: strength of each latent, None to remove it; or a list of latents to remove; or a `LatentSet`.
            positions: tokens that may be edited.
            name: by default the latents with their strengths.

        Raises:
            ValueError: as `Steering.of_latents`.
        """
        chosen = LatentSet.of(latents)
        steering = Steering.of_latents(sae, chosen, positions=positions)
        # The order of JSON's keys does not matter, and neither does that of latents.
        settings = {"latents": asdict(chosen), "positions": positions, "sae": sae.fingerprint}
        name = name or f"latents {chosen}"
        return cls(name, "latents", settings | {"layers": [steering.layer]}, lambda _seed: steering)

    @classmethod
    def tuned(cls, model: nn.Module, *, name: str = "tuned") -> Method:
        """Return a model that answers in place of the compared one, such as the same after fine-tuning.

        Args:
            model: a model of the same architecture, with the same tokens. Merge the weights of a PEFT model first.
            name: name in tables.

        Raises:
            ModelError: a model that is offloaded or not a whole language model.
        """
        inner = base_model(model)
        digest = model_digest(inner)
        if digest is None:
            raise refusal(ModelError, "`model`", "offloaded in part", "one whose weights are all on devices")
        weights = {key: parameter.detach() for key, parameter in inner.named_parameters()}
        return cls(name, "tuned", {"weights": digest}, weights=weights)

    @classmethod
    def prefixed(cls, text: str, *, name: str = "") -> Method:
        """Return the base model with an instruction: a system message, or text before a plain prompt.

        Args:
            text: the instruction.
            name: by default "prefix" and its first words.

        Raises:
            ValueError: an empty text.
        """
        if not text.strip():
            raise refusal(ValueError, "A prefix", "empty", "a text")
        shown = text if len(text) <= 24 else f"{text[:23].rstrip()}…"
        return cls(name or f'prefix "{shown}"', "prefix", {"prefix": text}, prefix=text)

    @classmethod
    def gated(cls, method: Method, gate: Gate, *, name: str = "") -> Method:
        """Return a method that acts on the tokens of an answer that a gate lets through.

        Args:
            method: a method that attaches something, as those of `dspa`, `static`, `adapted` and `vector` do.
            gate: the gate.
            name: by default that of the method, and the gate.

        Raises:
            ValueError: a method that attaches nothing, or has a gate.
        """
        if method.attachable is None or method.gate is not None:
            got, accepted = f"the method {method.name!r}", "one of DSPA, a vector, an adapter or a persona"
            raise refusal(ValueError, "`method`", got, accepted)
        attachable = method.attachable
        return replace(
            method,
            name=name or f"{method.name}, {gate.label}",
            kind="gated",
            settings={**method.settings, **gate.settings()},
            attachable=lambda seed: with_gate(attachable(seed), gate),
            gate=gate,
        )

    @classmethod
    def junction(
        cls,
        head: ValueHead,
        *,
        k: int = 10,
        threshold: float | None = 1.0,
        weight: float = 1.0,
        name: str = "junction",
    ) -> Method:
        """Return Sparse Junction Steering with a value head on the compared model itself.

        Args:
            head: the value head, made with that model.
            k: as for `JunctionProcessor`, like the others.
            threshold: entropy from which on logits are changed.
            weight: factor of the values.
            name: name in tables.

        Raises:
            ValueError: an invalid setting.
        """
        settings = {"k": k, "threshold": threshold, "weight": weight}

        def make(model: CausalLM, pad_token_id: int) -> JunctionProcessor:
            return JunctionProcessor(ValueModel(head, model, pad_token_id), k, threshold, weight)

        JunctionProcessor(lambda _ids, candidates: candidates.float(), k, threshold, weight)
        return cls(name, "junction", {**settings, "head": head.digest}, processor=make)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify what the method does."""
        return digest_of([self.kind, self.settings])


def _check_parts(argument: str, method: Method) -> None:
    if not method.parts or method.gate is not None:
        raise refusal(ValueError, argument, f"the method {method.name!r}", "one that Method.dspa made")


def _settings(parts: Sequence[Parts]) -> dict[str, Any]:
    """Return the settings of a method that steers by some maps, those of the map where it is one."""
    settings = [part.settings() for part in parts]
    return settings[0] if len(settings) == 1 else {"joint": settings}


def _steering(parts: Sequence[Parts]) -> Maker:
    """Return what makes the steering by some maps, for any seed."""
    return lambda _seed: _joined([part.steering() for part in parts])


def _joined(steerings: Sequence[Steering]) -> Attachable | JointSteering:
    return steerings[0] if len(steerings) == 1 else JointSteering(steerings)


def controls_of(
    method: Method,
    names: Sequence[str],
    model: CausalLM,
    layers: str | None,
    densities: Callable[[FrozenSAE], Tensor],
    origin: str,
    share: Callable[[Method], float] | None = None,
) -> list[Method]:
    """Return the controls of a method; Static-SAE, prefixes and junction steering have none.

    Args:
        method: the method.
        names: some of CONTROLS. "wrong layer" is left out where the model has no other layer for it.
        model: the model that is steered.
        layers: dotted path of its decoder layers, for an unknown architecture.
        densities: returns the share of response tokens on which each latent of an SAE is active.
        origin: digest of all that the densities and the shares depend on, but for the method.
        share: returns the share of tokens that a method with a gate acted on; None where that is not measured, and
            there is no random gate.
    """
    made: dict[str, Made] = {}
    if method.gate is not None:
        made = _of_gate(method, method.gate, origin, share)
    elif method.parts:
        made = _of_dspa(method.parts, model, layers, densities, origin)
    elif method.kind == "adapter" and method.attachable is not None:
        adapter = cast(Any, method.attachable(0))

        def random_latents(draw: int) -> Attachable:
            moved: Attachable = adapter.permuted(matched_permutation(densities(adapter.sae), draw))
            return moved

        made = {"random latents": (random_latents, {"densities": origin}, True)}
    elif method.kind == "latents" and method.attachable is not None:
        steering = cast(LatentSteering, method.attachable(0))
        made = {
            "random latents": (lambda draw: _random_latents(steering, densities, draw), {"densities": origin}, True)
        }
    elif method.kind == "vector" and method.attachable is not None:
        made = {"random vector": (partial(random_vector, cast(SteeringVector, method.attachable(0))), {}, True)}
    elif method.kind == "tuned":
        made = {"random change": (None, {}, True)}
    return [
        Method(
            f"{method.name}: {name}",
            "control",
            {**method.settings, "control": name, **settings},
            attachable,
            drawn=drawn,
            weights=method.weights,
            redraw=None if method.weights is None else random_change,
            parts=method.parts if name in OF_GATES else (),
            control_of=method.name,
        )
        for name, (attachable, settings, drawn) in made.items()
        if name in names
    ]


def _random_latents(steering: LatentSteering, densities: Callable[[FrozenSAE], Tensor], draw: int) -> LatentSteering:
    """Return the steering with each latent of its set replaced by one of a similar density, of the same strength."""
    moved = matched_permutation(densities(steering.sae), draw).tolist()
    sets = {
        name: replace(chosen, strengths={moved[latent]: s for latent, s in chosen.strengths.items()})
        for name, chosen in steering.sets.items()
    }
    return LatentSteering(steering.sae, sets, positions=steering.positions)


def _of_dspa(
    parts: Sequence[Parts],
    model: CausalLM,
    layers: str | None,
    densities: Callable[[FrozenSAE], Tensor],
    origin: str,
) -> dict[str, Made]:
    """Return the controls of DSPA, at its own `alpha` and `mode`: all of its maps are changed."""

    def random_set(draw: int) -> Attachable | JointSteering:
        changed = [random_set_map(part.cdmap, densities(part.sae_out), draw) for part in parts]
        return _with_maps(parts, changed)

    def shuffled(draw: int) -> Attachable | JointSteering:
        return _with_maps(parts, [shuffled_map(part.cdmap, draw) for part in parts])

    made: dict[str, Made] = {
        "random set": (random_set, {"densities": origin}, True),
        "shuffled map": (shuffled, {}, True),
    }
    n_layers = len(find_layers(model, layers))
    others = [wrong_layer(required_layer(part.sae_in), required_layer(part.sae_out), n_layers) for part in parts]
    wrong = [layer for layer in others if layer is not None]
    if len(set(wrong)) == len(parts):
        moved = [part.at_layer(layer) for part, layer in zip(parts, wrong, strict=True)]
        made["wrong layer"] = (_steering(moved), {"layer": wrong[0] if len(wrong) == 1 else wrong}, False)
    return made


def _with_maps(parts: Sequence[Parts], maps: Sequence[ConditionalDifferenceMap]) -> Attachable | JointSteering:
    """Return the steering by other maps in place of their own."""
    return _joined([replace(part, cdmap=cdmap).steering() for part, cdmap in zip(parts, maps, strict=True)])


def with_gate(attachable: Attachable | JointSteering, gate: Gate) -> Attachable | JointSteering:
    """Return a copy of something that is not attached, with a gate and the same tensors.

    Raises:
        ValueError: something that takes no gate.
    """
    if isinstance(attachable, JointSteering):
        return JointSteering([cast(Steering, with_gate(part, gate)) for part in attachable.parts])
    if not isinstance(attachable, Gated):
        raise refusal(ValueError, "What a gate is for", f"a {type(attachable).__name__}", "one that acts on tokens")
    copied = copy.copy(attachable)
    copied.gate = gate
    return copied


def _of_gate(method: Method, gate: Gate, origin: str, share: Callable[[Method], float] | None) -> dict[str, Made]:
    """Return the controls of a method with a gate, which are the method with other gates."""
    assert method.attachable is not None
    attachable, other = method.attachable, gate.complemented()
    made: dict[str, Made] = {}
    if share is not None and not isinstance(gate, RandomGate):

        def random_gate(draw: int) -> Attachable | JointSteering:
            return with_gate(attachable(draw), RandomGate(share(method), seed=draw))

        made["random gate"] = (random_gate, {"answers": origin}, True)
    made["complement gate"] = (lambda seed: with_gate(attachable(seed), other), other.settings(), False)
    return made
