"""Factorization: known ranks come back exactly, the error is what was promised, and what would grow is left and listed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data
from featherweight.edits import from_json, replay, to_json
from featherweight.errors import RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import LowRank, PruneWeights, QuantizeWeights


def factor(model, example, calibrate=None, **settings):
    context = Context(data=Data(example=example, calibrate=calibrate))
    output, edits = run(LowRank(**settings), model.eval(), context)
    return output, edits, context


def of_rank(rank, rows, columns):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(count, width):
    """Inputs whose directions differ in size a hundredfold, around a mean that is not zero."""
    turned = torch.linalg.qr(drawn(width, width, seed=2)).Q
    return drawn(count, width) * torch.logspace(0, -2, width) @ turned + drawn(width, seed=3)


def error(output, model, inputs):
    """Mean over samples, and places, of the squared distance of the outputs."""
    with torch.no_grad():
        difference = (output.double()(inputs.double()) - model.double()(inputs.double())).movedim(1, -1)
    return float(difference.square().sum(-1).mean())


def test_a_matrix_of_rank_two_comes_back():
    model = nn.Sequential(nn.Linear(20, 16))
    model[0].weight.data = of_rank(2, 16, 20)
    output, _, _ = factor(model, torch.ones(2, 20), energy=0.999999)
    assert output[0][0].weight.shape == (2, 20)
    assert output[0][1].weight.shape == (16, 2)
    assert torch.allclose(output[0][1].weight @ output[0][0].weight, model[0].weight, atol=1e-5)
    assert torch.equal(output[0][1].bias, model[0].bias)
    assert output[0][0].bias is None


def test_energy_chooses_the_rank():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight.data = torch.diag(
        torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    )  # energies 16, 4, 1, 1 of 22
    for energy, rank in ((0.7, 1), (0.72, 1), (0.73, 2), (0.9, 2), (0.95, 3), (0.96, None)):
        output, edits, context = factor(model, torch.ones(2, 8), energy=energy)
        if rank is None:  # rank 4 would take 4 * 16 = 64 weights, no fewer
            assert not edits
            assert "rank 4" in context.untouched[0].reason
        else:
            assert output[0][0].out_features == rank, energy


def test_multiple_rounds_the_rank_up():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight.data = of_rank(3, 32, 32)
    output, _, _ = factor(model, torch.ones(2, 32), energy=0.999999, multiple=4)
    assert output[0][0].out_features == 4


def test_convolutions_of_every_dimension():
    for layer, shape in (
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
        (nn.Conv2d(6, 8, (3, 1), dilation=2, bias=False), (2, 6, 9, 9)),
        (nn.Conv3d(4, 8, 3, padding="same"), (2, 4, 4, 4, 4)),
    ):
        layer.weight.data = of_rank(2, 8, layer.weight[0].numel()).reshape(layer.weight.shape)
        example = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        output, edits, _ = factor(nn.Sequential(layer), example, energy=0.999999)
        assert len(edits) == 1
        with torch.no_grad():
            assert torch.allclose(output(example), layer(example), atol=1e-4)


def test_what_is_left_and_why():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    for model, example, reason in (
        (nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), "would not be smaller"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), torch.ones(2, 8, 4, 4), "grouped"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), torch.ones(2, 8, 4, 4), "padded"),
        (tied, torch.ones(2, 8), "tied"),
    ):
        output, edits, context = factor(model, example, energy=0.95)
        assert not edits
        assert reason in context.untouched[0].reason
        assert context.untouched[0].path == "0"
        assert torch.equal(output(example), model(example))


def test_a_weight_of_zeros_is_no_error():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data.zero_()
    output, _, _ = factor(model, torch.ones(2, 8))
    assert torch.equal(output(torch.ones(2, 8)), model(torch.ones(2, 8)))


@pytest.mark.parametrize("rank", range(1, 6))
def test_the_whitened_error_is_the_dropped_energy(rank):
    """By hand: the eigenvalues of `W C W^T` beyond the rank, `C` the covariance of the inputs; never more than plain."""
    layer = nn.Linear(20, 12).double()
    inputs = uneven(300, 20).double()
    covariance = torch.cov(inputs.T, correction=0)
    weight = layer.weight.detach()
    energies = torch.linalg.eigvalsh(weight @ covariance @ weight.T).flip(0)
    ratio = 1 - (rank * 32 + 12.5) / (20 * 12 + 12)
    found = {}
    for method in ("svd", "whitened"):
        output, _, _ = factor(
            nn.Sequential(layer), inputs[:1], [inputs[:100], inputs[100:]], method=method, rank="ratio", ratio=ratio
        )
        assert output[0][0].out_features == rank
        found[method] = error(output, layer, inputs)
    assert found["whitened"] == pytest.approx(float(energies[rank:].sum()), rel=1e-6)
    assert found["whitened"] < found["svd"]


@pytest.mark.parametrize("shape", ["channel", "spatial", "tucker"])
def test_convolutions_fitted_to_their_inputs_lose_less(shape):
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
    mixed = F.conv2d(drawn(40, 8, 9, 9), drawn(8, 8, 3, 3, seed=4) * torch.logspace(0, -1.5, 8)[:, None, None, None])
    images = mixed.relu()
    for ratio in (0.3, 0.5, 0.7):
        found = {}
        for method in ("svd", "whitened"):
            output, edits, _ = factor(
                nn.Sequential(layer), images[:1], [images], method=method, shape=shape, rank="ratio", ratio=ratio
            )
            assert len(edits) == 1
            found[method] = error(output, layer, images)
            output.float(), layer.float()
        assert found["whitened"] < 0.9 * found["svd"], (shape, ratio)


def test_a_tucker_core_has_no_more_outputs_than_inputs_times_taps():
    """Where a few inputs matter and all outputs do, as in the last layers of VGG-19, more would lose least by the energies."""
    layer = nn.Conv2d(64, 64, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(drawn(64, 64, 3, 3) * torch.logspace(0, -0.5, 64)[:, None, None])
    output, edits, _ = factor(nn.Sequential(layer), torch.ones(1, 64, 5, 5), shape="tucker", rank="ratio", ratio=0.8)
    assert len(edits) == 1
    assert sum(weight.numel() for weight in output.parameters()) <= 0.2 * layer.weight.numel()
    core = output[0][1]
    assert core.out_channels <= 9 * core.in_channels < 64


def test_the_dropped_energy_of_a_convolution_in_its_channels():
    layer = nn.Conv2d(4, 10, 3, padding=1, dilation=(1, 2)).double()
    images = drawn(20, 4, 6, 6).double().cumsum(2)
    with torch.no_grad():
        outputs = layer(images).movedim(1, -1).reshape(-1, 10)
    energies = torch.linalg.eigvalsh(torch.cov(outputs.T, correction=0)).flip(0)  # by hand, from the outputs alone
    output, _, _ = factor(nn.Sequential(layer), images[:1], [images], method="whitened", rank="ratio", ratio=0.5)
    rank = output[0][0].out_channels
    assert rank == int((0.5 * 370 - 10) / 46)
    assert error(output, layer, images) == pytest.approx(float(energies[rank:].sum()), rel=1e-6)


def test_calibration_that_sees_a_layer_only_through_the_layers_before():
    """Sequential fits the second layer to the first one's factors: less error behind both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    inputs = uneven(400, 16)
    found = []
    for sequential in (False, True):
        settings = {"method": "whitened", "rank": "ratio", "ratio": 0.5, "sequential": sequential}
        output, edits, _ = factor(model, inputs[:1], [inputs], **settings)
        assert len(edits) == 3
        found.append(error(output, model, inputs))
        output.float(), model.float()
    assert found[1] < found[0]


