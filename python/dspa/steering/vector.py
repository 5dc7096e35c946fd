"""A vector that is added to the residuals of one layer, and its file."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from dspa.config import POSITIONS
from dspa.costs import Costs
from dspa.errors import ModelError, VectorError, refusal
from dspa.files import SEAL, read_sealed, write_tensors
from dspa.models.layers import CausalLM, check_model_name, device_of, hidden_size, loaded_name
from dspa.outputs import output_file
from dspa.schemas import Count, NonNegative, OneOf, Text, check, schema
from dspa.steering.decisions import Gate
from dspa.steering.gated import Gated

FORMAT = "dspa.vector.1"


@schema
class VectorRecord:
    """The header of a vector's file, and all of a vector but its numbers.

    Attributes:
        layer: decoder layer after which the vector is added.
        scale: how many times it is added.
        positions: tokens to which it is added.
        model_name: name of the model that it was made with, empty if that is not known.
        model_digest: the weights of that model, as `dspa.models.sources.model_digest` gives them, or empty.
        format: FORMAT.
        package: version of the package that wrote the file.
        sha256: checksum of the numbers.
        seal: digest of all else.
    """

    layer: Count
    scale: NonNegative = 1.0
    positions: Annotated[str, OneOf(POSITIONS)] = "all"
    model_name: Text = ""
    model_digest: Text = ""
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT
    package: Text = ""
    sha256: Text = ""
    seal: Text = ""


class SteeringVector(Gated):
    """`h' = h + scale * vector` at the output of one layer while attached, without an SAE.

    ```python
    with dspa.SteeringVector(vector, layer=12, scale=4.0).attach(model):
        model.generate(**inputs, max_new_tokens=200)
    ```

    The sum is made in fp32 and rounded once. With `positions="all"`, every token is changed alike, in bare forward
    passes too. Otherwise a forward pass outside of `generate()` is steered within `responses(starts)` and refused
    without. Several vectors at several layers are several objects, and a Steering or an adapter can act beside them.
    Settings cannot be changed: make another one.

    Args:
        vector: [d_in] of finite numbers, any floating dtype. It is kept in fp32.
        layer: decoder layer after which it is added, from 0.
        scale: how many times it is added, >= 0. For the other direction, pass `-vector`.
        positions: "all"; "response", from the last token of each prompt on; or "generated", from the first of the
            answer on.
        model_name: name of the model that it was made with, empty if that is not known.
        model_digest: `dspa.models.sources.model_digest` of that model, likewise. A model of other weights is refused.
        gate: which tokens of an answer it is added to; None for all. It is not in the file.

    Attributes:
        costs: costs of making the vector, where `repe_vector` just made it. They are not in its file.

    Raises:
        VectorError: an argument of another type, outside its choices or its range, or numbers that are not finite.
    """

    def __init__(
        self,
        vector: Tensor,
        layer: int,
        scale: float = 1.0,
        positions: str = "all",
        *,
        model_name: str = "",
        model_digest: str = "",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        settings = {"layer": layer, "scale": scale, "positions": positions}
        settings |= {"model_name": model_name, "model_digest": model_digest}
        self._record = check(VectorRecord, settings, VectorError, "SteeringVector")
        if not isinstance(vector, Tensor) or vector.dim() != 1 or not vector.is_floating_point() or not len(vector):
            got = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else f"a {type(vector).__name__}"
            raise refusal(VectorError, "`vector`", got, "a floating tensor [d_in]")
        self.costs: Costs | None = None
        self._vector = vector.detach().to(torch.float32, copy=True)
        self._added = self.scale * self._vector
        for what, numbers in (("`vector`", self._vector), ("`vector` times `scale`", self._added)):
            if not bool(numbers.isfinite().all()):
                raise refusal(VectorError, what, "partly NaN or infinite", "finite numbers in fp32")

    @property
    def vector(self) -> Tensor:
        """A copy of the vector [d_in], fp32."""
        return self._vector.clone()

    @property
    def layer(self) -> int:
        """Decoder layer after which the vector is added."""
        return self._record.layer

    @property
    def scale(self) -> float:
        """How many times the vector is added."""
        return self._record.scale

    @property
    def positions(self) -> str:
        """Tokens to which the vector is added."""
        return self._record.positions

    def replaced(self, *, vector: Tensor | None = None, scale: float | None = None) -> SteeringVector:
        """Return the same, not attached, with other numbers or another scale.

        Raises:
            VectorError: as for `SteeringVector`.
        """
        return SteeringVector(
            self._vector if vector is None else vector,
            self.layer,
            self.scale if scale is None else scale,
            self.positions,
            model_name=self.model_name,
            model_digest=self.model_digest,
            gate=self.gate,
        )

    @property
    def model_name(self) -> str:
        """Name of the model that the vector was made with, empty if that is not known."""
        return self._record.model_name

    @property
    def model_digest(self) -> str:
        """Digest of the weights that the vector was made with, empty if that is not known."""
        return self._record.model_digest

    def check_model(self, model: nn.Module, n_layers: int, model_name: str | None) -> None:
        """Raise `ModelError` unless the vector fits the layers, the width and the name of a model.

        Args:
            model: a transformers model, or one in a PEFT wrapper.
            n_layers: its number of decoder layers.
            model_name: name of the model, if its own name or path does not give it.
        """
        if self.layer >= n_layers:
            raise ModelError(f"The vector is of layer {self.layer}; accepted: 0 to {n_layers - 1}, the model's layers.")
        if len(self._vector) != hidden_size(model):
            raise ModelError(
                f"The vector has {len(self._vector)} numbers and the model's hidden size is {hidden_size(model)}: it "
                "was made with another model."
            )
        check_model_name("The vector was made with", self.model_name, model_name or loaded_name(model))

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        self.check_model(model, len(stack), model_name)
        self._added = self._added.to(device_of(stack[self.layer]))
        self._name_keywords()

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        # A model may have moved since it was attached.
        edited = (h + self._added.to(h.device)).to(h.dtype)
        steered = self._steered(h, kwargs)
        return edited if steered is None else torch.where(steered[:, :, None], edited, h)

    def save(self, path: str | Path) -> None:
        """Write the vector to one safetensors file, with its settings in the header.

        Raises:
            VectorError: a path that cannot be a file.
            OSError: the file cannot be written.
        """
        output_file(Path(path), "The path of the vector", VectorError)
        header = {name: value for name, value in asdict(self._record).items() if name not in ("sha256", SEAL)}
        write_tensors(Path(path), {"vector": self._vector.cpu()}, header | {"package": version("dspa-kernels")})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a vector that `save` wrote.

        Raises:
            VectorError: there is no such file, or it is damaged or not a vector.
        """
        what = "vector, which SteeringVector.save writes"
        record, tensors = read_sealed(Path(path), VectorRecord, ["vector"], VectorError, what, FORMAT)
        settings = {name: getattr(record, name) for name in ("model_name", "model_digest")}
        return cls(tensors["vector"], record.layer, record.scale, record.positions, **settings)

    def __repr__(self) -> str:
        return f"SteeringVector(d_in={len(self._vector)}, layer={self.layer}, scale={self.scale:g}, {self.positions!r})"
