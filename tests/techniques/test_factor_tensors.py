"""Products of small tensors: exact where a weight is one, the nearest otherwise, and counted as promised."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.layers import build
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import FactorTensors, QuantizeWeights
from featherweight.techniques.tensor_forms import (
    balanced,
    block_factors,
    canonical_factors,
    circulant_waves,
    train_cores,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(layer, example, **settings):
    model = nn.Sequential(layer).eval()
    context = Context(data=Data(example=example))
    return run(FactorTensors(**{"minimum": 4, **settings}), model, context).model, model, context


def weights(module):
    return sum(value.numel() for name, value in module.named_parameters() if not name.endswith("bias"))


@pytest.mark.parametrize(
    ("width", "count", "factors"),
    [(12, 2, [3, 4]), (64, 3, [4, 4, 4]), (7, 2, None), (10, 3, None), (784, 2, [28, 28])],
)
def test_factors_of_a_width(width, count, factors):
    assert balanced(width, count) == factors


def test_a_kronecker_product_stays_what_it_is():
    left, right = drawn(3, 4), drawn(5, 4, seed=1)
    layer = nn.Linear(16, 15)
    layer.weight.data = torch.kron(left, right).float()
    example = drawn(2, 7, 16).float()
    output, model, _ = factored(layer, example, ratio=0.8)
    assert weights(output) == 12 + 20  # one product, of 240 weights
    torch.testing.assert_close(output(example), model(example))


def test_the_nearest_kronecker_product():
    """[[3, 0], [0, 4]] over 1 x 1 blocks: its rearrangement is one row, and one product is exact; two diagonals are not."""
    diagonal = torch.diag(torch.tensor([3.0, 3.0, 4.0, 4.0], dtype=torch.float64))
    cores = train_cores(diagonal.reshape(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4), 1)
    assert [tuple(core.shape) for core in cores] == [(1, 4, 1), (1, 4, 1)]
    rebuilt = torch.kron(cores[0].reshape(2, 2), cores[1].reshape(2, 2))
    torch.testing.assert_close(rebuilt, diagonal)  # diag(3, 4) x identity


def test_a_tensor_train_of_full_rank_is_exact():
    tensor = drawn(4, 6, 5)
    first, second, third = train_cores(tensor, 99)
    torch.testing.assert_close(torch.einsum("aib,bjc,ckd->ijk", first, second, third), tensor)


@pytest.mark.parametrize(
    ("form", "ratio"), [("kronecker", 0.6), ("tensor_train", 0.6), ("groups", 0.5), ("circulant", 0.5)]
)
def test_a_linear_layer_loses_the_share_asked_for_and_multiplies_what_its_factors_stand_for(form, ratio):
    torch.manual_seed(0)
    layer, example = nn.Linear(64, 32), torch.randn(3, 64)
    output, _, _ = factored(layer, example, form=form, ratio=ratio, groups=4)
    kept = weights(output)
    assert 0.25 * 64 * 32 < kept <= (1 - ratio) * 64 * 32
    matrix = output(torch.eye(64)) - output(torch.zeros(1, 64))
    torch.testing.assert_close(output(example), example @ matrix + output(torch.zeros(1, 64)), rtol=1e-4, atol=1e-5)
    error = (matrix.T - layer.weight).norm() / layer.weight.norm()
    assert error < (0.88 if form == "circulant" else 0.85)  # of noise, means of four keep a quarter of the energy


def test_blocks_are_the_nearest_of_their_rank():
    weight = drawn(6, 8)
    first, second = block_factors(weight, 2, 1)
    layer = build("group_linear", {"in_features": 8, "out_features": 6, "groups": 2, "rank": 1, "bias": False}).double()
    layer.first.weight.data, layer.second.weight.data = first[:, :, None], second[:, :, None]
    made = layer(torch.eye(8, dtype=torch.float64)).T
    for rows in (slice(0, 3), slice(3, 6)):
        for columns in (slice(0, 4), slice(4, 8)):
            values = torch.linalg.svdvals(weight[rows, columns])
            error = (made - weight)[rows, columns].norm()
            torch.testing.assert_close(error, values[1:].norm())


@pytest.mark.parametrize("block", [2, 4, 5])
def test_a_matrix_of_circulants_stays_what_it_is(block):
    rows = drawn(2, 3, block)
    moved = torch.stack([rows.roll(step, -1) for step in range(block)], 2)  # out part, in part, row, column
    layer, example = nn.Linear(3 * block, 2 * block), drawn(7, 3 * block).float()
    layer.weight.data = moved.transpose(1, 2).reshape(2 * block, 3 * block).float()
    real, imaginary = circulant_waves(layer.weight.detach(), block)
    options = {"in_features": 3 * block, "out_features": 2 * block, "block": block}
    state = {"bias": layer.bias.detach(), "real.weight": real[:, :, None], "imaginary.weight": imaginary[:, :, None]}
    made = build("circulant_linear", options)
    made.load_state_dict(state)
    torch.testing.assert_close(made(example), layer(example))


def test_circulant_blocks_are_the_smallest_allowed_and_the_nearest():
    layer, example = nn.Linear(8, 12), drawn(5, 8).float()
    output, _, _ = factored(layer, example, form="circulant", ratio=0.5)
    assert output[0].block == 4
    assert weights(output) == 2 * 3 * (2 * 3)  # three frequencies of 2 x 3 blocks, complex
    made = output[0].product(torch.eye(8)).T
    for row in range(0, 12, 4):
        for column in range(0, 8, 4):
            found, wanted = (matrix[row : row + 4, column : column + 4] for matrix in (made, layer.weight))
            for step in range(4):
                diagonal = [wanted[place, (place + step) % 4] for place in range(4)]
                torch.testing.assert_close(found[0, step], sum(diagonal) / 4)
                torch.testing.assert_close(found[3, (3 + step) % 4], sum(diagonal) / 4)


def test_canonical_factors_of_a_tensor_that_has_them():
    parts = [drawn(k, 2, seed=k) for k in (6, 5, 3, 2)]
    tensor = torch.einsum("az,bz,cz,dz->abcd", *parts)
    found = canonical_factors(tensor, 2, 60, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.einsum("az,bz,cz,dz->abcd", *found), tensor, rtol=1e-3, atol=1e-3)


def test_a_convolution_that_is_canonical_stays_what_it_is():
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2)
    layer.weight.data = torch.einsum(
        "az,bz,cz,dz->abcd", *(drawn(k, 2, seed=k + i) for i, k in enumerate((8, 6, 3, 3)))
    ).float()
    image = drawn(2, 6, 11, 12).float()
    output, model, _ = factored(layer, image, form="canonical", ratio=0.9)  # 43 of 432 may stay
    assert weights(output) == 2 * 20
    torch.testing.assert_close(output(image), model(image), rtol=1e-2, atol=1e-2)


def test_an_embedding_as_a_train():
    torch.manual_seed(0)
    layer, index = nn.Embedding(100, 8), torch.randint(0, 100, (4, 9))
    output, model, _ = factored(layer, index, form="tensor_train", ratio=0.01)
    assert output(index).shape == (4, 9, 8)
    assert weights(output) <= 0.99 * 800
    every = torch.arange(100)
    error = (output(every) - model(every)).norm() / model(every).norm()
    assert error < 0.8
    torch.testing.assert_close(output(index), output(every)[index])


def test_recurrent_matrices_are_factored_and_quantized_after():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model, example = Reader().eval(), torch.randn(2, 5, 16)
    recipe = Recipe((FactorTensors(ratio=0.5, minimum=1000), QuantizeWeights(bits=8)))
    output, _ = run(recipe, model, Context(data=Data(example=example)))
    assert output.lstm.hidden[0].__class__.__name__ == "TensorTrainLinear"
    assert output.lstm.hidden[0].cores[0].__class__.__name__ == "QuantizedLinear"
    assert output(example).shape == (2, 4)


@pytest.mark.parametrize(
    ("layer", "example", "settings", "reason"),
    [
        (nn.Linear(7, 64), torch.zeros(1, 7), {}, "no product of 2"),
        (nn.Linear(8, 8), torch.zeros(1, 8), {"ratio": 0.99}, "more than the 1 that would stay"),
        (nn.Linear(8, 9), torch.zeros(1, 8), {"form": "groups"}, "no multiple of 4"),
        (nn.Linear(8, 9), torch.zeros(1, 8), {"form": "circulant"}, "no block that divides 9 and 8"),
        (nn.Linear(8, 8), torch.zeros(1, 8), {"minimum": 65}, "fewer than 65"),
        (nn.Conv2d(4, 4, 3, groups=2), torch.zeros(1, 4, 5, 5), {"form": "canonical"}, "grouped"),
        (nn.Embedding(27, 8, padding_idx=0), torch.zeros(1, 2).long(), {"form": "tensor_train"}, "padding index"),
    ],
    ids=str,
)
def test_what_stays_as_it_is(layer, example, settings, reason):
    output, model, context = factored(layer, example, **settings)
    assert type(output[0]) is type(layer)
    assert torch.equal(output[0].weight, model[0].weight)
    assert reason in context.untouched[0].reason