def test_a_rank_that_the_inputs_have_costs_nothing():
    """Inputs in three directions: rank 3 is exact on them although the weight has full rank."""
    layer = nn.Linear(16, 16)
    inputs = drawn(50, 3) @ drawn(3, 16, seed=2) + 1.0
    output, _, _ = factor(nn.Sequential(layer), inputs[:1], [inputs], method="whitened", energy=1.0)
    assert output[0][0].out_features == 3
    assert error(output, layer, inputs) < 1e-8


def test_fisher_keeps_the_outputs_that_the_loss_sees():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[1].weight[:, 4:] = 0.0  # most of the hidden units do not reach the loss
        model[0].weight[4:] *= 10  # and would take the whole rank
    inputs, labels = drawn(200, 12), torch.randint(0, 4, (200,))
    found = {}
    for method in ("svd", "fisher"):
        output, edits, _ = factor(model, inputs[:1], [(inputs, labels)], method=method, rank="ratio", ratio=0.3)
        assert edits[0].path == "0"
        found[method] = float((output[0](inputs) - model[0](inputs)).detach()[:, :4].square().mean())
    assert found["fisher"] < 0.02 * found["svd"]
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("layer", "shape", "kind", "children"),
    [
        (nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 2)), "spatial", "separable_convolution", 2),
        (nn.Conv2d(6, 8, (3, 5), dilation=2, padding="same"), "spatial", "separable_convolution", 2),
        (nn.Conv2d(6, 8, 3, padding="valid", bias=False), "tucker", "tucker_convolution", 3),
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), "tucker", "tucker_convolution", 3),
        (nn.Conv3d(6, 8, (1, 3, 3), dilation=2), "tucker", "tucker_convolution", 3),
        (nn.Conv2d(6, 8, (3, 1)), "spatial", "factored_convolution", 2),
        (nn.Conv2d(6, 8, 1), "tucker", "factored_convolution", 2),
        (nn.Conv2d(6, 8, 3), "auto", "separable_convolution", 2),
    ],
)
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_forms_of_a_kernel_of_low_rank(layer, shape, kind, children, method):
    """A kernel that has the ranks of the form comes back exactly, whatever stride, padding and dilation."""
    size = layer.kernel_size
    with torch.no_grad():
        if kind == "tucker_convolution":
            core = drawn(8, 2) @ drawn(2, 2 * layer.weight[0, 0].numel(), seed=2)
            layer.weight.copy_(torch.einsum("orn,ri->oin", core.reshape(8, 2, -1), drawn(2, 6)).reshape(8, 6, *size))
        elif kind == "separable_convolution":
            layer.weight.copy_(torch.einsum("ow,ih->oihw", drawn(8, size[1]), drawn(6, size[0], seed=2)))
        else:
            layer.weight.copy_(of_rank(2, 8, layer.weight[0].numel()).reshape(layer.weight.shape))
    images = drawn(30, 6, *[11] * len(size))
    model = nn.Sequential(layer)
    output, edits, _ = factor(model, images[:1], [images], shape=shape, method=method, energy=1 - 1e-9)
    assert [edit.kind for edit in edits] == [kind]
    assert len(output[0]) == children
    if kind == "tucker_convolution":
        assert (output[0][0].out_channels, output[0][1].out_channels) == (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(output(images), model(images), atol=1e-3, rtol=1e-3)
    again = replay(nn.Sequential(type(layer)(**options_of(layer))), from_json(to_json(edits)))
    again.load_state_dict(output.state_dict(), strict=True)
    assert torch.equal(again(images), output(images))


def options_of(layer):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def test_ratio_removes_that_share_of_each_layer_and_spread_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[0].weight.data = of_rank(3, 32, 32) / 6 + 0.01 * drawn(32, 32, seed=5)
    before = [sum(value.numel() for value in layer.parameters()) for layer in (model[0], model[2])]

    def sizes(output):
        return [sum(value.numel() for value in layer.parameters()) for layer in (output[0], output[2])]

    each, _, _ = factor(model, torch.ones(2, 32), rank="ratio", ratio=0.4)
    together, _, _ = factor(model, torch.ones(2, 32), rank="spread", ratio=0.39)
    for was, now in zip(before, sizes(each), strict=True):
        assert was * 0.6 - 64 < now <= was * 0.6
    assert sizes(together)[0] < 0.25 * before[0]
    assert sizes(together)[1] == before[1]  # of full rank: it costs most, and stays dense
    assert sum(sizes(together)) <= 0.61 * sum(before)


@pytest.mark.parametrize(
    "last", [nn.Identity(), nn.Softmax(1), nn.Unflatten(1, (2, 3))], ids=["as it is", "softmax", "a view"]
)
def test_what_gives_the_outputs_keeps_its_rank_where_all_lose_the_same_share(last):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6), last)
    _, edits, context = factor(model, torch.ones(2, 32), rank="ratio", ratio=0.4)
    assert [edit.path for edit in edits] == ["0"]
    assert [(note.path, note.reason[:24]) for note in context.untouched] == [("2", "gives the model's output")]
    _, edits, _ = factor(model, torch.ones(2, 32), rank="energy", energy=0.5)
    assert [edit.path for edit in edits] == ["0", "2"]
    _, edits = run(only("2", LowRank(rank="ratio", ratio=0.4)), model, context)
    assert [edit.path for edit in edits] == ["2"], "alone"


