"""RepE: directions of toy differences, and a vector against a plain computation by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspa.baselines.repe import repe_directions, repe_vector
from dspa.errors import ModelError, VectorError
from dspa.evaluate.responses import responses_of
from dspa.testing import D_IN, L_OUT

from ..support.adapters import TRIPLES


def test_directions_are_found_in_their_order_with_the_signs_of_the_labels():
    """Differences of sizes 9, 4 and 1 along three axes, uncorrelated, most of them on the sides +, - and +."""
    g = torch.Generator().manual_seed(0)
    axes, sides = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=torch.float64))[0] for n in (12, 25))
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    sides *= signs * sides.sign().sum(dim=0).sign()
    directions = repe_directions((sides * torch.tensor([9.0, 4.0, 1.0])) @ axes.T, 3)
    torch.testing.assert_close(directions, (axes * signs).T.float(), atol=1e-5, rtol=0)


def test_a_common_difference_is_a_direction():
    """It would be lost if the differences were centred."""
    g = torch.Generator().manual_seed(1)
    common = torch.nn.functional.normalize(torch.randn(20, generator=g), dim=0)
    differences = 5 * common + 0.1 * torch.randn(40, 20, generator=g)
    (direction,) = repe_directions(differences, 1)
    assert float(direction @ common) > 0.999


def test_a_tied_vote_goes_to_the_mean():
    assert repe_directions(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]), 1).tolist() == [[1.0, 0.0]]
    assert repe_directions(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), 1).tolist() == [[-1.0, 0.0]]


def test_more_directions_than_differences_are_refused():
    with pytest.raises(
        VectorError, match="`n_directions` is 3, and the differences of 5 triples have 2; accepted: 1 to 2"
    ):
        repe_directions(torch.tensor([[1.0, 0, 0]] * 3 + [[0, 1.0, 0]] * 2), 3)
    with pytest.raises(VectorError, match="finite"):
        repe_directions(torch.tensor([[1.0, float("nan")]]), 1)


@pytest.fixture(scope="module")
def model(gemma):
    return gemma


def test_the_vector_is_that_of_a_plain_computation(model, tokenizer):
    """Each response alone through transformers' own hidden states, and an SVD by NumPy."""
    means = []
    for response in responses_of(model, tokenizer, TRIPLES):
        ids = torch.tensor([response.prompt + response.ids])
        with torch.no_grad():
            h = model(ids, output_hidden_states=True).hidden_states[L_OUT + 1][0]
        means.append(h[-len(response.ids) :].double().mean(dim=0).numpy())
    D = np.stack(means[0::2]) - np.stack(means[1::2])
    rows = np.linalg.svd(D, full_matrices=False)[2][:4]
    expected = sum(np.sign(np.sign(D @ row).sum() or (D @ row).sum()) * row for row in rows)
    made = repe_vector(model, tokenizer, TRIPLES, L_OUT, n_directions=4, batch_tokens=64, progress=False)
    np.testing.assert_allclose(made.vector.numpy(), expected, atol=1e-4)
    assert (made.layer, made.scale, made.positions, made.vector.shape) == (L_OUT, 0.5, "all", (D_IN,))
    again = repe_vector(model, tokenizer, TRIPLES, L_OUT, n_directions=4, batch_tokens=64, progress=False)
    assert torch.equal(made.vector, again.vector)
    ids = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states[L_OUT + 1]
        with made.attach(model):
            steered = model(ids, output_hidden_states=True).hidden_states[L_OUT + 1]
    expected_change = torch.as_tensor(0.5 * expected).float().expand_as(plain)
    torch.testing.assert_close(steered - plain, expected_change, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_directions": 0}, "`n_directions`"),
        ({"n_directions": 16}, "`n_directions` is 16, of 14 triples; accepted: 1 to 14"),
        ({"layer": 4}, "`layer`.*0 to 3"),
        ({"scale": -1.0}, "scale"),
        ({"positions": "some"}, "positions"),
    ],
)
def test_what_is_refused(model, tokenizer, options, message):
    with pytest.raises(VectorError, match=message):
        repe_vector(model, tokenizer, TRIPLES, **{"layer": L_OUT, "progress": False} | options)


def test_a_model_in_training_mode_is_refused(model, tokenizer):
    model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            repe_vector(model, tokenizer, TRIPLES, L_OUT, progress=False)
    finally:
        model.eval()
