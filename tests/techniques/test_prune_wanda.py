"""Magnitude times input, by hand."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneWanda
from featherweight.zoo import small_models


def prune(technique, model, inputs, **fields):
    context = Context(data=Data(example=inputs[:1], calibrate=[inputs]), **fields)
    output, edits = run(technique, model, context)
    return output, edits, context


def layer(rows):
    made = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(rows))
    return made


INPUTS = torch.tensor([[3.0, 0.0, 1.0, 0.5], [-4.0, 2.0, 1.0, 0.5]])  # norms 5, 2, 1.41, 0.71
ROWS = [[1.0, 2.0, 3.0, 8.0], [0.1, 0.2, -0.3, 0.1]]  # scores 5, 4, 4.24, 5.66 and 0.5, 0.4, 0.42, 0.07


@pytest.mark.parametrize(
    ("technique", "kept"),
    [
        (PruneWanda(0.5), [[1.0, 0.0, 0.0, 8.0], [0.1, 0.0, -0.3, 0.0]]),
        (PruneWanda(0.5, per="layer"), [[1.0, 2.0, 3.0, 8.0], [0.0] * 4]),
        (PruneWanda(0.5, pattern="1:2"), [[1.0, 0.0, 0.0, 8.0], [0.1, 0.0, -0.3, 0.0]]),
        (PruneWanda(0.25, pattern="3:4"), [[1.0, 0.0, 3.0, 8.0], [0.1, 0.2, -0.3, 0.0]]),
    ],
    ids=str,
)
def test_scores_by_hand(technique, kept):
    output, edits, context = prune(technique, layer(ROWS), INPUTS)
    assert torch.equal(output.weight, torch.tensor(kept))
    assert edits[0].sparse == ("weight",)
    assert context.sparse == {"weight"}


def test_an_embedding_counts_how_often_a_token_is_read():
    """Scores 1 sqrt(6 + 1), 3 sqrt(2 + 1) and, for the token that is never read, 4 sqrt(0 + 1)."""
    model = nn.Embedding(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0], [3.0, 3.0], [4.0, 4.0]]))
    tokens = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]])
    output, _, _ = prune(PruneWanda(0.34), model, tokens)
    assert output.weight.tolist() == [[0.0, 0.0], [3.0, 3.0], [4.0, 4.0]]
    output, _, _ = prune(PruneWanda(0.66), model, tokens)
    assert output.weight.tolist() == [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]


def test_a_layer_is_judged_by_what_the_pruned_layer_below_lets_through():
    """Below, output 0 loses its larger share, so that the weight on it, which would win unpruned, goes."""
    below, above = layer([[1.0, 1.0, 1.0, 1.01], [0.0, 0.0, 0.0, 2.0]]), layer([[1.0, 1.2]])
    inputs = torch.ones(4, 4)
    output, _, _ = prune(PruneWanda(0.5), nn.Sequential(below, above), inputs)
    assert output[1].weight.tolist() == [[0.0, pytest.approx(1.2)]]
    alone, _, _ = prune(only("1", PruneWanda(0.5)), nn.Sequential(below, above), inputs)
    assert alone[1].weight.tolist() == [[1.0, 0.0]]


def test_every_matrix_of_attention_and_recurrent_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            x = self.rnn(x)[0]
            return self.attention(x, x, x)[0]

    output, _, context = prune(PruneWanda(0.75), Model().eval(), torch.randn(3, 5, 6))
    matrices = {name: value for name, value in output.named_parameters() if value.dim() >= 2}
    assert context.sparse == set(matrices)
    for name, value in matrices.items():
        gone = round(0.75 * value.shape[1])
        assert ((value == 0).sum(1) == gone).all(), name


def test_zeros_outlive_training():
    task = small_models()["plain"]
    context = Context(data=task.data, teacher=task.model)
    pruned, _ = run(PruneWanda(0.6), task.model, Context(data=task.data))
    healed, _ = run(Recipe((PruneWanda(0.6), Distill(epochs=2))), task.model, context)
    for name in context.sparse:
        assert not healed.get_parameter(name)[pruned.get_parameter(name) == 0].any(), name


def test_what_is_never_reached_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    output, _, context = prune(PruneWanda(0.5), Model(), INPUTS)
    assert output.idle.weight.all()
    assert [left.path for left in context.untouched] == ["idle"]


def test_unreadable_patterns_are_refused():
    for pattern in ("4x1", "5:4", "many", 124):
        with pytest.raises(RecipeError, match="prune_wanda: pattern="):
            PruneWanda(0.5, pattern=pattern)
    with pytest.raises(RecipeError, match=r"removes 0\.5, not ratio=0\.9: give that ratio"):
        PruneWanda(0.9, pattern="2:4")
