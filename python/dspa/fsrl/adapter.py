"""The adapter: an `nn.Module` that moves the latents of a frozen SAE at one layer of a frozen model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import AdapterError, ModelError
from dspa.files import checksum, read_tensors, write_atomically, write_tensors
from dspa.fsrl.config import FSRLConfig
from dspa.models.attachment import Attachable, Attachment
from dspa.models.layers import base_model, decoder_layers, device_of
from dspa.models.reading import forget_graphs, hidden
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer
from dspa_kernels import fsrl_residual

FORMAT = "dspa.fsrl.1"
RECORD, TENSORS = "adapter.json", "adapter.safetensors"


@dataclass
class Moves:
    """How far latents were moved: a pair of tensors [B, T] for each pass of the layer, sum and number of the v_j of
    each token that are not 0."""

    l1: list[Tensor] = field(default_factory=list)
    l0: list[Tensor] = field(default_factory=list)


class FSRLAdapter(Attachable, nn.Module):
    """`h' = h + (ReLU(f + v) - f) W_dec` with `v = act(h W_a^T + b_a)` and the latents f of `sae` (arXiv 2509.12934).

    Trainable are `W_a` [d_sae, d_in], a row a latent, `b_a` [d_sae], and for soft_threshold `threshold` [d_sae], for
    jumprelu `log_threshold` [d_sae]; all fp32. They start so small that nothing is changed beyond rounding. W_a is
    multiplied in the dtype of the residual.

    Args:
        sae: the SAE, which stays as it is.
        config: the published settings by default.
        backend: of `dspa_kernels.fsrl_residual`.

    Attributes: `mask` [d_sae] bool, True for latents that may be moved, None for all; `fraction`, of the v_j of a token
    that are not 0 the part that is kept, the largest by size.

    Raises:
        AdapterError: another `sae` or `config`. ModelError: an SAE that does not say its layer.
    """

    def __init__(self, sae: FrozenSAE, config: FSRLConfig | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        config = config or FSRLConfig()
        for name, value, kind in (("sae", sae, FrozenSAE), ("config", config, FSRLConfig)):
            if not isinstance(value, kind):
                raise AdapterError(f"`{name}` is a {type(value).__name__}; accepted: a {kind.__name__}.")
        required_layer(sae)
        self.sae, self.config, self.backend = sae, config, backend
        self._mask: Tensor | None = None
        self._fraction = 1.0
        start = self.config.initial_threshold
        generator = torch.Generator().manual_seed(self.config.seed)
        W_a = (2 * torch.rand(sae.d_sae, sae.d_in, generator=generator) - 1) * start
        self.W_a = nn.Parameter(W_a.to(sae.device))
        self.b_a = nn.Parameter(torch.zeros(sae.d_sae, device=sae.device))
        thresholds = torch.full((sae.d_sae,), start, device=sae.device)
        if self.config.activation == "soft_threshold":
            self.threshold = nn.Parameter(thresholds)
        elif self.config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(thresholds.log())
        self._moves: Moves | None = None
        self._ran = False
        self._cast: Tensor | None = None
        self._cast_version = 0

    def forward(self, h: Tensor) -> Tensor:
        """Residuals [..., d_in] with their latents moved, in their dtype."""
        steered, l1, l0 = fsrl_residual(
            h.reshape(-1, h.shape[-1]),
            self.sae.weights,
            self._weights(h.dtype),
            self.b_a,
            self.thresholds,
            self.config.activation,
            bandwidth=self.config.bandwidth,
            mask=self._mask,
            fraction=self._fraction,
            backend=self.backend,
        )
        if self._moves is not None:
            self._moves.l1.append(l1.view(h.shape[:-1]))
            self._moves.l0.append(l0.view(h.shape[:-1]))
        return steered.view(h.shape)

    @property
    def mask(self) -> Tensor | None:
        """[d_sae] bool, True for latents that may be moved; None for all."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if mask is not None and (
            not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.b_a.shape
        ):
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise AdapterError(f"`mask` is {got}; accepted: a tensor of torch.bool [{self.sae.d_sae}], or None.")
        self._mask = None if mask is None else mask.to(self.b_a.device)

    @property
    def fraction(self) -> float:
        """Of the v_j of a token that are not 0, the part that is kept, the largest by size."""
        return self._fraction

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not number or not 0 <= fraction <= 1:
            raise AdapterError(f"`fraction` is {fraction!r}; accepted: a number from 0 (keep none) to 1 (keep all).")
        self._fraction = float(fraction)

    @property
    def thresholds(self) -> Tensor | None:
        """Threshold of each latent, [d_sae], >= 0; None for relu."""
        if self.config.activation == "jumprelu":
            return self.log_threshold.exp()
        return self.threshold.clamp(min=0) if self.config.activation == "soft_threshold" else None

    @torch.no_grad()
    def steering_vector(self, h: Tensor) -> Tensor:
        """v [..., d_sae] of residuals [..., d_in], dense and in fp32, before mask and fraction."""
        W_a, theta = self._weights(h.dtype).float(), self.thresholds
        u = nn.functional.linear(h.float(), W_a, self.b_a)
        if theta is None:
            return u.relu()
        if self.config.activation == "jumprelu":
            return u.where(u > theta, 0)
        return (u - theta).relu() - (-u - theta).relu()

    def _weights(self, dtype: torch.dtype) -> Tensor:
        """W_a in the dtype of 16-bit residuals; where nothing is trained, converted once and kept."""
        if dtype not in (torch.bfloat16, torch.float16):
            return self.W_a
        if self.training or (torch.is_grad_enabled() and self.W_a.requires_grad):
            return self.W_a.to(dtype)
        stale = self._cast is None or self._cast.dtype != dtype
        # A compiled graph takes what was there when it was traced.
        if not torch.compiler.is_compiling():
            stale = stale or self._cast_version != self.W_a._version
        if stale:
            self._cast, self._cast_version = self.W_a.detach().to(dtype), self.W_a._version
        return self._cast  # type: ignore[return-value]

    def train(self, mode: bool = True) -> FSRLAdapter:
        """Training mode, or evaluation mode, in which a 16-bit copy of W_a is kept for 16-bit residuals."""
        self._cast = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSRLAdapter:
        probe = fn(torch.zeros((), device=self.sae.device))
        if probe.dtype != torch.float32:
            raise TypeError(
                f"An FSRLAdapter cannot become {probe.dtype}: small steps of training would be rounded away. It "
                "multiplies in the dtype of the residual as it is."
            )
        self._cast, self.sae = None, self.sae.to(probe.device)
        self._mask = None if self._mask is None else self._mask.to(probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # Attaching

    def attach(self, model: nn.Module, *, layers: str | None = None, model_name: str | None = None) -> FSRLAdapter:
        """Move the latents of every token of `model`, until `detach()` or the end of a `with` block.

        The adapter and its SAE go to where the layer is. Nothing is added to the model's modules, so that its own
        parameters stay apart; `save_pretrained`, which would lose the adapter, refuses meanwhile. What was compiled
        before is compiled anew, here and at `detach()`.

        Args:
            model: a transformers causal language model, or one in a PEFT wrapper.
            layers: dotted path of its list of decoder layers, for an architecture that is not a known one.
            model_name: what the model is, where its own name or path does not tell.

        Raises:
            ModelError: attached already; an SAE of another width, layer or model.
        """
        inner = base_model(model)
        self.check_unattached()
        stack = decoder_layers(inner, layers)
        check_sae("sae", self.sae, inner, len(stack), model_name)
        attachment = Attachment.of(inner)
        taken = [each for each in attachment.attached if isinstance(each, FSRLAdapter)]
        if any(each.sae.layer == self.sae.layer for each in taken):
            raise ModelError(f"Layer {self.sae.layer} of this model has an adapter already: dspa.detach(model) first.")
        layer = stack[required_layer(self.sae)]
        self.to(device_of(layer))
        self._attached_to(attachment, layer.register_forward_hook(self._edit, prepend=True).remove)
        forget_graphs()
        return self

    def detach(self) -> None:
        """Leave the model as it was. Does nothing when not attached."""
        if self._attachment is not None:
            forget_graphs()
        super().detach()

    @contextmanager
    def recording(self) -> Iterator[Moves]:
        """Collect how far latents are moved, pass by pass; l1 is differentiable where the pass is."""
        before, self._moves = self._moves, Moves()
        try:
            yield self._moves
        finally:
            self._moves = before

    def _edit(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self._ran = True
        if not self.enabled:
            return None
        steered = self(hidden(output))
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    # What an `Attachment` asks

    @property
    def unsaved(self) -> str:
        """The adapter itself."""
        return (
            f"save_pretrained would write the model without the FSRL adapter at layer {self.sae.layer}. Save that by "
            "adapter.save(folder), and detach() it before the model is saved."
        )

    def before_call(self) -> None:
        """Forget that the hook ran before."""
        self._ran = False

    def after_call(self, _token: None) -> None:
        """Raise `ModelError` if the hook did not run."""
        if not self._ran:
            raise ModelError(
                f"The hook at layer {self.sae.layer} did not run, so the adapter moved nothing: this generate() "
                "does not go through the model's layers."
            )

    # Files

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: adapter.safetensors, and adapter.json with settings and the SAE's fingerprint."""
        path = Path(path)
        if path.is_file() or not path.parent.is_dir():
            raise AdapterError(f"The adapter's folder is {path}; accepted: a folder, in one that exists.")
        path.mkdir(exist_ok=True)
        tensors = {name: parameter.detach().cpu() for name, parameter in self.named_parameters()}
        record = {
            "format": FORMAT,
            "config": asdict(self.config),
            "sae": {name: getattr(self.sae, name) for name in ("fingerprint", "layer", "model_name", "d_in", "d_sae")},
            "sha256": checksum(tensors),
            "package": version("dspa-kernels"),
        }
        write_tensors(path / TENSORS, tensors, {})
        write_atomically(path / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, sae: FrozenSAE, *, backend: str = "auto") -> FSRLAdapter:
        """The adapter in the folder `path`, for the SAE that it was trained with, on the SAE's device, not trainable
        until `train()` and `requires_grad_()`.

        Raises:
            AdapterError: a folder that holds none, damaged files, an SAE of another fingerprint, layer or width.
        """
        record = read_record(Path(path))
        _check_same_sae(record["sae"], sae, path)
        try:
            missing = [each.name for each in fields(FSRLConfig) if each.name not in record["config"]]
            if missing:
                raise AdapterError(f"`config` has no {', '.join(missing)}")
            adapter = cls(sae, FSRLConfig(**record["config"]), backend=backend)
            names = [name for name, _ in adapter.named_parameters()]
            tensors = read_tensors(Path(path) / TENSORS, names)
            adapter.load_state_dict(tensors)
        except OSError as error:
            raise AdapterError(f"{path} cannot be read ({error}).") from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(f"{path} is damaged ({error}). Copy or train it again.") from error
        if checksum(tensors) != record["sha256"]:
            raise AdapterError(f"{path} is damaged: {TENSORS} and {RECORD} are of two different adapters.")
        return adapter.requires_grad_(False).eval()

    def __repr__(self) -> str:
        return f"FSRLAdapter({self.config.activation}, l1={self.config.l1:g}, {self.sae!r})"


def read_record(path: Path) -> dict[str, Any]:
    """What the folder of an adapter says of it. Raises `AdapterError` for another folder."""
    if not (path / RECORD).is_file():
        raise AdapterError(f"{path} holds no {RECORD}; accepted: a folder that FSRLAdapter.save wrote.")
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise AdapterError(f"{path} is of format {record['format']!r}; this version reads {FORMAT!r}.")
        return record | {"config": dict(record["config"]), "sae": dict(record["sae"]), "sha256": str(record["sha256"])}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path / RECORD} is damaged ({type(error).__name__}: {error}).") from error


def _check_same_sae(theirs: dict[str, Any], sae: FrozenSAE, path: str | Path) -> None:
    for name in ("d_in", "d_sae", "layer", "fingerprint"):
        if theirs.get(name) != getattr(sae, name):
            raise AdapterError(
                f"The adapter in {path} was trained with an SAE of {name} {theirs.get(name)!r} (layer "
                f"{theirs.get('layer')!r}, fingerprint {theirs.get('fingerprint')!r}) and `sae` has "
                f"{getattr(sae, name)!r} ({sae!r}, fingerprint {sae.fingerprint!r}). Load that SAE."
            )
