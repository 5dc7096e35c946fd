"""The frozen SAE: loaded from any format, folded once, saved, and known by its fingerprint."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from dspa.errors import SAEError, refusal, require_package
from dspa.files import SEAL, check_seal, sealed
from dspa.models.places import is_hub_name
from dspa.models.sources import Source, absolute
from dspa.saes.autoencoder import Autoencoder
from dspa.saes.folding import (
    DTYPES,
    Content,
    centered_fingerprint,
    check_centering,
    check_values,
    content,
    fold,
    full_dtype,
    to_center,
    unfolded,
    ungated,
    weights_digest,
)
from dspa.saes.formats import read_sae
from dspa.saes.formats.saelens import RECORD, sae_lens_source, write_sae_lens
from dspa.saes.formats.source import SourceSAE
from dspa.saes.metadata import CENTERED, check_place, residual_hook, without_model_advice
from dspa.snapshot import Frozen


class FrozenSAE(Frozen, Autoencoder):
    """A sparse autoencoder or transcoder of any place in a model, at inference.

    `pre = n(h) W_enc + b_enc`, where `n` is `normalize_activations` as SAELens computes it. The value of an active
    latent is `pre`. A latent is active

    - in a jumprelu SAE if `pre > threshold` and `pre > 0`,
    - in a standard SAE if `pre > 0`,
    - in a topk SAE if `pre > 0` and it is among the `k` largest of its row.

    BatchTopK, Matryoshka and gated SAEs are jumprelu SAEs at inference, and are converted when they are loaded.

    Three settings are folded into the weights here, in fp64, and named in `folded`:

    - `apply_b_dec_to_input`: `pre = (n(h) - b_dec) W_enc + b_enc`.
    - `rescale_acts_by_decoder_norm`: selection and value are `pre ||W_dec_j||`, which is compared with `threshold`.
    - `center_writing_weights`: the SAE was trained on residuals less their mean over d_in, and `h` stands for these.
      That is the residual of a model with LayerNorm that TransformerLens loaded with this setting.

    One of the residual stream after a decoder layer can steer, be trained further, and be read by a map. Others encode
    and decode: of MLP and attention outputs, of attention heads (`hook_z`), and transcoders, which compute the content
    of another place.

    The tensors are copied, and use does not change them. An SAE whose tensors were changed is refused.

    Args:
        arch: "standard", "jumprelu" or "topk".
        W_enc: [d_in, d_sae], one of fp32, bf16, fp16, fp64.
        b_enc: [d_sae], kept in fp32, or in fp64 if `W_enc` is fp64.
        W_dec: [d_sae, d_in], or [d_sae, d_out] of a transcoder, in the dtype of `W_enc`.
        b_dec: [d_in] or [d_out], zeros if None.
        threshold: [d_sae], for jumprelu, kept like `b_enc`. +inf is a latent that never fires.
        k: active latents per row, 1 to d_sae, for topk.
        layer: the decoder layer, from 0, whose output the SAE reads; None if unknown, or if it reads another place.
        model_name: the model that it was trained on; None if unknown.
        apply_b_dec_to_input: subtract `b_dec` from the normalised input.
        normalize_activations: "none", "layer_norm" or "constant_norm_rescale". "expected_average_only_in" and
            "covariance_whitening" do nothing at inference, here as in SAELens, and warn.
        rescale_acts_by_decoder_norm: multiply latents by the norms of their decoder rows.
        center_writing_weights: take the mean over d_in out of the residual. Not for "constant_norm_rescale".
        transcoder: it computes the content of another place than it reads, and undoes no normalisation.
        W_skip: [d_out, d_in], for a transcoder that adds `x W_skip^T` to its output.
        reshape_activations: "hook_z" if its rows are [n_heads, d_head] in the model.

    Attributes:
        weights: the tensors that the kernels read.
        b_dec: [d_out], in the dtype of `W_enc`.
        W_skip: as given, in the dtype of `W_enc`; None if it has none.
        transcoder: as given.
        reshape_activations: as given.
        hook_name: the place that it reads, by its maker's name; None if unknown.
        hook_name_out: the place that a transcoder computes, by its maker's name; None if unknown.
        neuronpedia_id: its model and place on Neuronpedia; None if unknown.
        folded: names of the settings that were folded, and "gated" for a gated SAE.
        loaded_from: absolute path, or RELEASE:SAE_ID, from which it was loaded; None if it was not.
        figures: explained variance, l0 and dead latents, those that its training recorded in a SAELens folder.

    Raises:
        ValueError: wrong shapes, dtypes or devices, NaN or infinite weights, or an argument that does not belong to
            `arch`.
    """

    _kind, _error = "SAE", SAEError

    def __init__(
        self,
        arch: str,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None = None,
        threshold: Tensor | None = None,
        k: int | None = None,
        *,
        layer: int | None = None,
        model_name: str | None = None,
        apply_b_dec_to_input: bool = False,
        normalize_activations: str = "none",
        rescale_acts_by_decoder_norm: bool = False,
        center_writing_weights: bool = False,
        transcoder: bool = False,
        W_skip: Tensor | None = None,
        reshape_activations: str = "none",
    ) -> None:
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
        optional = {"b_dec": b_dec, "threshold": threshold, "W_skip": W_skip}
        self._take(
            SourceSAE(
                name="FrozenSAE",
                arch=arch,
                tensors=tensors | {name: tensor for name, tensor in optional.items() if tensor is not None},
                k=k,
                layer=layer,
                model_name=model_name,
                apply_b_dec_to_input=apply_b_dec_to_input,
                normalize_activations=normalize_activations,
                rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
                center_writing_weights=center_writing_weights,
                transcoder=transcoder,
                reshape_activations=reshape_activations,
            )
        )

    def _take(self, source: SourceSAE) -> None:
        """Fold the tensors of `source`, and keep what it says of itself."""
        weights, b_dec = unfolded(source)
        folds = {
            "apply_b_dec_to_input": source.apply_b_dec_to_input,
            "rescale_acts_by_decoder_norm": source.rescale_acts_by_decoder_norm,
            "center_writing_weights": bool(source.center_writing_weights),
        }
        if source.center_writing_weights:
            check_centering(weights.normalize)
        self.arch, self.layer, self.model_name = source.arch, source.layer, source.model_name
        self.figures = source.figures
        self.hook_name, self.hook_name_out = source.hook_name, source.hook_name_out
        self.neuronpedia_id = source.neuronpedia_id
        self.transcoder, self.reshape_activations = source.transcoder, source.reshape_activations
        self.folded = tuple(name for name, folded in folds.items() if folded)
        self._weights = fold(weights, b_dec, **folds)
        self.b_dec = b_dec.to(weights.encoder_rows.dtype)
        skip = source.tensors.get("W_skip")
        self.W_skip = None if skip is None else skip.detach().to(weights.encoder_rows.dtype, copy=True)
        self.loaded_from: str | None = None
        self._freeze()
        self._fingerprint = ""
        self._source: Content | None = content(
            source.arch,
            weights,
            b_dec,
            source.apply_b_dec_to_input,
            source.rescale_acts_by_decoder_norm,
            W_skip=self.W_skip,
            kind=self._rows_kind,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        layer: int | None = None,
        model_name: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        dict_class: str | None = None,
        k: int | None = None,
        center_writing_weights: bool | None = None,
    ) -> FrozenSAE:
        """Load the SAE in a folder or file.

        The formats are SAELens, Gemma Scope 1 and 2, dictionary_learning, EleutherAI sparsify, Llama Scope, Qwen-Scope,
        OpenAI's and Goodfire's. docs/saes.md lists their files.

        Args:
            path: the folder, or the file of weights in it.
            layer: the decoder layer, if the file does not say it. It must not contradict the file.
            model_name: name of the model in place of the file's.
            device: device of the SAE.
            dtype: dtype of `W_enc`, `W_dec` and `b_dec`, by default as stored.
            dict_class: class of an `ae.pt` without `config.json`, if its tensors do not show it.
            k: active latents per row, if it is a topk SAE whose file does not say it. It must not contradict the file.
            center_writing_weights: as in the constructor, in place of what the file says.

        Raises:
            SAEError: a path or format that is not one of these, damaged files, missing or unknown tensors, `layer` for
                an SAE that does not read the residual stream, and everything that the constructor refuses.
        """
        sae = cls._from_source(read_sae(path, dict_class, k), layer, model_name, center_writing_weights)
        sae.loaded_from = absolute(str(path))
        return sae.to(device, dtype)

    @classmethod
    def from_name(cls, name: str, *, layer: int | None = None, device: torch.device | str = "cpu") -> FrozenSAE:
        """Load an SAE by what `source.path` records: a path, or RELEASE:SAE_ID of SAELens' catalogue.

        Args:
            name: the path, or the two names.
            layer: as for `load` and `from_pretrained`.
            device: device of the SAE.

        Raises:
            RuntimeError: sae-lens is needed and not installed.
            SAEError: as for `load` and `from_pretrained`.
        """
        release, _, sae_id = name.partition(":")
        if sae_id and not Path(name).exists() and is_hub_name(release):
            return cls.from_pretrained(release, sae_id, device=device, layer=layer)
        return cls.load(name, layer=layer, device=device)

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        sae_id: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layer: int | None = None,
        model_name: str | None = None,
        center_writing_weights: bool | None = None,
    ) -> FrozenSAE:
        """Download and load an SAE of SAELens' catalogue or of a Hugging Face repository.

        Args:
            release: the release in the catalogue, or the repository.
            sae_id: the SAE in it.
            device: device of the SAE.
            dtype: dtype of `W_enc`, `W_dec` and `b_dec`, by default fp32.
            layer: as for `from_sae_lens`.
            model_name: as for `from_sae_lens`.
            center_writing_weights: as for `from_sae_lens`.

        Raises:
            RuntimeError: sae-lens is not installed.
            SAEError: a release that looks like a path, an SAE that SAELens does not know or cannot download, and as
                for `from_sae_lens`.
        """
        if not is_hub_name(release):
            accepted = "a release of SAELens' catalogue, or a repository on the Hub"
            raise refusal(SAEError, "`release`", f"{release!r}, a path", accepted, "Use FrozenSAE.load(path).")
        advice = "Or download the SAE and use FrozenSAE.load(path)."
        require_package("sae-lens", "FrozenSAE.from_pretrained", advice)
        from sae_lens import SAE

        try:
            with without_model_advice():
                theirs = SAE.from_pretrained(release, sae_id)
        # A name that SAELens does not know, or a file that the Hub does not give.
        except (ValueError, OSError) as error:
            got = f"not available ({type(error).__name__}: {error})"
            accepted = "an SAE of SAELens' catalogue, or one in a repository on the Hub that can be reached"
            raise refusal(
                SAEError, f"{release}:{sae_id}", got, accepted, "Or download it and use load(path)."
            ) from error
        sae = cls.from_sae_lens(
            theirs, layer=layer, model_name=model_name, center_writing_weights=center_writing_weights
        )
        sae.loaded_from = f"{release}:{sae_id}"
        return sae.to(device, dtype)

    @classmethod
    def from_sae_lens(
        cls,
        sae: Any,
        *,
        layer: int | None = None,
        model_name: str | None = None,
        center_writing_weights: bool | None = None,
    ) -> FrozenSAE:
        """Copy a `sae_lens.SAE` object, on its device and in its dtype.

        Args:
            sae: the object.
            layer: the decoder layer, if the metadata of `sae` do not say it.
            model_name: name of the model, if the metadata of `sae` do not say it.
            center_writing_weights: as in the constructor, in place of what the metadata say.

        Raises:
            SAEError: another object, one for training, not one of standard, jumprelu, topk, gated and their
                transcoders, or `layer` for an SAE that does not read the residual stream.
        """
        is_sae = isinstance(sae, nn.Module) and hasattr(getattr(sae, "cfg", None), "to_dict")
        if not is_sae:
            advice = "SAE.from_pretrained of sae-lens 6 returns one. For a folder or file: load(path)."
            raise refusal(SAEError, "`sae`", f"a {type(sae).__name__}", "an SAE of sae-lens 6", advice)
        name = type(sae).__name__
        if any(parent.__name__ == "TrainingSAE" for parent in type(sae).__mro__):
            advice = "Load what its save_inference_model() wrote: load(path)."
            raise refusal(SAEError, "`sae`", f"a {name}, which is for training", "an SAE for inference", advice)
        # Folding on the CPU gives the same bits wherever the SAE came from.
        tensors = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
        source = sae_lens_source(name, sae.cfg.to_dict(), tensors)
        return cls._from_source(source, layer, model_name, center_writing_weights).to(sae.W_enc.device)

    @classmethod
    def _from_source(
        cls, source: SourceSAE, layer: int | None, model_name: str | None, centered: bool | None
    ) -> FrozenSAE:
        if None not in (layer, source.layer) and layer != source.layer:
            raise refusal(SAEError, "`layer`", layer, f"{source.layer}, as {source.name} says", "Leave `layer` out.")
        if layer is not None:
            check_place(source.name, source)
        gated = source.arch == "gated"
        try:
            sae = cls.__new__(cls)
            sae._take(
                replace(
                    ungated(source) if gated else source,
                    layer=source.layer if layer is None else layer,
                    model_name=model_name or source.model_name,
                    center_writing_weights=to_center(source, centered),
                )
            )
            if source.record is not None:
                sae._restore_record(source.record, source.name)
        except ValueError as error:
            raise SAEError(f"{source.name}: {error}") from error
        if gated and sae._source is not None:
            sae.folded = ("gated", *sae.folded)
            # Of the stored tensors: another machine's `exp` may round the folded ones differently.
            tensors = tuple(source.tensors[name] for name in sorted(source.tensors))
            sae._source = (("gated", *sae._source[0][1:]), tensors)
            if not source.owned:
                # Now, since they are the file's or the caller's, who may change them.
                sae._identify()
        return sae

    def _restore_record(self, record: dict[str, Any], name: str) -> None:
        """Take the fingerprint of the source SAE, of which the tensors may be a folded or rounded copy."""
        own, advice = (
            self.fingerprint,
            f"If the change is intended, remove {RECORD!r} from the metadata, which makes it another SAE.",
        )
        check_seal(record, SAEError, f"The record {record}", advice)
        if record.keys() - {SEAL} != {"fingerprint", "weights", "folded"} or record["weights"] != own:
            raise refusal(
                SAEError,
                f"the SAE (fingerprint {own})",
                f"not the one that was saved ({record})",
                "what FrozenSAE.save wrote, neither changed nor rounded",
                advice,
            )
        if not record.get(SEAL) and record["fingerprint"] != own:
            warnings.warn(
                f"{name} says that its SAE is a folded or rounded copy of the one with fingerprint "
                f"{record['fingerprint']}. An earlier version saved it, and did not make sure that nobody edits that. "
                "If you are sure that it is, FrozenSAE.load and save it again.",
                stacklevel=4,
            )
        self._fingerprint, self.folded = str(record["fingerprint"]), tuple(record["folded"])

    def save(self, path: str | Path) -> None:
        """Write a SAELens folder at `path`, in the folded form. SAELens itself loads it and encodes the same.

        Tensors keep their dtypes. `cfg.json` nevertheless states fp32, or fp64 for an fp64 SAE, because SAELens would
        round the thresholds to a narrower dtype. The folder records the fingerprint of the source SAE, one of the
        written tensors, and a seal of both, by which `load` refuses a folder in which any of them was changed. A seal
        shows edits. It does not show who sealed.

        Raises:
            SAEError: a topk transcoder, which SAELens does not have.
        """
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        if self.arch == "jumprelu":
            tensors["threshold"] = self.threshold
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        record: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "weights": weights_digest(
                content(self.arch, self.weights, self.b_dec, W_skip=self.W_skip, kind=self._rows_kind)
            ),
            "folded": self.folded,
        }
        stored = SourceSAE(
            name=str(path),
            arch=self.arch,
            tensors=tensors,
            k=self.weights.k or None,
            layer=self.layer,
            hook_name=self.hook_name,
            transcoder=self.transcoder,
            hook_name_out=self.hook_name_out,
            model_name=self.model_name,
            neuronpedia_id=self.neuronpedia_id,
            normalize_activations=self.weights.normalize,
            reshape_activations=self.reshape_activations,
            center_writing_weights=self.centered,
            record=sealed(record),
        )
        write_sae_lens(Path(path), stored)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FrozenSAE:
        """Return the SAE on `device`, with `W_enc`, `W_dec` and `b_dec` in `dtype`; itself if nothing changes.

        While a copy is in use, the same is returned again: what shares an SAE shares its copies.

        `b_enc` and `threshold` stay fp32, or fp64 for fp64, since rounding them changes which latents are active. The
        fingerprint stays the same.

        Raises:
            SAEError: another dtype, or one in which a weight overflows.
        """
        device = torch.device(self.device if device is None else device)
        dtype = self.dtype if dtype is None else dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        self.check_unchanged()
        copies = _COPIES.setdefault(self, WeakValueDictionary())
        if (made := copies.get((device, dtype))) is not None and not made.changed:
            return made
        if dtype not in DTYPES:
            raise refusal(SAEError, "`dtype`", dtype, ", ".join(map(str, DTYPES)))
        full = full_dtype(dtype)
        new = copy.copy(self)
        new._fingerprint, new._source = self.fingerprint, None
        new.b_dec = self.b_dec.to(device, dtype)
        new.W_skip = None if self.W_skip is None else self.W_skip.to(device, dtype)
        new._weights = replace(
            self.weights,
            encoder_rows=self.weights.encoder_rows.to(device, dtype),
            b_enc=self.b_enc.to(device, full),
            threshold=self.threshold.to(device, full),
            W_dec=self.W_dec.to(device, dtype),
        )
        check_values(new.weights, new.b_dec, new.W_skip)
        new._freeze()
        copies[device, dtype] = new
        return new

    def _tensors(self) -> dict[str, Tensor]:
        names = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec", *(() if self.W_skip is None else ("W_skip",)))
        return {name: self.weights.encoder_rows if name == "W_enc" else getattr(self, name) for name in names}

    @property
    def _rows_kind(self) -> tuple[str, ...]:
        """The part of the place that a fingerprint covers, nothing for an SAE of plain rows."""
        heads = () if self.reshape_activations == "none" else (self.reshape_activations,)
        return ("transcoder", *heads) if self.transcoder else heads

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the source SAE, the same from any format, device and dtype.

        They begin a SHA-256 over architecture, k, normalisation and the values of all tensors before anything was
        folded or converted. It is computed on first use.

        Raises:
            SAEError: the SAE was changed, as `check_unchanged` sees it.
        """
        self.check_unchanged()
        self._identify()
        return self._fingerprint

    def _identify(self) -> None:
        """Compute the fingerprint, and let go of the tensors that it is of."""
        if self._source is not None:
            digest = weights_digest(self._source)
            self._fingerprint, self._source = centered_fingerprint(digest) if self.centered else digest, None

    @property
    def neuronpedia_place(self) -> str:
        """Its place on Neuronpedia, as "12-gemmascope-res-65k", or where that is unknown its first part, as "12".

        That number is of the hook, so a residual before a layer has the number of that layer. Empty without a layer.
        """
        if given := (self.neuronpedia_id or "").partition("/")[2]:
            return given
        hook = None if self.hook_name is None else residual_hook(self.hook_name)
        number = self.layer if hook is None else hook[1]
        return "" if number is None else str(number)

    def fingerprint_advice(self, other: str) -> str:
        """Return why a thing made with an SAE of fingerprint `other` does not fit this one, or "" if unknown."""
        if not self.centered or centered_fingerprint(other) != self.fingerprint:
            return ""
        return (
            f"It is the same SAE, but an earlier version of dspa-kernels read it without its {CENTERED}, so that most "
            "of its activities were wrong, and what was made with it is too. Make that again."
        )

    @property
    def source(self) -> Source | None:
        """Where the SAE was loaded from, None if it was not loaded."""
        return None if self.loaded_from is None else Source(self.loaded_from, self.fingerprint)

    def __repr__(self) -> str:
        k = f", k={self.weights.k}" if self.weights.k else ""
        normalize = f", {self.weights.normalize}" if self.weights.normalize != "none" else ""
        folded = f", folded: {', '.join(self.folded)}" if self.folded else ""
        kind = f"{self.arch} transcoder" if self.transcoder else self.arch
        d_out = f", d_out={self.d_out}" if self.transcoder else ""
        place = f"layer={self.layer}" if self.layer is not None or self.hook_name is None else self.hook_name
        return (
            f"FrozenSAE({kind}{k}{normalize}, d_in={self.d_in}, d_sae={self.d_sae}{d_out}, {place}, "
            f"model={self.model_name}, {str(self.dtype).removeprefix('torch.')} on {self.device}{folded})"
        )


# Copies by device and dtype, of each SAE, as long as they are in use.
_COPIES: WeakKeyDictionary[FrozenSAE, WeakValueDictionary[tuple[torch.device, torch.dtype], FrozenSAE]] = (
    WeakKeyDictionary()
)
