"""The adapter: an `nn.Module` that moves latents of a frozen SAE at one layer of a frozen model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from dspa.errors import AdapterError, refusal
from dspa.files import check_seal, checksum, read_header, read_tensors, sealed, warn_unsealed, write_tensors
from dspa.fsrl.config import FSRLConfig
from dspa.models.layers import CausalLM, device_of
from dspa.models.scopes import Scope
from dspa.models.sources import Source
from dspa.outputs import write_atomically
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer
from dspa.schemas import Count, Fraction, OneOf, PositiveInt, Text, check, read_json, schema
from dspa.snapshot import Snapshot
from dspa.steering.calls import SteeredCall
from dspa.steering.decisions import Gate
from dspa.steering.gated import Gated
from dspa_kernels import fsrl_residual, product

FORMAT = "dspa.fsrl.1"
RECORD, TENSORS = "adapter.json", "adapter.safetensors"
AGAIN = "Copy or train it again."


@schema
class RecordedSAE:
    """The SAE that an adapter was trained with, as `FrozenSAE` names its facts."""

    fingerprint: Text
    layer: Count
    model_name: Text | None
    d_in: PositiveInt
    d_sae: PositiveInt


@schema
class AdapterRecord:
    """The content of adapter.json.

    Attributes:
        format: FORMAT.
        config: settings of the adapter.
        sae: the SAE that it was trained with.
        sources: where "model" and "sae" were loaded from; empty in folders of earlier versions.
        sha256: checksum of the tensors.
        package: version of the package that wrote it.
        model_digest: the weights that it was trained with, as `dspa.models.sources.model_digest` gives them; empty in
            folders of earlier versions.
        seal: digest of all else; empty in folders of earlier versions.
    """

    format: Annotated[str, OneOf((FORMAT,))]
    config: FSRLConfig
    sae: RecordedSAE
    sha256: Text
    package: Text = ""
    model_digest: Text = ""
    sources: dict[Text, Source] = field(default_factory=dict)
    seal: Text = ""


@dataclass
class Moves:
    """Movement of latents by pass of the layer.

    Attributes:
        l1: sum of |v_j| of each token, one tensor [B, T] per pass.
        l0: number of nonzero v_j of each token, one tensor [B, T] per pass.
    """

    l1: list[Tensor] = field(default_factory=list)
    l0: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Recording(Scope):
    """A block in which the owner collects its moves."""

    moves: Moves


class FSRLAdapter(Gated, nn.Module):
    """`h' = h + (ReLU(f + v) - f) W_dec` with `v = act(h W_a^T + b_a)` and the latents f of `sae` (arXiv 2509.12934).

    Trainable are `W_a` [d_sae, d_in], one row per latent, `b_a` [d_sae], and `threshold` [d_sae] for soft_threshold or
    `log_threshold` [d_sae] for jumprelu, all fp32. They start so small that nothing changes beyond rounding. W_a is
    multiplied in the dtype of the residual.

    Attaching adds nothing to the model's modules, so its own parameters stay apart. While the adapter is attached,
    `save_pretrained` refuses, since it would lose it. A compiled model is compiled anew at `attach()` and `detach()`.

    Args:
        sae: the SAE, which stays as it is.
        config: the published settings by default.
        backend: backend of `dspa_kernels.fsrl_residual`.
        gate: which tokens of an answer are moved; None for all. Those of the prompt before its last are always moved.
            It is not saved.

    Attributes:
        mask: [d_sae] bool, True for latents that may be moved; None for all. Mask and fraction hold for all threads, so
            they cannot be changed while a call of `generate()` runs.
        fraction: share of a token's nonzero v_j that is kept, the largest by size.
        trained_with: digest of the weights of the model that it was trained on, by `dspa.models.sources.model_digest`.
            Empty if that is not known. It is saved with the adapter.
        trained_on: where the model was loaded from that it was trained on, None if that is not known. It is saved with
            the adapter, and so is where the SAE was loaded from.

    Raises:
        AdapterError: a `sae` or `config` of another type.
        ModelError: an SAE that does not name its layer.
    """

    def __init__(
        self,
        sae: FrozenSAE,
        config: FSRLConfig | None = None,
        *,
        backend: str = "auto",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        config = config or FSRLConfig()
        for name, value, kind in (("sae", sae, FrozenSAE), ("config", config, FSRLConfig)):
            if not isinstance(value, kind):
                raise refusal(AdapterError, f"`{name}`", f"a {type(value).__name__}", f"a {kind.__name__}")
        required_layer(sae)
        self.sae, self._config, self.backend = sae, config, backend
        self.trained_on: Source | None = None
        self.trained_with = ""
        self._mask: Tensor | None = None
        self._fraction = 1.0
        start = self.config.initial_threshold
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.rand(sae.d_sae, sae.d_in, generator=generator, dtype=torch.float32, device="cpu")
        W_a = (2 * drawn - 1) * start
        self.W_a = nn.Parameter(W_a.to(sae.device))
        self.b_a = nn.Parameter(torch.zeros(sae.d_sae, dtype=torch.float32, device=sae.device))
        thresholds = torch.full_like(self.b_a.detach(), start)
        if self.config.activation == "soft_threshold":
            self.threshold = nn.Parameter(thresholds)
        elif self.config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(thresholds.log())
        self._cast: Tensor | None = None
        self._cast_of = Snapshot()

    def forward(self, h: Tensor, moved: Tensor | None = None) -> Tensor:
        """Return residuals with their latents moved, in their dtype.

        Args:
            h: residuals [..., d_in].
            moved: True for those that are moved [...]; None for all.
        """
        steered, l1, l0 = fsrl_residual(
            h.reshape(-1, h.shape[-1]),
            self.sae.weights,
            self._weights(h.dtype, decoding=h.dim() == 1 or h.shape[-2] == 1),
            self.b_a,
            self.thresholds,
            self.config.activation,
            bandwidth=self.config.bandwidth,
            mask=self._mask,
            fraction=self._fraction,
            backend=self.backend,
        )
        if moved is not None:
            l1, l0 = (one.where(moved.flatten(), 0) for one in (l1, l0))
            steered = steered.where(moved.flatten()[:, None], h.reshape(-1, h.shape[-1]))
        if recording := self._innermost(Recording):
            recording.moves.l1.append(l1.view(h.shape[:-1]))
            recording.moves.l0.append(l0.view(h.shape[:-1]))
        return steered.view(h.shape)

    @property
    def config(self) -> FSRLConfig:
        """Settings of the adapter. For others, make another adapter."""
        return self._config

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
            raise refusal(AdapterError, "`mask`", got, f"a tensor of torch.bool [{self.sae.d_sae}], or None")
        self._check_idle("mask")
        self._mask = None if mask is None else mask.to(self.b_a.device, copy=True)

    @property
    def fraction(self) -> float:
        """Share of a token's nonzero v_j that is kept, the largest by size."""
        return self._fraction

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self._check_idle("fraction")
        self._fraction = check(Fraction, fraction, AdapterError, "`fraction`")

    def _check_idle(self, name: str) -> None:
        if self._n_open.get(SteeredCall.__name__):
            raise AdapterError(
                f"`{name}` cannot be changed while a call of generate() runs, which would use both values. Change it "
                "before or after, or load the adapter once for each thread."
            )

    @property
    def thresholds(self) -> Tensor | None:
        """Thresholds of the latents, [d_sae], >= 0; None for relu."""
        if self.config.activation == "jumprelu":
            return self.log_threshold.exp()
        return self.threshold.clamp(min=0) if self.config.activation == "soft_threshold" else None

    @torch.no_grad()
    def steering_vector(self, h: Tensor) -> Tensor:
        """Return v [..., d_sae] of residuals [..., d_in], dense and in fp32, before mask and fraction."""
        W_a, thresholds = self._weights(h.dtype, decoding=False).float(), self.thresholds
        u = product(h.float(), W_a.T) + self.b_a
        if thresholds is None:
            return u.relu()
        if self.config.activation == "jumprelu":
            return u.where(u > thresholds, 0)
        return (u - thresholds).relu() - (-u - thresholds).relu()

    def _weights(self, dtype: torch.dtype, *, decoding: bool) -> Tensor:
        """Return W_a in the dtype of 16-bit residuals, else in fp32.

        Converting it costs more than using it for one token. So passes without gradients over one token per row, as
        those of decoding, read a copy. It is refreshed where `generate()` begins, by passes over more tokens, and where
        `Snapshot` sees a change.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            return self.W_a
        if self.training or torch.is_grad_enabled():
            return self.W_a.to(dtype)
        kept = self._cast if self._cast is not None and self._cast.dtype == dtype else None
        if torch.compiler.is_compiling():
            return kept if kept is not None and decoding else self.W_a.to(dtype)
        if kept is None or not decoding or self.W_a.is_inference() or self._cast_of.changed(W_a=self.W_a):
            return self._refresh_cast(dtype)
        return kept

    @torch.no_grad()
    def _refresh_cast(self, dtype: torch.dtype) -> Tensor:
        """Convert W_a, in place where there is a copy: compiled graphs read that one."""
        with torch.inference_mode(False):
            kept = self._cast
            if kept is None or (kept.dtype, kept.shape) != (dtype, self.W_a.shape) or kept.device != self.W_a.device:
                kept = self._cast = self.W_a.detach().to(dtype)
            else:
                kept.copy_(self.W_a)
            self._cast_of = Snapshot(W_a=self.W_a)
        return kept

    @contextmanager
    def checked_call(self) -> Iterator[None]:
        """Also raise `SAEError` at the beginning if the SAE was changed, and read all of W_a."""
        self.sae.check_unchanged()
        if self._cast is not None:
            self._refresh_cast(self._cast.dtype)
        with super().checked_call():
            yield

    @torch.no_grad()
    def permuted(self, replacement: Tensor) -> FSRLAdapter:
        """Return an adapter that moves other latents by as much: latent `replacement[j]` by this one's v_j.

        Args:
            replacement: permutation of the latents, [d_sae] int64.
        """
        order = replacement.argsort().to(self.b_a.device)
        other = FSRLAdapter(self.sae, self.config, backend=self.backend).to(self.b_a.device)
        for name, parameter in self.named_parameters():
            other.get_parameter(name).copy_(parameter[order])
        other.trained_with, other.trained_on, other.fraction = self.trained_with, self.trained_on, self.fraction
        other.mask = None if self.mask is None else self.mask[order]
        other.gate = self.gate
        return other.requires_grad_(False).train(self.training)

    def train(self, mode: bool = True) -> FSRLAdapter:
        """Set training mode, or evaluation mode, in which a copy of W_a is kept for 16-bit residuals."""
        self._cast = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSRLAdapter:
        probe = fn(torch.zeros((), dtype=torch.float32, device=self.sae.device))
        if probe.dtype != torch.float32:
            raise TypeError(
                f"An FSRLAdapter cannot become {probe.dtype}: small training steps would be rounded away. It already "
                "multiplies in the dtype of the residual."
            )
        self._cast, self.sae = None, self.sae.to(probe.device)
        self._mask = None if self._mask is None else self._mask.to(probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def layer(self) -> int:
        """Layer of the SAE."""
        return required_layer(self.sae)

    @property
    def model_digest(self) -> str:
        """Digest of the weights that it was trained with, empty if that is not known."""
        return self.trained_with or (self.trained_on.digest if self.trained_on else "")

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        check_sae("sae", self.sae, model, len(stack), model_name)
        self._check_finite("the adapter")
        self.to(device_of(stack[self.layer]))
        self._name_keywords()

    def _check_finite(self, what: str) -> None:
        wrong = [name for name, tensor in self.named_parameters() if not bool(tensor.isfinite().all())]
        if wrong:
            raise refusal(AdapterError, f"`{wrong[0]}` of {what}", "partly NaN or infinite", "finite numbers")

    @contextmanager
    def recording(self) -> Iterator[Moves]:
        """Collect how far latents are moved, pass by pass; l1 is differentiable if the pass is.

        The passes are those of the same thread or asyncio task.
        """
        with self._opened(Recording(self, Moves())) as scope:
            yield scope.moves

    @property
    def positions(self) -> str:
        """Tokens that are moved: all, the prompt's too, as in training."""
        return "all"

    def responses(self, starts: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Act on plain forward passes over prompts with given responses, within a `with` block.

        Args:
            starts: column of each row's first response token [B]. It matters to a gate alone.
        """
        return nullcontext() if self.gate is None else super().responses(starts)

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
        steered: Tensor = self(h, self._steered(h, kwargs))
        return steered

    @property
    def unsaved(self) -> str:
        """Message that `save_pretrained` would lose the adapter."""
        return (
            f"save_pretrained would write the model without the FSRL adapter at layer {self.sae.layer}. Save that by "
            "adapter.save(folder), and detach() it before the model is saved."
        )

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: adapter.safetensors, and adapter.json with settings and the SAE's fingerprint.

        Raises:
            AdapterError: a path that cannot be a folder, or a folder with an adapter.json of something else.
        """
        path = Path(path)
        if (path.exists() and not path.is_dir()) or not path.parent.is_dir():
            raise refusal(AdapterError, "The adapter's folder", path, "a folder in one that exists")
        if (path / RECORD).exists():
            # Raises for a file of something else, which is not replaced.
            read_record(path)
        path.mkdir(exist_ok=True)
        tensors = {name: parameter.detach().cpu() for name, parameter in self.named_parameters()}
        sources = {"model": self.trained_on, "sae": self.sae.source}
        record = AdapterRecord(
            format=FORMAT,
            config=self.config,
            sae=RecordedSAE(**{fact.name: getattr(self.sae, fact.name) for fact in fields(RecordedSAE)}),
            sources={name: source for name, source in sources.items() if source is not None},
            model_digest=self.model_digest,
            sha256=checksum(tensors),
            package=version("dspa-kernels"),
        )
        write_tensors(path / TENSORS, tensors, {})
        write_atomically(path / RECORD, (json.dumps(sealed(asdict(record)), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, sae: FrozenSAE, *, backend: str = "auto") -> FSRLAdapter:
        """Load the adapter in the folder `path`, onto the device of the SAE that it was trained with.

        It is in evaluation mode and its parameters require no gradient.

        Raises:
            AdapterError: a folder without an adapter, damaged files, NaN or infinite parameters, or an SAE of another
                fingerprint, layer or width.
        """
        record = read_record(Path(path))
        warn_unsealed(asdict(record), Path(path) / RECORD, "FSRLAdapter.load and save it again")
        _check_same_sae(record.sae, sae, path)
        try:
            adapter = cls(sae, record.config, backend=backend)
            names = [name for name, _ in adapter.named_parameters()]
            file = Path(path) / TENSORS
            tensors = read_tensors(file, names, read_header(file))
            adapter.load_state_dict(tensors)
            adapter.trained_on, adapter.trained_with = record.sources.get("model"), record.model_digest
        except OSError as error:
            raise AdapterError(f"{path} cannot be read ({error}).") from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(f"{path} is damaged ({error}). {AGAIN}") from error
        if checksum(tensors) != record.sha256:
            raise AdapterError(f"{path} is damaged: {TENSORS} and {RECORD} are of two different adapters.")
        adapter._check_finite(str(path))
        return adapter.requires_grad_(False).eval()

    def __repr__(self) -> str:
        return f"FSRLAdapter({self.config.activation}, l1={self.config.l1:g}, {self.sae!r})"


def read_record(path: Path) -> AdapterRecord:
    """Return the record of the adapter in a folder.

    Raises:
        AdapterError: a folder without an adapter, or a record that is damaged or was edited.
    """
    if not (path / RECORD).is_file():
        raise AdapterError(f"{path} holds no {RECORD}; accepted: a folder that FSRLAdapter.save wrote.")
    record = read_json(path / RECORD, AdapterError, AGAIN)
    settings = record.get("config") if isinstance(record, dict) else None
    # A default of this version may not be what the adapter was trained with.
    if isinstance(settings, dict) and (
        missing := [setting.name for setting in fields(FSRLConfig) if setting.name not in settings]
    ):
        raise AdapterError(f"{path / RECORD} is damaged: `config` has no {', '.join(missing)}. {AGAIN}")
    checked = check(AdapterRecord, record, AdapterError, f"{path / RECORD} is damaged", AGAIN)
    check_seal(record, AdapterError, str(path / RECORD), AGAIN)
    return checked


def _check_same_sae(recorded: RecordedSAE, sae: FrozenSAE, path: str | Path) -> None:
    for name in ("d_in", "d_sae", "layer", "fingerprint"):
        if getattr(recorded, name) != getattr(sae, name):
            raise AdapterError(
                f"The adapter in {path} was trained with an SAE of {name} {getattr(recorded, name)!r} (layer "
                f"{recorded.layer!r}, fingerprint {recorded.fingerprint!r}) and `sae` has "
                f"{getattr(sae, name)!r} ({sae!r}, fingerprint {sae.fingerprint!r}). "
                f"{sae.fingerprint_advice(recorded.fingerprint) or 'Load that SAE.'}"
            )
