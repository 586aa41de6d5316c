"""What enters each weight, against the layers themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from featherweight.data import Data
from featherweight.technique import Context
from featherweight.techniques.moments import in_call_order, input_energy, inverse_factor, second_moments, weights_of


def context(*batches):
    return Context(data=Data(example=batches[0], calibrate=[(inputs, None) for inputs in batches]))


def moment(inputs):
    flat = inputs.detach().double().flatten(0, -2)
    return flat.T @ flat / len(flat)


def test_linear_by_hand():
    batches = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    seen = second_moments(nn.Linear(2, 3), context(*batches), [""], 8)
    assert seen["weight"].tolist() == [[[5.0, 1.0], [1.0, 2.0]]]
    assert second_moments(nn.Linear(2, 3), context(*batches), [""], 1)["weight"].tolist() == [[[1.0, 2.0], [2.0, 4.0]]]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 6, (3, 2), padding="same", groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="reflect", groups=4, bias=False),
        nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 0), bias=False),
    ],
    ids=str,
)
def test_patches_of_convolutions_make_the_outputs(layer):
    """`W E[x x^T] W^T` is the second moment of the outputs, for each group."""
    images = torch.randn(3, 4, *[6] * len(layer.kernel_size))
    seen = second_moments(layer, context(images), [""], 1)["weight"]
    weight = layer.weight.detach().double().reshape(layer.groups, -1, seen.shape[-1])
    outputs = layer(images).unflatten(1, (layer.groups, -1)).movedim(2, -1)
    for group in range(layer.groups):
        made = weight[group] @ seen[group] @ weight[group].T
        assert torch.allclose(made, moment(outputs[:, group]), atol=1e-5)
    energy = input_energy(layer, context(images), [""], 1)["weight"]
    positions = outputs[:, 0, ..., 0].numel()
    diagonal = seen.diagonal(dim1=1, dim2=2).repeat_interleave(weight.shape[1], 0)
    assert torch.allclose(energy, diagonal * positions)


@pytest.mark.parametrize("same", [True, False])
def test_attention_sees_queries_keys_values_and_mixed_values(same):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=None if same else 5, vdim=None if same else 6)
    query = torch.randn(2, 3, 8)
    others = (torch.randn(2, 4, 8), torch.randn(2, 4, 8)) if same else (torch.randn(2, 4, 5), torch.randn(2, 4, 6))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, query, key, value):
            return self.inner(query, key, value=value)[0]

    model = Model().eval()
    seen = second_moments(model, context((query, *others)), ["inner"], 1)
    weight = layer.out_proj.weight.detach().double()
    outputs = model(query, *others) - layer.out_proj.bias
    assert torch.allclose(weight @ seen["inner.out_proj.weight"][0] @ weight.T, moment(outputs), atol=1e-6)
    if same:
        assert seen["inner.in_proj_weight"].shape == (3, 8, 8)
        assert torch.allclose(seen["inner.in_proj_weight"][2], moment(others[1]))
    else:
        assert torch.allclose(seen["inner.k_proj_weight"][0], moment(others[0]))
        assert torch.allclose(seen["inner.v_proj_weight"][0], moment(others[1]))
    assert set(weights_of(model, context((query, *others)), ["inner"])) == set(seen)


def test_the_fused_encoder_layer_is_watched_and_put_back():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    steps = torch.randn(2, 3, 8)
    seen = second_moments(model, context(steps), ["self_attn", "linear2"], 1)
    inner = F.relu(model.linear1(model.norm1(steps + model._sa_block(steps, None, None))))
    assert torch.allclose(seen["linear2.weight"][0], moment(inner), atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda **options: nn.LSTM(5, 4, **options),
        lambda **options: nn.LSTM(5, 4, proj_size=3, **options),
        lambda **options: nn.GRU(5, 4, **options),
        lambda **options: nn.RNN(5, 4, nonlinearity="relu", **options),
    ],
)
def test_hidden_states_of_recurrent_layers(build, batch_first):
    """The second layer and the backward direction see what a stack of single layers gives."""
    torch.manual_seed(0)
    layer = build(num_layers=2, bidirectional=True, batch_first=batch_first)
    steps = torch.randn(3, 7, 5)
    given = steps if batch_first else steps.transpose(0, 1)
    seen = second_moments(layer, context(given), [""], 1)
    options = {"batch_first": True, "bidirectional": True}
    first = type(layer)(
        5, 4, **options, **({"proj_size": 3} if layer.proj_size else {}), **nonlinearity(layer)
    ).requires_grad_(False)
    first.load_state_dict({name: value for name, value in layer.state_dict().items() if "l0" in name})
    below = first(steps)[0]
    whole = layer(given)[0]
    whole = whole if batch_first else whole.transpose(0, 1)
    assert torch.allclose(seen["weight_ih_l0"][0], moment(steps))
    assert torch.allclose(seen["weight_ih_l1"][0], moment(below), atol=1e-6)
    assert torch.equal(seen["weight_ih_l1"], seen["weight_ih_l1_reverse"])
    for name, states in (("l0", below), ("l1", whole)):
        forward, backward = states.chunk(2, -1)
        zero = torch.zeros_like(forward[:, :1])
        assert torch.allclose(seen[f"weight_hh_{name}"][0], moment(torch.cat((zero, forward[:, :-1]), 1)), atol=1e-6)
        before = torch.cat((backward[:, 1:], zero), 1)
        assert torch.allclose(seen[f"weight_hh_{name}_reverse"][0], moment(before), atol=1e-6)
    if layer.proj_size:
        weight = layer.weight_hr_l1.detach().double()
        made = weight @ seen["weight_hr_l1"][0] @ weight.T
        assert torch.allclose(made, moment(whole.chunk(2, -1)[0]), atol=1e-6)
    assert set(seen) == {name for name, _ in layer.named_parameters() if name.startswith("weight")}


def nonlinearity(layer):
    return {"nonlinearity": layer.nonlinearity} if type(layer) is nn.RNN else {}


def test_packed_sequences_leave_padding_out():
    torch.manual_seed(0)
    layer = nn.LSTM(5, 4, bidirectional=True, batch_first=True)
    long, short = torch.randn(6, 5), torch.randn(3, 5)
    padded = nn.utils.rnn.pad_sequence([short, long], batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, padded):
            packed = pack_padded_sequence(padded, torch.tensor([3, 6]), batch_first=True, enforce_sorted=False)
            return self.inner(packed)[0].data

    together = second_moments(Model(), context(padded), ["inner"], 1)
    apart = second_moments(layer, context(short[None], long[None]), [""], 2)
    for name, value in apart.items():
        assert torch.allclose(together[f"inner.{name}"], value, atol=1e-6), name


def test_initial_states_and_unbatched_steps():
    torch.manual_seed(0)
    layer = nn.GRU(5, 4)
    steps, state = torch.randn(2, 5), torch.randn(1, 4)
    _, hidden = layer(steps[:1], state)
    seen = second_moments(layer, context((steps, state)), [""], 1)
    assert torch.allclose(seen["weight_hh_l0"][0], moment(torch.cat((state, hidden))), atol=1e-6)


def test_embeddings_count_tokens_and_ties_add_up():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.tensor([[0, 1], [1, 3]])
    data = context(tokens)
    counts = input_energy(model, data, ["0"], 1)["0.weight"]
    assert counts.tolist() == [[1.0] * 3, [2.0] * 3, [0.0] * 3, [1.0] * 3]
    both = input_energy(model, data, ["0", "1"], 1)["0.weight"]
    squares = model[0](tokens).double().square().sum((0, 1))
    assert torch.allclose(both, counts + squares)
    assert in_call_order(model, data) == [["0", "1"]]


def test_order_is_that_of_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.never, self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.up = nn.ConvTranspose1d(2, 2, 1)

        def forward(self, x):
            return self.second(self.first(x))

    data = context(torch.randn(1, 2))
    assert in_call_order(Model(), data) == [["first"], ["second"], ["never"]]
    assert [left.path for left in data.untouched] == ["up"]


def test_the_factor_of_a_singular_moment_takes_a_little_damping():
    """Where none was asked for too: ten times nothing would stay nothing."""
    factor = inverse_factor(torch.ones(1, 3, 3, dtype=torch.float64), 0.0)
    assert torch.isfinite(factor).all()
    assert torch.equal(factor, factor.triu())
