"""Layers taken apart: the same function, its parts ordinary layers that later steps can name."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import Swap
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import LowRank, PruneChannels, PruneWeights, QuantizeWeights, SplitLayers


class Reader(nn.Module):
    """Attention of a sequence to itself, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True, **options), nn.Linear(16, 3)

    def forward(self, value):
        return self.head(self.attention(value, value, value, need_weights=False)[0])


def split(technique, **options):
    torch.manual_seed(0)
    model, steps = Reader(**options).eval(), torch.randn(4, 6, 16)
    context = Context(data=Data(example=steps))
    output, edits = run(technique, model, context)
    return model, output, edits, context, steps


def test_the_same_function_of_ordinary_layers():
    model, output, edits, _, steps = split(SplitLayers())
    assert [(edit.path, edit.kind) for edit in edits] == [("attention", "attention")]
    parts = [output.attention.query, output.attention.key, output.attention.value, output.attention.out]
    assert all(type(part) is nn.Linear for part in parts)
    assert torch.allclose(model(steps), output(steps), atol=1e-6)


def test_later_steps_treat_each_part_by_its_name():
    recipe = (
        SplitLayers()
        + PruneWeights(ratios="attention.query.weight 0.75, attention.value.weight 0.5")
        + only("attention.key, attention.out", QuantizeWeights(bits=3))
    )
    _, output, _, context, steps = split(recipe)
    assert context.sparse == {"attention.query.weight", "attention.value.weight"}
    assert int((output.attention.query.weight == 0).sum()) == 192
    assert type(output.attention.key).__name__ == "QuantizedLinear"
    assert type(output.attention.value) is nn.Linear
    assert output(steps).shape == (4, 6, 3)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_attends_to_more_than_its_input_is_left(options):
    _, output, edits, context, _ = split(SplitLayers(), **options)
    assert not edits
    assert type(output.attention) is nn.MultiheadAttention
    assert "attends to more than its input" in context.untouched[0].reason


class Steps(nn.Module):
    """A recurrent cell in a loop over the steps, from a state of zeros that the cell or this model makes."""

    def __init__(self, cell, own=False, **options):
        super().__init__()
        self.cell, self.head, self.own = cell(5, 7, **options), nn.Linear(7, 3), own
        self.double = cell is nn.LSTMCell

    def forward(self, value):
        zeros = value.new_zeros(value.shape[0], self.cell.hidden_size)
        state = (zeros, zeros) if self.double else zeros
        state = state if self.own else None
        for step in value.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


CELLS = [
    (nn.LSTMCell, {}),
    (nn.LSTMCell, {"bias": False}),
    (nn.GRUCell, {}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("cell", "options"), CELLS)
def test_a_recurrent_cell_is_two_linear_layers(cell, options, own):
    torch.manual_seed(0)
    model, steps = Steps(cell, own, **options).eval(), torch.randn(4, 6, 5)
    context = Context(data=Data(example=steps))
    output, edits = run(Recipe((PruneWeights(ratio=0.5), SplitLayers()), any_order=True), model, context)
    pruned, _ = run(PruneWeights(ratio=0.5), model, Context(data=Data(example=steps)))
    assert [edit.kind for edit in edits if isinstance(edit, Swap)] == ["recurrent_cell"]
    assert type(output.cell.incoming) is type(output.cell.hidden) is nn.Linear
    assert {"cell.incoming.weight", "cell.hidden.weight"} <= context.sparse
    torch.testing.assert_close(output(steps), pruned(steps))
    torch.testing.assert_close(output.cell(steps[0, 0]), pruned.cell(steps[0, 0]))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_units_and_inputs_of_a_cell_are_cut_factored_and_rounded(cell):
    torch.manual_seed(0)
    model, steps = nn.Sequential(nn.Linear(5, 12), Steps(cell)).eval(), torch.randn(4, 6, 5)
    model[1].cell = cell(12, 16)
    model[1].head = nn.Linear(16, 3)
    recipe = PruneChannels(ratio=0.5) + LowRank(rank="ratio", ratio=0.3) + QuantizeWeights(bits=8)
    output, _ = run(recipe, model, Context(data=Data(example=steps, calibrate=[steps])))
    small = output[1].cell
    assert (small.input_size, small.hidden_size) == (6, 8)
    assert isinstance(small.incoming, nn.Sequential)
    session = Session(assemble(export_graph(output, Data(example=steps)), output.state_dict()))
    torch.testing.assert_close(torch.from_numpy(session.run((steps,))[0]), output(steps), atol=1e-5, rtol=1e-4)


BAGS = [{"mode": mode, **options} for mode in ("sum", "mean", "max") for options in ({}, {"padding_idx": 0})]


@pytest.mark.parametrize("options", BAGS, ids=str)
def test_a_bag_of_embeddings_is_an_embedding_and_what_pools_it(options):
    torch.manual_seed(0)
    words = torch.randint(0, 9, (5, 4))
    words[0], words[1, 1:] = 0, 0
    model = nn.EmbeddingBag(9, 6, **options).eval()
    bag = nn.Sequential(model)
    output, edits = run(SplitLayers(), bag, Context(data=Data(example=words)))
    assert [edit.kind for edit in edits] == ["embedding_bag"]
    assert type(output[0].rows) is nn.Embedding
    torch.testing.assert_close(output(words), bag(words))
    rows, offsets = words.flatten(), torch.tensor([0, 3, 3, 9, 14])
    torch.testing.assert_close(output[0](rows, offsets), model(rows, offsets))
    if options == {"mode": "sum"}:
        factors = torch.randn(5, 4)
        torch.testing.assert_close(output[0](words, None, factors), model(words, None, factors))
    for whole in (bag, output):
        session = Session(assemble(export_graph(whole, Data(example=words)), whole.state_dict()))
        torch.testing.assert_close(torch.from_numpy(session.run((words[:3],))[0]), bag(words[:3]))


def test_the_last_offset_may_be_an_end():
    bag = nn.Sequential(nn.EmbeddingBag(9, 6, include_last_offset=True)).eval()
    output, _ = run(SplitLayers(), bag, Context(data=Data(example=torch.zeros(2, 3, dtype=torch.long))))
    rows, offsets = torch.randint(0, 9, (7,)), torch.tensor([0, 2, 7])
    torch.testing.assert_close(output[0](rows, offsets), bag[0](rows, offsets))


def test_rows_of_a_bag_are_rounded_and_its_width_is_cut():
    torch.manual_seed(0)
    words = torch.randint(0, 9, (5, 4))
    model = nn.Sequential(nn.EmbeddingBag(9, 8), nn.Linear(8, 3)).eval()
    output, _ = run(PruneChannels(ratio=0.5) + QuantizeWeights(bits=4), model, Context(data=Data(example=words)))
    assert type(output[0].rows).__name__ == "QuantizedEmbedding"
    assert output[0](words).shape == (5, 4)


def test_a_bag_that_changes_its_rows_is_left():
    words = torch.randint(0, 9, (5, 4))
    context = Context(data=Data(example=words))
    _, edits = run(SplitLayers(), nn.Sequential(nn.EmbeddingBag(9, 6, max_norm=1.0)), context)
    assert not edits
    assert "max_norm" in context.untouched[0].reason


def test_a_model_without_attention_is_left():
    _, edits = run(SplitLayers(), nn.Sequential(nn.Linear(3, 2)), Context(data=Data(example=torch.ones(1, 3))))
    assert not edits
