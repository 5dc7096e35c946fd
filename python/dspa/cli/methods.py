"""The methods that a command compares or evaluates: their options, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from dspa.cli.generate import BackendOptions, warn_of_other_template
from dspa.cli.latents import LatentOptions, load_latents_sae, without_shared
from dspa.cli.loading import check_model, load_adapter, load_model, load_pairs, load_persona_sae, load_tuned
from dspa.cli.options import (
    AdapterSAEOptions,
    Options,
    RecordedModelOptions,
    RecordedSAEPairOptions,
    changed,
    check_used,
    without_persona,
)
from dspa.cli.tables import print_line
from dspa.config import MODES, SteeringConfig
from dspa.distributed import device_named
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.evaluate.compare.methods import Method
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.personal.persona import Persona
    from dspa.saes.frozen import FrozenSAE
    from dspa.steering.decisions import Gate

    Pair: TypeAlias = tuple[FrozenSAE, FrozenSAE]

STATIC_OPTION = {"help": "Also steer by Static-SAE, the same latents for every prompt, at each setting."}
CONTROLS_OPTION = {
    "help": "Also run the controls of each method: of DSPA a random set, a shuffled map and a wrong layer, of adapters "
    "and chosen latents random latents, of vectors a random vector, of tuned models a random change, and of a gate a "
    "random one and its complement."
}


@dataclass(frozen=True)
class MethodOptions(LatentOptions):
    """The methods that take part besides the base model."""

    map_paths: list[Path] | None = field(
        default=None,
        metadata={"help": "Map of DSPA. May be given several times, like all options of lists below."},
    )
    joint: bool = field(
        default=False,
        metadata={"help": "Steer by all maps at once, of different output layers, instead of by one at a time."},
    )
    alpha: list[float] | None = field(
        default=None, metadata={"help": "Strength; by default 0.2. Every map, mode and alpha is a method."}
    )
    mode: list[str] | None = field(
        default=None, metadata={"help": f"Edits to make: {', '.join(MODES)}; by default ablate."}
    )
    static: bool = field(default=False, metadata=STATIC_OPTION)
    controls: bool = field(default=False, metadata=CONTROLS_OPTION)
    adapter: list[Path] | None = field(default=None, metadata={"help": "FSRL adapter, a folder."})
    fraction: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each token's v that adapters keep; by default 1, all.", "min": 0, "max": 1},
    )
    vector: list[Path] | None = field(
        default=None,
        metadata={"help": "Vector that is added at a layer, such as that of `dspa baseline repe`."},
    )
    tuned: list[Path] | None = field(
        default=None,
        metadata={
            "help": "Folder of a tuned model of the same architecture, or of a PEFT adapter, such as that of "
            "`dspa baseline rahf align`."
        },
    )
    persona: list[Path] | None = field(
        default=None,
        metadata={"help": "Persona, a file that `dspa personal make` wrote; as a control, random personas."},
    )
    prefix: list[str] | None = field(
        default=None,
        metadata={"help": "Instruction to the base model: a system message, or text before a plain prompt."},
    )

    def __post_init__(self) -> None:
        # A value that is given twice would be one method twice.
        for option in fields(self):
            values = getattr(self, option.name)
            for n, value in enumerate(values if isinstance(values, list) else ()):
                if value in values[:n]:
                    raise refusal(ValueError, f"`{option.name}`", f"{value} twice", "different values")

    @property
    def empty(self) -> bool:
        """True where nothing but the base model takes part."""
        return not (self.controlled or self.prefix)

    @property
    def controlled(self) -> bool:
        """True where a method takes part that has controls, which a prefix has not."""
        return bool(self.map_paths or self.adapter or self.vector or self.tuned or self.persona or self.chosen)

    @property
    def read(self) -> dict[str, Path]:
        """Files and folders that are read, by what gives them."""
        given = {"--map": self.map_paths, "--adapter": self.adapter, "--vector": self.vector, "--tuned": self.tuned}
        given |= {"--persona": self.persona, "--latents": self.latents}
        return {f"{option} {path}": path for option, paths in given.items() for path in paths or []}

    def load(
        self,
        on: RecordedModelOptions,
        pair: RecordedSAEPairOptions,
        adapter_sae: AdapterSAEOptions,
        config: SteeringConfig,
        ops: BackendOptions,
        gate: Callable[[Any, Any], Gate | None] | None = None,
    ) -> LoadedMethods:
        """Load the model, and the methods in the order of their options; the base model is not among them.

        Args:
            on: the model and device.
            pair: the SAEs of maps.
            adapter_sae: the SAE of adapters.
            config: settings of steering, but for `alpha` and `mode`.
            ops: implementation of steering.
            gate: returns, for the model and its tokenizer, the gate with which methods also run; None for none.

        Raises:
            ValueError: an option of maps or adapters without one, or anything that cannot be loaded.
        """
        from dspa.evaluate.compare.methods import Method
        from dspa.maps.cdmap import ConditionalDifferenceMap
        from dspa.personal.methods import persona_methods
        from dspa.personal.persona import Persona
        from dspa.steering.joint import check_layers
        from dspa.steering.vector import SteeringVector

        self._check_used(pair, adapter_sae, config, ops)
        if self.joint and len(self.map_paths or []) < 2:
            raise refusal(ValueError, "--joint", "given with fewer than two maps", "--map twice or more")
        chosen = self.sets()
        prefixed = _prefixed(self.prefix or [])
        vectors = {path: SteeringVector.load(path) for path in self.vector or []}
        modes, alphas = self.mode or [config.mode], self.alpha or [config.alpha]
        settings = [replace(config, alpha=alpha, mode=mode) for mode in modes for alpha in alphas]
        maps = {path: ConditionalDifferenceMap.load(path) for path in self.map_paths or []}
        personas = {path: Persona.load(path) for path in self.persona or []}
        if self.joint:
            check_layers("--map with --joint", [cdmap.meta.layer_out for cdmap in maps.values()])
        model, tokenizer, pairs, adapters, saes = _load(
            on, maps, pair, self.adapter or [], adapter_sae, personas, ops.backend
        )
        methods = list[Method]()
        labels = path_labels(maps)
        # Maps that steer together.
        sets = [list(maps)] if self.joint else [[path] for path in maps]
        for paths in sets:
            for one in settings:
                label = " + ".join(labels[path] for path in paths)
                name = f"{one.mode} {one.alpha:g}" + (f", {label}" if len(maps) > 1 else "")
                parts = [
                    Method.dspa(*pairs[path], maps[path], one, backend=ops.backend, screen=ops.screen) for path in paths
                ]
                methods.append(Method.joint(parts, name=f"DSPA {name}"))
                if self.static:
                    methods.append(Method.static(methods[-1], name=f"Static-SAE {name}"))
        for path, label in path_labels(adapters).items():
            for kept in self.fraction or [1.0]:
                top = "" if kept == 1 else f" top {kept:.3g}"
                methods.append(Method.adapted(adapters[path], fraction=kept, name=f"FSRL {label}{top}"))
        for path, label in path_labels(vectors).items():
            methods.append(Method.vector(vectors[path], name=f"vector {label}"))
        for path, label in path_labels(self.tuned or []).items():
            methods.append(Method.tuned(load_tuned(path, on), name=f"tuned {label}"))
        named = {f"persona {label}": path for path, label in path_labels(personas).items()}
        for name, path in named.items():
            methods += persona_methods(personas[path], saes[path], name, control=self.controls)
        if chosen:
            edited = [*(sae_out for _, sae_out in pairs.values()), *(a.sae for a in adapters.values()), *saes.values()]
            sae = load_latents_sae(adapter_sae, device_named(on.device), edited).to(dtype=model.dtype)
            positions = config.positions
            methods += [Method.latents(sae, one, positions, name=f"latents {name}") for name, one in chosen.items()]
        methods = _with_gated(methods, None if gate is None else gate(model, tokenizer))
        return LoadedMethods(
            *(model, tokenizer, [*methods, *prefixed], list(maps.values()), list(adapters)),
            personas={name: personas[path] for name, path in named.items()},
        )

    def _check_used(
        self,
        pair: RecordedSAEPairOptions,
        adapter_sae: AdapterSAEOptions,
        config: SteeringConfig,
        ops: BackendOptions,
    ) -> None:
        """Raise `ValueError` for an option of what is not there."""
        defaults = {option.name: option.default for option in fields(self)}
        given = [name for name in defaults if getattr(self, name) and getattr(self, name) != defaults[name]]
        of_maps = [f"--{name}" for name in ("joint", "alpha", "mode", "static") if name in given]
        of_maps += [*changed(pair), *changed(config), *changed(ops, "backend")]
        check_used("--map", self.map_paths, without_shared(without_persona(of_maps, self.persona), self.chosen))
        check_used("--adapter", self.adapter, ["--fraction"] if self.fraction else [])
        check_used("--adapter or --latent", self.adapter or self.chosen, changed(adapter_sae))
        of_controls = ["--controls"] if "controls" in given else []
        check_used("a method that has controls, such as --map,", self.controlled, of_controls)

    def print_uncontrolled(self) -> None:
        """Say that controls were not run, where there are some."""
        if self.controlled and not self.controls:
            print_line(
                "Controls were not run: without them, nothing shows that an effect is due to what a method chose or "
                "learned, and it is not a result of steering. Add --controls."
            )


def _with_gated(methods: Sequence[Method], gate: Gate | None) -> list[Method]:
    """Return methods, each followed by itself with a gate if it can have one and is no control."""
    from dspa.evaluate.compare.methods import Method

    if gate is None:
        return list(methods)
    gated = {
        m.name: Method.gated(m, gate) for m in methods if m.kind in ("DSPA", "adapter", "vector", "latents", "persona")
    }
    if not gated:
        raise refusal(
            ValueError,
            "--gate",
            "given without a method that acts on tokens",
            "--map, --adapter, --vector, --latent or --persona",
        )
    return [made for method in methods for made in (method, gated.get(method.name)) if made is not None]


# In the panel of a command's own options.
PANEL = Options("Options", names={"map_paths": "--map"})
Methods = Annotated[MethodOptions, PANEL]
SharedSteering = Annotated[SteeringConfig, Options("Steering", without=["alpha", "mode", "ridge", "delta"])]


@dataclass(frozen=True, eq=False)
class LoadedMethods:
    """A model in evaluation mode with its tokenizer, and the methods that take part besides it.

    Attributes:
        model: the model, to which nothing is attached.
        tokenizer: its tokenizer.
        methods: the methods, of different names.
        maps: the maps.
        adapters: folders of the adapters.
        personas: the personas, by the names of their methods.
    """

    model: Any
    tokenizer: Any
    methods: list[Method]
    maps: list[ConditionalDifferenceMap]
    adapters: list[Path]
    personas: dict[str, Persona]

    def warn_of_other_template(self, given: Mapping[str, Any] | None) -> None:
        """Warn where prompts get other values for the chat template than conversations of a map or adapter got."""
        from dspa.fsrl.training import trained_template

        made = [("--map", cdmap.meta.chat_template_kwargs) for cdmap in self.maps]
        made += [("--adapter", trained_template(self.tokenizer, path)[1]) for path in self.adapters]
        warn_of_other_template(made, given)


def _load(
    on: RecordedModelOptions,
    maps: Mapping[Path, ConditionalDifferenceMap],
    pair: RecordedSAEPairOptions,
    adapter_paths: Sequence[Path],
    adapter_sae: AdapterSAEOptions,
    personas: Mapping[Path, Persona],
    backend: str,
) -> tuple[Any, Any, dict[Path, Pair], dict[Path, FSRLAdapter], dict[Path, FrozenSAE]]:
    """Load a model, its tokenizer, the SAEs of maps, adapters, and the SAEs of personas."""
    from dspa.models.sources import may_be_one

    # The model last: the others are quick to load, and wrong more often.
    device = device_named(on.device)
    check_model(on)
    pairs = dict(zip(maps, load_pairs(pair, device, maps.values()), strict=True))
    adapters = {path: load_adapter(path, adapter_sae, device, backend) for path in adapter_paths}
    saes: dict[Path, FrozenSAE] = {}
    for path, persona in personas.items():
        loaded = [*(sae for both in pairs.values() for sae in both), *saes.values()]
        saes[path] = load_persona_sae(persona, pair, device, loaded)
    made_with = [*(cdmap.sources.get("model") for cdmap in maps.values()), *(a.trained_on for a in adapters.values())]
    made_with += [persona.record.sources.get("model") for persona in personas.values()]
    recorded = [source for source in made_with if source is not None]
    if on.model is None and not may_be_one(source.digest for source in recorded):
        raise ValueError(
            "Maps, adapters and personas were made with different models. Pass --model to choose one, and "
            "--other-weights to use it with all."
        )
    model, tokenizer = load_model(on, next(iter(recorded), None))
    for adapter in adapters.values():
        adapter.sae = adapter.sae.to(dtype=model.dtype)
    as_model = {
        path: (sae_in.to(dtype=model.dtype), sae_out.to(dtype=model.dtype)) for path, (sae_in, sae_out) in pairs.items()
    }
    return model, tokenizer, as_model, adapters, {path: sae.to(dtype=model.dtype) for path, sae in saes.items()}


def _prefixed(texts: Sequence[str]) -> list[Method]:
    """Return the methods of prefixes, with whole texts for names where those of two begin alike."""
    from dspa.evaluate.compare.methods import Method

    methods = [Method.prefixed(text) for text in texts]
    if len({method.name for method in methods}) < len(methods):
        methods = [Method.prefixed(text, name=f'prefix "{text}"') for text in texts]
    return methods


def path_labels(paths: Collection[Path]) -> dict[Path, str]:
    """Return what files or folders are called in tables: how their names begin, or paths where these are alike."""
    names = {path: path.name.split(".")[0] for path in paths}
    return names if len(set(names.values())) == len(names) else {path: str(path) for path in paths}
