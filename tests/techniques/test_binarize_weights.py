"""Binary weights and inputs: signs and steps by hand, their gradients, one bit a weight, ONNX Runtime, sparse tensors refused."""

import copy
import math

import pytest
import torch
from torch import nn

from featherweight.coding import encode_tensor
from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.layers import QuantizedLinear
from featherweight.layers.signs import SURROGATES, sign
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session
from featherweight.scoring import evaluate
from featherweight.technique import Context, Recipe
from featherweight.techniques import BinarizeWeights, PruneWeights
from featherweight.techniques.rounding import grid_scale


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    )
    inputs = drawn(640, 8)
    batches = [(inputs[at : at + 32], inputs[at : at + 32, :4].argmax(1)) for at in range(0, 640, 32)]
    data = Data(example=inputs[:2], train=batches[:16], calibrate=batches[:4], validate=batches[16:])
    return model.eval(), data


def trained(recipe):
    model, data = task()
    context = Context(data=data, teacher=copy.deepcopy(model))
    return run(recipe, model, context).model, data


def test_the_step_of_signs_is_the_mean_magnitude():
    weight = torch.tensor([[1.0, -3.0, 0.0, 4.0]])
    assert grid_scale(weight, 1, per_channel=True).item() == 2.0
    layer = QuantizedLinear(4, 1, bits=1, bias=False)
    assert layer.nearest(weight).tolist() == [[1, -1, 1, 1]]


@pytest.mark.parametrize(
    ("gradient", "slopes"),
    [
        ("straight_through", [0.0, 1.0, 1.0, 1.0]),
        ("polynomial", [0.0, 1.0, 2.0, 1.5]),  # 2 - 2 |x|
        # 2 (cos(t) + cos(3 t)), t = pi x / 2: at 0.5 both are 1/sqrt(2) with opposite signs
        ("frequency", [0.0, 0.0, 4.0, 2 * (math.cos(math.pi / 8) + math.cos(3 * math.pi / 8))]),
    ],
)
def test_gradients_of_a_sign_by_hand(gradient, slopes):
    values = torch.tensor([-1.5, -0.5, 0.0, 0.25], requires_grad=True)
    signs = sign(values, gradient)
    torch.testing.assert_close(signs, torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    signs.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor(slopes), atol=1e-5, rtol=1e-5)


def test_surrogates_end_where_signs_are():
    """At the ends of their range the identity and the parabolas are -1 and 1, the series near it."""
    ends = torch.tensor([-1.0, 1.0])
    for name, surrogate in SURROGATES.items():
        torch.testing.assert_close(surrogate(ends), ends, atol=0.0 if name != "frequency" else 0.16, rtol=0.0)


def test_gradient_of_the_step_by_hand():
    """Of a weight it is the mean over the sign times the gradient, slowed as LSQ's."""
    layer = QuantizedLinear(4, 1, bits=1, bias=False)
    layer.codes.copy_(torch.tensor([[1, -1, 1, 1]]))
    layer.scale.fill_(0.5)
    layer.thaw()
    layer.train()
    output = layer(torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    assert output.item() == pytest.approx(0.5 * (1 - 1 + 1 + 2))
    output.backward()
    assert layer.scale.grad.item() == pytest.approx(3 * 4**-0.5)
    assert layer.weight.grad.tolist() == [[0.5, 0.5, 0.5, 1.0]]  # within two steps, half the slope


def test_one_bit_a_weight_and_two_values():
    output, _ = trained(BinarizeWeights(epochs=1))
    inner = output[2]
    assert sorted(inner.codes.unique().tolist()) == [-1, 1]
    assert 8 * len(encode_tensor(inner.codes)) <= 1.02 * inner.codes.numel()
    assert torch.equal(inner.dequantized().abs(), inner.scale[:, None].expand(64, 64))


@pytest.mark.parametrize("gradient", SURROGATES)
def test_a_binary_network_runs_in_onnx_runtime(gradient):
    output, data = trained(BinarizeWeights(epochs=1, activations=1, gradient=gradient))
    signed, unsigned = output[2], output[4]
    assert (signed.input_signs, unsigned.input_signs) == (True, False)
    assert (int(signed.input_zero), int(unsigned.input_zero)) == (1, 0)
    seen = []
    handles = [
        layer.register_forward_hook(lambda layer, args, _: seen.append(layer._on_grid(args[0], "input", 1)))
        for layer in (signed, unsigned)
    ]
    inputs = drawn(64, 8, seed=3)
    with torch.no_grad():
        wanted = output(inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[0].unique(), torch.stack([-signed.input_scale, signed.input_scale]))
    torch.testing.assert_close(seen[1].unique(), torch.stack([torch.zeros(()), unsigned.input_scale]))
    ran = torch.from_numpy(Session(assemble(export_graph(output, data), output.state_dict())).run(inputs)[0])
    # biases of inner layers stay float: the products of their large steps are no grid to round them to
    assert float((ran - wanted).square().mean() / wanted.square().mean()) < 1e-2


def test_training_brings_signs_back():
    scores = []
    for epochs, rate in ((1, 0.0), (8, 1e-2)):
        output, data = trained(BinarizeWeights(epochs=epochs, learning_rate=rate, gradient="polynomial"))
        scores.append(evaluate(output, data, "validate", torch.device("cpu")).value)
    assert scores[1] > scores[0] + 0.1, scores


def test_sparse_tensors_are_refused():
    with pytest.raises(RecipeError, match=r"2\.weight.*ternarize_weights"):
        trained(Recipe((PruneWeights(ratio=0.5), BinarizeWeights(epochs=1))))