@pytest.mark.parametrize("rank", ["ratio", "spread"])
def test_the_head_of_a_recurrent_network_keeps_its_rank(rank):
    """It is the only layer that could be factored, and a small part of the weights."""

    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 6)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    _, edits, context = factor(Listener(), torch.ones(2, 5, 8), rank=rank, ratio=0.7)
    assert edits == []
    assert [note.path for note in context.untouched] == ["head"]
    _, edits = run(only("head", LowRank(rank=rank, ratio=0.7)), Listener(), context)
    assert [edit.path for edit in edits] == ["head"]


def test_every_head_keeps_its_rank():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.names, self.words = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 200)

        def forward(self, x):
            x = self.body(x).relu()
            return {"words": self.words(x), "names": self.names(x)}

    _, edits, context = factor(Two(), torch.ones(2, 16), rank="ratio", ratio=0.4)
    assert [edit.path for edit in edits] == ["body", "words"], "more outputs than inputs: its rank is the inputs'"
    assert [note.path for note in context.untouched] == ["names"]


def test_bayes_finds_the_planted_rank_and_ratio_weakens_it():
    model = nn.Sequential(nn.Linear(60, 40))
    model[0].weight.data = of_rank(4, 40, 60) + 0.5 * drawn(40, 60, seed=5)
    output, _, _ = factor(model, torch.ones(2, 60), rank="bayes", ratio=0.99)
    assert output[0][0].out_features == 4
    output, _, _ = factor(model, torch.ones(2, 60), rank="bayes", ratio=0.75)
    assert output[0][0].out_features == 4 + 9


