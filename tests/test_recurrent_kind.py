"""Recurrent layers over linear ones compute what PyTorch's do, whatever they are called with and however they were cut."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from featherweight.data import Data
from featherweight.edits import Swap, apply, from_json, replay, to_json
from featherweight.errors import ModelError
from featherweight.layers import SplitRecurrent, build
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import FactorRecurrent, PruneChannels, PruneWanda
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.zoo import randomise, small_models

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 6, 8
CELLS = (nn.LSTM, nn.GRU, nn.RNN)


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.recurrent = randomise(layer, 1)

    def forward(self, steps, start=None):
        return self.recurrent(steps, start)


def swapped(model, **context):
    """A copy with every recurrent layer swapped, and the edits."""
    model, edits = copy.deepcopy(model), []
    for edit in recurrent_swaps(model, Context(data=Data(example=torch.ones(1)), **context)):
        apply(model, edit)
        edits.append(edit)
    return model, edits


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in leaves(part)]


def same(ours, theirs):
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *itertools.product(CELLS, [{}, {"num_layers": 3, "bias": False}, {"num_layers": 2, "bidirectional": True}]),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
        (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
    ],
    ids=str,
)
def test_the_same_with_states_packed_and_without_a_batch(cell, options, batch_first):
    theirs = Holder(cell(INPUTS, HIDDEN, batch_first=batch_first, **options)).eval()
    ours, edits = swapped(theirs)
    assert isinstance(ours.recurrent, SplitRecurrent)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    states = drawn(count, BATCH, options.get("proj_size", HIDDEN), seed=1), drawn(count, BATCH, HIDDEN, seed=2)
    start, alone = (states, tuple(state[:, 0] for state in states))
    if cell is not nn.LSTM:
        start, alone = states[0], states[0][:, 0]
    steps = drawn(BATCH, STEPS, INPUTS) if batch_first else drawn(STEPS, BATCH, INPUTS)
    packed = pack_padded_sequence(steps, torch.tensor([2, 5, 4]), batch_first=batch_first, enforce_sorted=False)
    for given in ((steps,), (steps, start), (packed,), (packed, start), (drawn(STEPS, INPUTS), alone)):
        same(ours(*given), theirs(*given))
    again = replay(Holder(cell(INPUTS, HIDDEN, batch_first=batch_first, **options)), from_json(to_json(edits)))
    again.load_state_dict(ours.state_dict(), strict=True)
    same(again.eval()(steps), ours(steps))


def test_a_unit_keeps_its_rows_in_every_gate():
    theirs = Holder(nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True))
    ours, _ = swapped(theirs)
    assert torch.equal(ours.recurrent.hidden[3].weight, theirs.recurrent.weight_hh_l1_reverse)
    assert torch.equal(ours.recurrent.incoming[2].bias, theirs.recurrent.bias_ih_l1)
    assert [layer.in_features for layer in ours.recurrent.incoming] == [INPUTS, INPUTS, 2 * HIDDEN, 2 * HIDDEN]


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_theirs(cell):
    theirs = Holder(cell(INPUTS, HIDDEN, 2))
    ours, _ = swapped(theirs)
    for model in (ours, theirs):
        leaves(model(drawn(STEPS, BATCH, INPUTS)))[0].square().sum().backward()
    parameters = dict(theirs.recurrent.named_parameters())
    assert len(parameters) == len(list(ours.parameters()))
    pairs = {"incoming.0.weight": "weight_ih_l0", "hidden.0.bias": "bias_hh_l0", "hidden.1.weight": "weight_hh_l1"}
    for new, old in pairs.items():
        assert torch.equal(ours.recurrent.get_parameter(new).grad, parameters[old].grad)


def test_dropout_between_layers_while_training_only():
    ours, _ = swapped(Holder(nn.GRU(INPUTS, HIDDEN, 2, dropout=0.5)))
    steps = drawn(STEPS, BATCH, INPUTS)
    assert not torch.equal(ours.train()(steps)[0], ours(steps)[0])
    assert torch.equal(ours.eval()(steps)[0], ours(steps)[0])


def test_a_cut_layer_is_swapped_at_its_size():
    task = small_models()["recurrent"]
    cut, edits = run(PruneChannels(ratio=0.5), task.model, Context(data=task.data))
    hidden = cut.lstm.weight_hh_l0.shape[1]
    assert hidden < task.model.lstm.hidden_size
    ours, more = swapped(cut)
    assert more[0].options["hidden_size"] == hidden
    same(ours(task.data.example), cut(task.data.example))
    again = replay(small_models()["recurrent"].model, from_json(json.loads(json.dumps(to_json([*edits, *more])))))
    again.load_state_dict(ours.state_dict(), strict=True)


def test_what_was_sparse_is_sparse_under_its_new_name():
    model, names = Holder(nn.LSTM(INPUTS, HIDDEN, 2)), {"recurrent.weight_hh_l1", "recurrent.weight_ih_l0", "other"}
    edits = recurrent_swaps(model, Context(data=Data(example=torch.ones(1)), sparse=names))
    apply(model, next(edits))
    assert set(edits.send(True).sparse) == {"recurrent.hidden.1.weight", "recurrent.incoming.0.weight"}


def test_what_is_left_alone_and_why():
    tied = nn.ModuleList([nn.GRU(8, 8), nn.GRU(8, 8)])
    tied[1].weight_hh_l0 = tied[0].weight_hh_l0
    alike = nn.ModuleList([nn.GRU(8, 8)])
    alike[0].weight_hh_l0 = alike[0].weight_ih_l0
    for model, reason in ((tied, "tied to 1.weight_hh_l0"), (alike, "two of its own")):
        context = Context(data=Data(example=torch.ones(1)))
        assert not list(recurrent_swaps(model, context))
        assert context.untouched[0].path == "0"
        assert reason in context.untouched[0].reason
    _, edits = swapped(nn.ModuleList([nn.RNN(4, 4), nn.RNN(4, 4)]), scope=(("1",),))
    assert [edit.path for edit in edits] == ["1"]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_it_is_one_kernel_in_onnx_runtime(cell):
    """No constant but the weights, no product but the kernel's; states come from outside."""
    ours, _ = swapped(Holder(cell(INPUTS, HIDDEN, 2, bidirectional=True)).eval())
    start = [drawn(BATCH, 4, HIDDEN, seed=seed) for seed in range(2 if cell is nn.LSTM else 1)]

    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ours

        def forward(self, steps, hidden, memory=None):
            parts = [part.transpose(0, 1) for part in (hidden, memory) if part is not None]
            return self.inner(steps.transpose(0, 1), tuple(parts) if parts[1:] else parts[0])

    given = (drawn(BATCH, STEPS, INPUTS), *start)
    graph = export_graph(Started().eval(), Data(example=given))
    assert not graph.constants
    assert len(graph.weights) == len(list(ours.parameters()))
    model = assemble(graph, Started().state_dict())
    assert audit(model)[cell.__name__] == 2
    assert not {"MatMul", "Gemm"} & set(audit(model))
    with torch.no_grad():
        wanted = leaves(Started()(*given))
    for one, other in zip(Session(model).run(given), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-5, rtol=1e-4)


