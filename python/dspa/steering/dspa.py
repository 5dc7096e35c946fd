"""The online part of DSPA: choose the latents of each prompt, then edit each token where they are active."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspa.config import SteeringConfig
from dspa.errors import ModelError, refusal
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.provenance import check_provenance
from dspa.models.attachment import Attachment
from dspa.models.layers import (
    NOT_FINITE,
    CausalLM,
    base_model,
    check_model_name,
    device_of,
    loaded_name,
)
from dspa.models.prompts import Prompts
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_saes, required_layer
from dspa.steering.calls import SteeredCall
from dspa.steering.counters import Counters
from dspa.steering.decisions import Gate
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering, left_to_latent_sets
from dspa.steering.plans import check_device, plan_prompts
from dspa.steering.recorded import Recorded
from dspa.steering.trace import Trace
from dspa_kernels import (
    BackendError,
    MapWeights,
    SteeringPlan,
    available_backends,
)


class Steering(Recorded, nn.Module):
    """Steering of a model's `generate()` while attached, without touching its weights.

    ```python
    with dspa.Steering(sae_in, sae_out, cdmap).attach(model):
        model.generate(**inputs, max_new_tokens=200)
    ```

    Each prompt is read once up to `sae_in.layer` and chooses its latents of `sae_out`. Every token that predicts a
    response token is then edited at `sae_out.layer` where those latents are active. A forward pass outside of
    `generate()` is steered within `responses(starts)` and refused otherwise.

    `plan` is the plan of the latest call, one row per prompt, in places of `cdmap.columns`. With `record=True`, `trace`
    holds every edit: `print(steering.trace)` shows the most edited latents, with the tokens that they promote, and the
    most edited tokens, with their text where `steering.trace.tokenizer` is set. `recording()` gives a trace of its own.

    Threads and asyncio tasks may share a Steering: each call carries its own plan, counters and traces. `plan` and
    `trace` are those of all threads, and settings cannot be changed.

    Attaching moves the SAEs to where their layers compute. Compile the model afterwards: it is compiled anew for each
    `attach()`, so call `torch.compiler.reset()` now and then in a long sweep.

    Args:
        sae_in: the SAE that gates, with which the map was made.
        sae_out: the SAE whose latents are edited, with which the map was made.
        cdmap: the conditional-difference map. If it has a calibration, a second copy of the output SAE's encoder is
            kept, its rows in the order of the hot latents.
        config: settings of steering.
        backend: "auto", "reference", "triton" or "cuda". "cuda" has kernels for the decoding step alone: up to 8
            sequences in bf16 or fp16 like the SAEs, which do not normalise. "auto" then does the rest.
        record: keep a record of every edit in `trace`. It holds each edited token's largest latent, and so costs a
            read of the whole encoder for every token with an active selected latent.
        screen: "none", or "int5": read an int5 copy of the output SAE's encoder first, and the encoder itself only
            where the copy does not decide. The result is the same. Adds five bits for each number of the encoder.
        gate: which tokens of an answer may be edited, as a `dspa.EntropyGate` says; None for all.

    Raises:
        BackendError: a backend that cannot run here.
        MapError: the map belongs to other SAEs.
        TypeError: an argument of another type.
        ValueError: an unknown backend or screen, or a k larger than the width of its SAE.
    """

    plan_names = ("slots", "signs")

    def __init__(
        self,
        sae_in: FrozenSAE,
        sae_out: FrozenSAE,
        cdmap: ConditionalDifferenceMap,
        config: SteeringConfig | None = None,
        *,
        backend: str = "auto",
        record: bool = False,
        screen: str = "none",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate, record=record)
        self._config = config or SteeringConfig()
        for name, value, kind in (
            ("sae_in", sae_in, FrozenSAE),
            ("sae_out", sae_out, FrozenSAE),
            ("cdmap", cdmap, ConditionalDifferenceMap),
            ("config", self._config, SteeringConfig),
        ):
            if not isinstance(value, kind):
                raise refusal(TypeError, f"`{name}`", f"a {type(value).__name__}", f"a dspa.{kind.__name__}")
        _check_backend(backend)
        self._prompt_backend = "auto" if backend == "cuda" else backend
        cdmap.check_saes(sae_in, sae_out)
        cdmap.check_sizes(self.config)
        self.sae_in, self.sae_out, self.cdmap = sae_in, sae_out, cdmap
        self.backend, self.screen = backend, screen
        self.plan: SteeringPlan | None = None
        self.trace = self._new_trace(record)
        self._weights = MapWeights.gather(cdmap.columns, cdmap.values, sae_out.weights)
        self._stream = cdmap.encoder_stream(sae_out, screen)
        self._warned = False
        self._counters = Counters(sae_out.device)

    def extra_repr(self) -> str:
        """Return one line for `print(steering)`."""
        added = self._stream.added_bytes(self.sae_out.weights) / 1e6
        return (
            f"layers {self.sae_in.layer} -> {self.sae_out.layer}, {len(self.cdmap.columns)} columns, "
            f"{len(self.cdmap.hot)} hot latents, screen={self.screen!r}, {added:.1f} MB added to the SAE, {self.config}"
        )

    @classmethod
    def of_latents(
        cls,
        sae: FrozenSAE,
        latents: Mapping[int, float | None] | Sequence[int] | LatentSet,
        *,
        mode: str = "augment",
        when: str = "active",
        positions: str = "response",
        record: bool = False,
        gate: Gate | None = None,
    ) -> LatentSteering:
        """Return steering by latents that you choose, in units of the latents themselves. It needs no map.

        ```python
        with dspa.Steering.of_latents(sae, {971: 4.0, 77: -2.0}).attach(model):
            model.generate(**inputs)
        ```

        Args:
            sae: the SAE.
            latents: strength of each latent, None to remove it; or a list of latents to remove; or a `LatentSet`, for
                which `mode` and `when` are not read.
            mode: "augment", which adds the strength, also a negative one; "ablate", which subtracts it, down to 0; or
                "clamp", which sets the latent to it.
            when: "active", only where the latent is active; or "always", at every token, as Neuronpedia does.
            positions: as for `SteeringConfig`.
            record: keep a record of every edit in `trace`.
            gate: which tokens of an answer may be edited, as a `dspa.EntropyGate` says; None for all.

        Raises:
            SAEError: an SAE of another place than the output of a decoder layer.
            ValueError: no latent, one that the SAE does not have, or an invalid strength or setting.
        """
        sets = {"latents": LatentSet.of(latents, mode=mode, when=when)}
        return LatentSteering(sae, sets, positions=positions, record=record, gate=gate)

    @property
    def config(self) -> SteeringConfig:
        """Settings of steering. For others, make another Steering."""
        return self._config

    @property
    def positions(self) -> str:
        """Tokens that may be edited, `config.positions`."""
        return self.config.positions

    @property
    def paths(self) -> dict[str, int]:
        """Number of rows of hidden states by what became of them, and what they cost. Waits for the device.

        - "unsteered": before the response, or padding.
        - "not_finite": NaN, infinite, or so large that a norm overflows (2**56): left as they were. Edited rows that
          became so count here too, at least once each.
        - "inactive": no selected latent was active, left as they were.
        - "settled": all selected latents went to 0, as a lower bound on the largest latent showed.
        - "streamed": the largest latent itself was needed.
        - "encoder_rows_read": encoder rows read in full for the streamed rows. It depends on timing if the read may
          stop early.
        """
        return self._counters.total()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Steering:
        probe = fn(torch.zeros((), dtype=torch.float32, device=self.sae_out.device))
        if probe.dtype != torch.float32:
            raise TypeError(
                f"Steering cannot become {probe.dtype}: the dtype of an SAE's weights decides which latents are "
                "active. Convert the SAEs, FrozenSAE.to(dtype=...), and make a new Steering."
            )
        self._place(probe.device, probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _place(self, device_in: torch.device, device_out: torch.device) -> None:
        moves = device_out != self.sae_out.device
        self.sae_in, self.sae_out = self.sae_in.to(device_in), self.sae_out.to(device_out)
        self._weights, self.cdmap = self._weights.to(device_out), self.cdmap.to(device_out)
        if moves:
            self._stream = self.cdmap.encoder_stream(self.sae_out, self.screen)
            self._counters = self._counters.to(device_out)

    # Attaching

    @property
    def layer(self) -> int:
        """Layer of the output SAE."""
        return required_layer(self.sae_out)

    @property
    def reads(self) -> tuple[int, ...]:
        """Layer of the input SAE."""
        return (required_layer(self.sae_in),)

    @property
    def model_digest(self) -> str:
        """Digest of the weights that the map was made with, empty if it does not record them."""
        return self.cdmap.model_digest

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        check_saes(self.sae_in, self.sae_out, model, len(stack), model_name)
        check_model_name("The map was made with", self.cdmap.meta.model_name, model_name or loaded_name(model))
        check_provenance(self.cdmap.meta.attention, model, stack)
        self._place(*(device_of(stack[required_layer(sae)]) for sae in (self.sae_in, self.sae_out)))
        self._mark_static(self._stream.arguments(), self._weights.latents())
        self._name_keywords()

    def _new_trace(self, recorded: bool = True) -> Trace:
        """Return an empty trace. The digest of the map, which reads all of it, is for one that is `recorded`."""
        return Trace(promoted=self.cdmap.promoted.get("sae_out"), map_digest=self.cdmap.digest if recorded else "")

    # One call of the model

    @contextmanager
    def checked_call(self) -> Iterator[None]:
        """Raise `ModelError` at the end of a call that was not steered, or met residuals that are not finite.

        Raise `SAEError` or `MapError` at its beginning if an SAE or the map was changed.
        """
        for part in (self.sae_in, self.sae_out, self.cdmap):
            part.check_unchanged()
        with super().checked_call():
            call = self._innermost(SteeredCall)
            assert call is not None and call.counters is not None
            try:
                yield
                if call.counted("not_finite"):
                    raise ModelError(
                        f"Hidden states at layer {self.layer} are NaN or infinite, as they came or by their edit "
                        f"(alpha={self.config.alpha:g}). {NOT_FINITE} Or lower alpha."
                    )
            finally:
                self._counters.give_back(call.counters)

    def _new_call(self) -> SteeredCall:
        counters = self._counters.borrow()
        return SteeredCall(self, counters=counters, before=tuple(counters.tolist()), traces=self._traces())

    def _plan(self, prompts: Prompts, call: SteeredCall) -> dict[str, Tensor]:
        """Return the plan of each prompt, which becomes the latest."""
        self._check_cache(prompts)
        assert self._attachment is not None
        plan = plan_prompts(
            self._attachment.residual(prompts, self.reads[0], self._layers),
            prompts,
            sae_in=self.sae_in,
            cdmap=self.cdmap,
            config=self.config,
            backend=self._prompt_backend,
        )
        self._warn_if_empty(plan)
        self.plan = plan
        self._number(call)
        plan = left_to_latent_sets(plan, self._weights.columns, self._attachment, self.layer)
        return {"slots": plan.slots, "signs": plan.signs}

    def _warn_if_empty(self, plan: SteeringPlan) -> None:
        """Warn the first time that no prompt of a call selects a latent."""
        if self._warned or bool((plan.slots >= 0).any()):
            return
        self._warned = True
        warnings.warn(
            "No prompt of this call selects a latent to edit, so that its text is the base model's: the map's rows for "
            "its latents are 0 where this mode and scoring look. Later such calls do not warn.",
            stacklevel=2,
        )

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Edit the residual at the output of layer `l_out` (steps 4 and 5)."""
        gated = self._gated(h, kwargs)
        if gated is None:
            return None
        check_device("sae_out", self.sae_out, h)
        (positions, gate), call = gated, kwargs[self._keys["call"]]
        plan = SteeringPlan(*(kwargs[self._keys[name]].to(h.device) for name in self.plan_names))
        settings: dict[str, Any] = {
            "alpha": self.config.alpha,
            "stream": self._stream,
            "paths": call.counters,
            "backend": self.backend if h.shape[1] == 1 else self._prompt_backend,
            **gate,
        }
        return self._steer(h, kwargs, positions, (self.sae_out.weights, self._weights), plan, **settings)


def _check_backend(backend: str) -> None:
    backends = available_backends()
    if backend not in ("auto", *backends):
        raise refusal(ValueError, "`backend`", repr(backend), ", ".join(("auto", *backends)))
    if backend != "auto" and not backends[backend].available:
        reason = backends[backend].reason
        raise BackendError(f"backend={backend!r} cannot run here: {reason}. Use 'auto' or 'reference'.")


def attached_steerings(model: nn.Module) -> list[Steering]:
    """Return every Steering that is attached to `model`."""
    return [other for other in Attachment.of(base_model(model)).attached if isinstance(other, Steering)]


def detach(model: nn.Module) -> None:
    """Detach everything from `model`: every Steering and every adapter."""
    for attachable in list(Attachment.of(base_model(model)).attached):
        attachable.detach()