def test_a_mean_goes_into_a_bias_that_was_not_there():
    layer = nn.Linear(16, 16, bias=False)
    inputs = uneven(200, 16) + 5.0
    output, _, _ = factor(nn.Sequential(layer), inputs[:1], [inputs], method="whitened", rank="ratio", ratio=0.5)
    difference = (output(inputs) - layer(inputs)).detach()
    assert difference.mean(0).abs().max() < 1e-4
    assert sum(value.numel() for value in output.parameters()) <= 128


def test_what_calibration_never_reached_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    _, edits, context = factor(Model(), torch.ones(2, 16), [drawn(50, 16)], method="whitened", rank="ratio")
    assert [edit.path for edit in edits] == ["used"]
    assert [note.path for note in context.untouched] == ["spare"]
    assert "never reached" in context.untouched[0].reason


def test_ranks_are_spread_by_what_the_loss_feels():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.loud(x) + 0.01 * self.quiet(x)

    torch.manual_seed(0)
    model = Model()
    model.quiet.load_state_dict(model.loud.state_dict())
    inputs, labels = drawn(200, 24), torch.randint(0, 24, (200,))
    ranks = {}
    for method in ("whitened", "fisher"):
        _, edits, _ = factor(model, inputs[:1], [(inputs, labels)], method=method, rank="spread", ratio=0.4)
        ranks[method] = {edit.path: edit.options["rank"] for edit in edits}
    assert abs(ranks["whitened"]["loud"] - ranks["whitened"]["quiet"]) <= 2
    assert ranks["fisher"]["quiet"] <= 2
    assert "loud" not in ranks["fisher"]  # it stays dense


@pytest.mark.parametrize("method", ["whitened", "fisher"])
def test_data_that_is_missing_is_said_before_any_work(method):
    with pytest.raises(RecipeError, match="calibrate"):
        factor(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8), method=method)


def test_attention_is_taken_apart_and_its_projections_factored():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)).eval()
    steps = drawn(8, 5, 32)
    output, edits, _ = factor(model, steps[:1], [steps], method="whitened", rank="ratio", ratio=0.3)
    factored = {edit.path for edit in edits if edit.kind == "factored_linear"}
    assert factored == {f"0.self_attn.{part}" for part in ("query", "key", "value", "out")} | {"0.linear1", "0.linear2"}
    assert sum(v.numel() for v in output.parameters()) < 0.75 * sum(v.numel() for v in model.parameters())


def test_factors_are_pruned_quantized_and_replayed_like_any_layer():
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    context = Context(data=Data(example=torch.ones(2, 24), calibrate=[drawn(60, 24)]))
    low = LowRank(method="whitened", rank="ratio", ratio=0.4)
    output, edits = run(Recipe((low, PruneWeights(ratio=0.5), QuantizeWeights(bits=8))), model, context)
    assert [type(layer).__name__ for layer in output[0]] == ["QuantizedLinear", "QuantizedLinear"]
    zeros = torch.cat([layer.codes.flatten() == 0 for part in (output[0], output[2]) for layer in part])
    assert zeros.float().mean() > 0.45
    again = replay(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), from_json(to_json(edits)))
    again.load_state_dict(output.state_dict(), strict=True)
    assert torch.equal(again.eval()(drawn(3, 24)), output(drawn(3, 24)))
    pruned, edits = run(Recipe((PruneWeights(ratio=0.5), low), any_order=True), model, context)
    assert [layer.weight.shape for layer in pruned[0]] == [layer.codes.shape for layer in output[0]]
