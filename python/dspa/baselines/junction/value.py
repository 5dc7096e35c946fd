"""A token-level value model: a linear head on the last hidden state of a frozen language model.

The loss is that of the publication, the mean over response tokens of `(V_t - R)^2` with the reward R of the response.
For a linear head on a frozen model it has a minimum in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from dspa.data.triples import Triple
from dspa.errors import ModelError, VectorError, refusal
from dspa.evaluate.responses import Response, batches, padded, responses_of
from dspa.files import SEAL, checksum, read_sealed, write_tensors
from dspa.models.layers import base_model, check_eval, hidden_size, loaded_name
from dspa.models.reading import last_hidden
from dspa.models.sources import check_weights, model_digest
from dspa.outputs import output_file
from dspa.schemas import Count, Explained, OneOf, Positive, PositiveInt, Text, check, schema

FORMAT = "dspa.value.1"
RIDGE = 1e-3


@schema
class ValueRecord:
    """The header of a value head's file.

    Attributes:
        n_responses: number of responses that it was fitted on.
        n_tokens: number of their tokens.
        r2: share of the rewards' variance that it explains on these tokens.
        model_name: name of the model whose hidden states it reads, empty if that is not known.
        model_digest: the weights of that model, as `dspa.models.sources.model_digest` gives them, or empty.
        format: FORMAT.
        package: version of the package that wrote the file.
        sha256: checksum of the numbers.
        seal: digest of all else.
    """

    n_responses: PositiveInt
    n_tokens: Count
    r2: Explained
    model_name: Text = ""
    model_digest: Text = ""
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT
    package: Text = ""
    sha256: Text = ""
    seal: Text = ""


@dataclass(frozen=True, eq=False)
class ValueHead:
    """`V = weight h + bias` for the last hidden state h after a token.

    Attributes:
        weight: [d_in] fp32.
        bias: [1] fp32.
        record: what it was fitted on.
    """

    weight: Tensor
    bias: Tensor
    record: ValueRecord

    @property
    def digest(self) -> str:
        """Digest of the numbers."""
        return checksum({"weight": self.weight.cpu(), "bias": self.bias.cpu()})[:16]

    def __call__(self, h: Tensor) -> Tensor:
        """Return the values [...] fp32 of hidden states [..., d_in]."""
        return h.float() @ self.weight.to(h.device) + self.bias.to(h.device)

    def save(self, path: str | Path) -> None:
        """Write the head to one safetensors file, with its record in the header.

        Raises:
            VectorError: a path that cannot be a file.
            OSError: the file cannot be written.
        """
        output_file(Path(path), "The path of the value head", VectorError)
        header = {name: value for name, value in asdict(self.record).items() if name not in ("sha256", SEAL)}
        tensors = {"weight": self.weight.cpu(), "bias": self.bias.cpu()}
        write_tensors(Path(path), tensors, header | {"package": version("dspa-kernels")})

    @classmethod
    def load(cls, path: str | Path) -> ValueHead:
        """Read a head that `save` wrote.

        Raises:
            VectorError: there is no such file, or it is damaged or not a value head.
        """
        what = "value head, which ValueHead.save writes"
        record, tensors = read_sealed(Path(path), ValueRecord, ["weight", "bias"], VectorError, what, FORMAT)
        return cls(tensors["weight"], tensors["bias"], record)


class ValueModel:
    """Values of candidates for the next token, by a head on the hidden states of a frozen model.

    They are read as plans of prompts are, without edits. The tokens so far are read once, and the candidates after them
    from its cache.

    Args:
        head: the head.
        model: the model that it was fitted on.
        pad_token_id: token with which rows are padded on the left; None for that of the model. It is padding wherever a
            row begins with it.

    Raises:
        ModelError: another model than the head's.
    """

    def __init__(self, head: ValueHead, model: nn.Module, pad_token_id: int | None = None) -> None:
        self.head, self.model = head, base_model(model)
        pads = [self.model.generation_config.pad_token_id, self.model.config.get_text_config().pad_token_id]
        self.pad_token_id = next((token for token in (pad_token_id, *pads) if token is not None), None)
        if len(head.weight) != hidden_size(self.model):
            got, accepted = f"for {len(head.weight)} numbers", f"one for the model's {hidden_size(self.model)}"
            raise refusal(ModelError, "The value head", got, accepted)
        check_weights("The value head was made with", head.record.model_digest, self.model)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """Return the values [R, k] fp32 of candidates [R, k] after tokens [R, T], which may be padded on the left."""
        (n_rows, k), model, pad = candidates.shape, self.model, self.pad_token_id
        mask = torch.ones_like(input_ids) if pad is None else ((input_ids != pad).cumsum(dim=1) > 0).long()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        last_hidden(model, cache, input_ids=input_ids, attention_mask=mask, position_ids=positions)
        cache.batch_repeat_interleave(k)
        after = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1).repeat_interleave(k, dim=0)
        places = (positions[:, -1:] + 1).repeat_interleave(k, dim=0)
        tokens = candidates.reshape(-1, 1)
        h = last_hidden(model, cache, input_ids=tokens, attention_mask=after, position_ids=places)
        return self.head(h[:, -1]).view(n_rows, k)


def fit_value_head(
    model: nn.Module,
    responses: Sequence[Response],
    rewards: Sequence[float],
    *,
    ridge: float = RIDGE,
    batch_tokens: int = 8192,
    progress: bool = True,
    model_name: str | None = None,
) -> ValueHead:
    """Return the head with the least mean over response tokens of `(V_t - R)^2 + ridge s |weight|^2`.

    s is the mean variance of a hidden state's numbers, so that `ridge` has no unit. Nothing is drawn at random.

    Args:
        model: a transformers causal language model in evaluation mode, which stays as it is.
        responses: prompts with responses.
        rewards: reward of each.
        ridge: strength of the penalty, > 0.
        batch_tokens: tokens per batch, padding included.
        progress: show a bar.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        ValueError: no responses, another number of rewards, rewards that are all equal, or an invalid setting.
        ModelError: a model in training mode, or hidden states that are not finite.
    """
    inner = base_model(model)
    check_eval(inner)
    check(Positive, ridge, ValueError, "`ridge`")
    if len(rewards) != len(responses) or len(set(rewards)) < 2:
        got = f"{len(rewards)} rewards of {len(set(rewards))} values, for {len(responses)} responses"
        raise refusal(ValueError, "`rewards`", got, "one reward per response, not all equal")
    d = hidden_size(inner)
    # Sums over tokens of x x^T, with the reward as the last number of x, and a 1 before it.
    sums = torch.zeros(d + 2, d + 2, dtype=torch.float64)
    with tqdm(total=len(responses), unit="response", desc="read", disable=not progress) as bar:
        for numbers in batches(responses, batch_tokens):
            with torch.no_grad():
                h = last_hidden(inner, **padded(inner, [responses[n] for n in numbers]))
            for row, n in zip(h, numbers, strict=True):
                read = row[len(responses[n].prompt) : len(responses[n])].double().cpu()
                x = torch.cat([read, torch.tensor([[1.0, rewards[n]]]).double().expand(len(read), -1)], dim=1)
                sums += x.T @ x
            bar.update(len(numbers))
    if not bool(sums.isfinite().all()):
        raise ModelError("Hidden states are NaN or infinite, so that no value head fits them.")
    n_tokens = int(sums[d, d])
    means = sums[d] / n_tokens
    covariance = sums / n_tokens - means[:, None] * means[None]
    states, with_reward, variance = covariance[:d, :d], covariance[:d, d + 1], covariance[d + 1, d + 1]
    penalty = ridge * states.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    weight = torch.linalg.solve(states + penalty, with_reward)
    bias = means[d + 1] - weight @ means[:d]
    rest = variance - 2 * weight @ with_reward + weight @ states @ weight
    record = ValueRecord(
        n_responses=len(responses),
        n_tokens=n_tokens,
        r2=float(1 - rest / variance),
        model_name=model_name or loaded_name(inner),
        model_digest=model_digest(inner) or "",
    )
    return ValueHead(weight.float(), bias.float()[None], record)


def value_head_of_triples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ValueHead:
    """Return a head for preference triples: reward 1 for chosen responses, and 0 for rejected ones.

    Args:
        model: as for `fit_value_head`, as are `settings`.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes.
        max_length: tokens of prompt and response together to which a response is cut; by default the model's positions.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.
        settings: `ridge`, `batch_tokens`, `progress` and `model_name`.

    Raises:
        PreferenceError: a bad triple.
        ValueError: as `fit_value_head`.
    """
    responses = responses_of(model, tokenizer, triples, max_length, chat_template_kwargs)
    return fit_value_head(model, responses, [1.0, 0.0] * (len(responses) // 2), **settings)