def test_a_linear_layer_in_it_may_become_factors_and_nothing_that_is_not_linear():
    ours, _ = swapped(Holder(nn.GRU(INPUTS, HIDDEN)).eval())
    steps, layer = drawn(STEPS, BATCH, INPUTS), ours.recurrent.hidden[0]
    whole = ours(steps)[0]
    left, middle, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    options = {"in_features": HIDDEN, "rank": HIDDEN, "out_features": 3 * HIDDEN}
    state = {"0.weight": right, "1.weight": left * middle, "1.bias": layer.bias.detach()}
    apply(ours, Swap("recurrent.hidden.0", "factored_linear", options, state))
    torch.testing.assert_close(ours(steps)[0], whole, atol=1e-6, rtol=1e-5)
    ours.recurrent.hidden[0] = nn.Sequential(nn.Linear(HIDDEN, 4), nn.Linear(4, 3 * HIDDEN))  # offsets add up
    first, second = ours.recurrent.hidden[0]
    held = [value for value in ours.recurrent._flat_weights if value.shape == (3 * HIDDEN,)][1]
    torch.testing.assert_close(held, second.weight @ first.bias + second.bias)
    ours.recurrent.hidden[0] = nn.Sequential(layer, nn.Tanh())
    with pytest.raises(ModelError, match="linear"):
        ours(steps)


def test_hooks_on_its_linear_layers_see_what_enters_them():
    """The factors of a hidden matrix are pruned by what enters the first: the identity."""
    model, steps = Holder(nn.LSTM(INPUTS, 24, batch_first=True)).eval(), drawn(BATCH, STEPS, INPUTS)
    context = Context(data=Data(example=steps, calibrate=[steps]))
    recipe = Recipe(
        (FactorRecurrent(rank="ratio", ratio=0.4, hidden="factors"), only("*.hidden.*", PruneWanda(ratio=0.5)))
    )
    small, _ = run(recipe, model, context)
    first, second = small.recurrent.layers[0].hidden[0]
    assert (first.weight == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (second.weight == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_dense_layers_of_the_factored_kind_are_swapped_too():
    model, steps = Holder(nn.LSTM(24, 24, 2, batch_first=True)).eval(), drawn(BATCH, STEPS, 24)
    context = Context(data=Data(example=steps, calibrate=[steps]))
    small, _ = run(FactorRecurrent(rank="ratio", ratio=0.4, hidden="dense"), model, context)
    ours, edits = swapped(small)
    assert [edit.path for edit in edits] == ["recurrent.layers.0", "recurrent.layers.1"]
    same(ours(steps), small(steps))


def test_options_that_make_no_sense_are_refused():
    for options in ({"cell": "mgu"}, {"cell": "gru", "proj_size": 2}, {"cell": "lstm", "proj_size": 9}):
        with pytest.raises(ModelError, match="recurrent"):
            build("recurrent", {"input_size": 4, "hidden_size": 8, **options})


def test_under_mixed_precision_it_follows_pytorch():
    theirs = Holder(nn.LSTM(INPUTS, HIDDEN, 2))
    ours, _ = swapped(theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = theirs(drawn(STEPS, BATCH, INPUTS))
        except RuntimeError as error:  # of oneDNN, on AVX2
            pytest.skip(f"PyTorch has no LSTM in bfloat16 on this CPU: {error}")
        same(ours(drawn(STEPS, BATCH, INPUTS)), expected)
    double, _ = swapped(Holder(nn.LSTM(INPUTS, HIDDEN)).double())
    assert double(drawn(STEPS, BATCH, INPUTS).double())[0].dtype == torch.float64
