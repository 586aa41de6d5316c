"""Weight codes: ranges, steps, error bounds, every kind of layer in ONNX Runtime, and layers that are not touched."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from featherweight.artifact import load, package
from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.layers import QuantizedConv, QuantizedEmbedding, QuantizedLinear, QuantizedTransposedConv
from featherweight.layers.quantized import fake_quantize, limit, round_mantissa, round_together
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import audit
from featherweight.scoring import evaluate
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneWeights, QuantizeWeights
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.zoo import randomise, small_models


def quantize(model, example, **settings):
    context = Context(data=Data(example=example))
    output, _ = run(QuantizeWeights(**settings), model.eval(), context)
    return output, context


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_scales_and_error_bound(bits, per_channel):
    task = small_models()["plain"]
    output, _ = quantize(task.model, task.data.example, bits=bits, per_channel=per_channel)
    layer, new, high = task.model.hidden, output.hidden, 2 ** (bits - 1) - 1
    assert new.codes.dtype == torch.int8
    assert new.codes.shape == layer.weight.shape
    assert int(new.codes.abs().max()) <= high
    assert new.scale.shape == ((16,) if per_channel else (1,))
    step = new.scale.reshape(-1, 1)
    inside = layer.weight.abs() <= high * step
    error = (new.codes * step - layer.weight).abs()
    assert bool((error <= step / 2 * 1.0001)[inside].all())
    assert torch.equal(new.dequantized(), new.codes * step)
    assert all(new.scale == round_mantissa(new.scale, 8 if bits <= 6 else 12))


def test_layers_may_have_widths_of_their_own():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.heads = nn.LSTM(4, 8, 2), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

        def forward(self, value):
            return self.heads(self.lstm(value)[0])

    torch.manual_seed(0)
    model, steps = Reader(), torch.randn(5, 2, 4)
    output, _ = quantize(model, steps, bits=4, widths="heads.1 8, lstm.hidden.* 3, lstm.incoming.1 2")
    assert [part.bits for part in (*output.lstm.incoming, *output.lstm.hidden, *output.heads)] == [4, 2, 3, 3, 4, 8]
    assert output(steps).shape == (5, 2, 3)
    with pytest.raises(RecipeError, match=r"no layer in scope is called 'lstm.hiden.0'. Did you mean 'lstm.hidden.0'"):
        quantize(model, steps, widths="lstm.hiden.0 3")
    with pytest.raises(RecipeError, match=r"no layer in scope is called 'lstm'"):  # its matrices have names
        quantize(model, steps, widths="lstm 3")


def test_widths_in_a_layer_that_is_left_whole_are_no_error():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.again, self.head = nn.LSTM(8, 8), nn.LSTM(8, 8), nn.Linear(8, 3)
            self.again.weight_hh_l0 = self.lstm.weight_hh_l0

        def forward(self, value):
            return self.head(self.again(self.lstm(value)[0])[0])

    output, context = quantize(Reader(), torch.randn(5, 2, 8), widths="lstm.incoming.0 3, again.hidden.* 2, head 8")
    assert [item.path for item in context.untouched] == ["lstm", "again"]
    assert output.head.bits == 8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": "head"}, "'head' is no path and width from 2 to 8, such as 'lstm.hidden.* 3'"),
        ({"widths": "head 9"}, "'head 9' is no path and width"),
        ({"widths": "head 2.5"}, "'head 2.5' is no path and width"),
        ({"widths": "head four"}, "'head four' is no path and width"),
        ({"widths": "head 4", "spare": 0.1}, "give one of spare and widths"),
    ],
)
def test_widths_that_cannot_be(settings, words):
    with pytest.raises(RecipeError) as caught:
        QuantizeWeights(**settings)
    assert words in str(caught.value)


def test_a_weight_on_the_grid_comes_back_exactly():
    weight = torch.tensor([[-7.0, 3.0, 0.0, 1.0], [7.0, 7.0, -2.0, 5.0]]) / 8
    scale = grid_scale(weight, 4, per_channel=True)
    assert scale.tolist() == [0.125, 0.125]
    assert to_codes(weight, scale, 4).tolist() == [[-7, 3, 0, 1], [7, 7, -2, 5]]


def test_the_step_clips_an_outlier_where_that_costs_less():
    weight = torch.full((1, 1000), 0.1)
    weight[0, 0] = 0.4
    assert grid_scale(weight, 2, per_channel=True).item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_step_is_the_best_of_all_shares_of_the_largest_magnitude(weighted):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 20_000, generator=generator, dtype=torch.float64)
    weight[3] = weight[3] ** 3  # one that is clipped by much
    worth = torch.rand(weight.shape, generator=generator, dtype=torch.float64) if weighted else torch.ones_like(weight)
    found = grid_scale(weight, 4, per_channel=True, worth=worth if weighted else None)
    for row, costs, step in zip(weight, worth, found, strict=True):
        steps = row.abs().max() / 7 * torch.linspace(0.25, 1.0, 76, dtype=torch.float64)
        errors = [((row / one).round().clamp(-7, 7) * one - row).square() @ costs for one in steps]
        best = steps[int(torch.stack(errors).argmin())]
        assert float(step) == float(round_mantissa(best[None].float(), 8))


def test_zeros_stay_zero_and_an_empty_row_is_no_error():
    weight = torch.zeros(2, 4)
    weight[0, 1] = 0.3
    scale = grid_scale(weight, 4, per_channel=True)
    assert bool((scale > 0).all())
    assert to_codes(weight, scale, 4)[0].tolist() == [0, 7, 0, 0]
    assert not to_codes(weight, scale, 4)[1].any()


def test_more_bits_are_closer():
    task = small_models()["residual"]
    inputs = task.data.validate[0][0]
    gaps = []
    for bits in (2, 4, 8):
        output, _ = quantize(task.model, inputs, bits=bits)
        with torch.no_grad():
            gaps.append(float((output(inputs) - task.model(inputs)).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_convolution_geometry_survives():
    generator = torch.Generator().manual_seed(0)
    for layer, shape in (
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(1, 2), bias=False), (2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 3, padding="same"), (2, 2, 4, 4, 4)),
    ):
        example = torch.randn(shape, generator=generator)
        output, _ = quantize(nn.Sequential(layer), example, bits=8)
        assert type(output[0]) is QuantizedConv
        with torch.no_grad():
            assert torch.allclose(output(example), layer(example), atol=0.02)


def test_what_is_left_alone():
    task = small_models()["transformer"]
    output, context = quantize(task.model, task.data.example)
    assert type(output.head) is nn.Linear
    assert output.head.weight is output.embedding.weight
    assert [(u.path, "tied" in u.reason) for u in context.untouched] == [("embedding", True), ("head", True)]
    _, context = quantize(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), torch.ones(1, 1, 4, 4))
    assert "circular" in context.untouched[0].reason
    _, context = quantize(nn.Sequential(nn.Embedding(9, 8, max_norm=1.0)), torch.tensor([[1, 2]]))
    assert "max_norm" in context.untouched[0].reason


def test_a_module_registered_twice_is_swapped_once():
    task = small_models()["twice"]
    output, _ = quantize(task.model, task.data.example)
    assert type(output.first) is QuantizedLinear
    assert output.first is output.again


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thaw_and_freeze_change_nothing(bits):
    task = small_models()["plain"]
    output, _ = quantize(task.model, task.data.example, bits=bits)
    before = {name: value.clone() for name, value in output.state_dict().items()}
    inputs = task.data.validate[0][0]
    wanted = output(inputs)
    for layer in (output.hidden, output.features[3]):
        layer.thaw()
        assert layer.weight.requires_grad
        assert layer.scale.requires_grad
    assert torch.equal(output(inputs), wanted), "a thawed layer computes in evaluation mode what it will freeze to"
    for layer in (output.hidden, output.features[3]):
        layer.freeze()
    assert list(output.state_dict()) == list(before) or set(output.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in output.state_dict().items())


def test_straight_through_gradients_by_hand():
    values = torch.tensor([0.3, 5.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    rounded = fake_quantize(values, scale, -limit(3), limit(3), 1.0)
    assert rounded.tolist() == [0.0, 3.0]
    rounded.sum().backward()
    assert values.grad.tolist() == [1.0, 0.0]  # inside passes, clipped does not
    assert scale.grad.item() == pytest.approx(-0.3 + 3.0)  # round(v) - v inside, the bound outside


class Wrapped(nn.Module):
    """A recurrent layer behind an embedding, and a linear layer on its last step."""

    def __init__(self, layer, width=10, words=30):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.recurrent = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 4)

    def forward(self, tokens):
        steps, _ = self.recurrent(self.embedding(tokens))
        return self.head(steps[:, -1])


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*shape, high=30, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def made(layer, seed=1):
    return randomise(layer, seed).eval()


def agrees_in_onnx_runtime(output, edits, fresh, example, more, folder):
    """Package, save and load; the file runs, and comes back into the class, as the model does. Returns the artifact."""
    package(output, edits, {}, export_graph(output, Data(example=example))).save(folder / "model.fw")
    artifact = load(folder / "model.fw")
    for inputs in (example, more):
        with torch.no_grad():
            wanted = output(inputs)
            assert torch.equal(load(folder / "model.fw", into=fresh).eval()(inputs), wanted)
        torch.testing.assert_close(torch.from_numpy(artifact.run(inputs)[0]), wanted, atol=1e-4, rtol=1e-4)
    return artifact


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    ("layer", "node"),
    [
        (lambda: nn.LSTM(10, 16, 2, batch_first=True), "LSTM"),
        (lambda: nn.LSTM(10, 16, batch_first=True, bidirectional=True, bias=False), "LSTM"),
        (lambda: nn.GRU(10, 16, 2, batch_first=True, bidirectional=True, dropout=0.3), "GRU"),
        (lambda: nn.RNN(10, 16, 2, batch_first=True), "RNN"),
        (lambda: nn.RNN(10, 16, batch_first=True, nonlinearity="relu"), "RNN"),
    ],
)
def test_recurrent_layers_run_as_their_kernels(layer, node, bits, tmp_path):
    model, example = made(Wrapped(layer())), words(2, 5)
    context = Context(data=Data(example=example))
    output, edits = run(QuantizeWeights(bits=bits), model, context)
    assert not context.untouched
    matrices = [*output.recurrent.incoming, *output.recurrent.hidden]
    assert all(type(part) is QuantizedLinear for part in matrices)
    assert all(part.scale.shape == (part.out_features,) for part in matrices)  # of each gate and unit
    artifact = agrees_in_onnx_runtime(output, edits, made(Wrapped(layer()), 9), example, words(7, 5, seed=2), tmp_path)
    assert node in audit(artifact.onnx_bytes())
    floats = sum(value.numel() for value in artifact.state.values() if value.is_floating_point() and value.dim() > 1)
    assert not floats
    if bits == 8:
        with torch.no_grad():
            assert float((output(example) - model(example)).abs().max()) < 0.1 * float(model(example).abs().max())


def test_a_projected_lstm_keeps_its_projection_as_codes(tmp_path):
    model = made(nn.Sequential(nn.LSTM(10, 16, 2, proj_size=5, batch_first=True), First()))
    fresh = made(nn.Sequential(nn.LSTM(10, 16, 2, proj_size=5, batch_first=True), First()), 9)
    example = drawn(2, 5, 10)
    output, edits = run(QuantizeWeights(bits=8), model, Context(data=Data(example=example)))
    assert type(output[0].projection[1]) is QuantizedLinear
    agrees_in_onnx_runtime(output, edits, fresh, example, drawn(3, 5, 10, seed=2), tmp_path)
    torch.testing.assert_close(output(example), model(example), atol=0.05, rtol=0.05)


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_a_weight_of_an_lstm_takes_its_bits_in_the_file():
    model, example = made(nn.Sequential(nn.LSTM(64, 64, 2, batch_first=True), First())), drawn(2, 5, 64)
    output, edits = run(QuantizeWeights(bits=4), model, Context(data=Data(example=example)))
    parts = package(output, edits, {}, export_graph(output, Data(example=example))).bytes_by_part()
    codes = sum(size for name, size in parts.items() if name.endswith("codes"))
    others = sum(size for name, size in parts.items() if name.endswith(("scale", "bias")))
    assert 8 * codes <= 4.02 * 2 * 2 * 256 * 64
    assert others <= 0.1 * codes
    assert not any(name.endswith("weight") or name.startswith("constant") for name in parts)


def test_packed_steps_and_states_go_on_as_before():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = made(nn.GRU(6, 12, 2, bidirectional=True))

        def forward(self, steps, start=None):
            return self.gru(steps, start)

    steps, start = drawn(5, 3, 6), drawn(4, 3, 12, seed=2)
    output, _ = quantize(Model(), steps, bits=8)
    packed = pack_padded_sequence(steps, torch.tensor([5, 3, 1]))
    alone = drawn(3, 6), drawn(4, 12, seed=3)
    for given in ((steps, start), (packed,), (packed, start), alone):
        for ours, theirs in zip(output(*given), Model()(*given), strict=True):
            ours, theirs = (value.data if isinstance(value, PackedSequence) else value for value in (ours, theirs))
            torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.0)


@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_zeros_stay_zero_through_training(name):
    """What was pruned in a whole layer is sparse, and zero, under the names of its parts."""
    task = small_models()[name]
    model = task.model if name == "recurrent" else Attending()
    data = dataclasses.replace(task.data, train=batched(name), validate=batched(name), example=batched(name)[0][0])
    context = Context(data=data, teacher=copy.deepcopy(model))
    recipe = Recipe((PruneWeights(ratio=0.6, ranking="layer"), QuantizeWeights(bits=4), Distill(epochs=2)))
    output, _ = run(recipe, model, context)
    pruned, _ = run(PruneWeights(ratio=0.6, ranking="layer"), model, Context(data=data))
    parts = (
        {"lstm.incoming.0": pruned.lstm.weight_ih_l0, "lstm.hidden.0": pruned.lstm.weight_hh_l0}
        if name == "recurrent"
        else dict(zip(("attention.query", "attention.key"), pruned.attention.in_proj_weight.chunk(3), strict=False))
        | {"attention.out": pruned.attention.out_proj.weight}
    )
    for path, before in parts.items():
        layer = output.get_submodule(path)
        assert f"{path}.weight" in context.sparse
        assert type(layer) is QuantizedLinear
        assert (before == 0).float().mean() > 0.3
        assert not layer.codes[before == 0].any()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = made(nn.MultiheadAttention(12, 3, batch_first=True))
        self.head = made(nn.Linear(12, 4))

    def forward(self, steps):
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].mean(1))


def batched(name):
    labels = words(32, high=4, seed=3)
    return [(words(32, 6, high=20) if name == "recurrent" else drawn(32, 6, 12), labels)]


def test_attention_is_taken_apart_and_runs(tmp_path):
    example = drawn(2, 6, 12)
    output, edits = run(QuantizeWeights(bits=8), Attending(), Context(data=Data(example=example)))
    parts = ("query", "key", "value", "out")
    assert [edit.path for edit in edits] == ["attention", *(f"attention.{part}" for part in parts), "head"]
    agrees_in_onnx_runtime(output, edits, Attending(), example, drawn(5, 6, 12, seed=2), tmp_path)
    torch.testing.assert_close(output(example), Attending()(example), atol=0.02, rtol=0.02)


def test_distilling_a_quantized_lstm_improves_it():
    """At 2 bits the layer is off; a few epochs after the teacher bring it back, and its codes stay codes."""
    model, inputs = made(Wrapped(nn.LSTM(10, 16, batch_first=True))), words(512, 5)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    batches = [(inputs[i : i + 32], labels[i : i + 32]) for i in range(0, 512, 32)]
    data = Data(example=inputs[:2], train=batches[:12], validate=batches[12:])
    recipe = Recipe((QuantizeWeights(bits=2), Distill(epochs=10, learning_rate=1e-2)))
    scores = []
    for step in (recipe.parts[0], recipe):
        output, _ = run(step, model, Context(data=data, teacher=copy.deepcopy(model)))
        scores.append(evaluate(output, data, "validate", torch.device("cpu")).value)
    assert scores[1] > scores[0] + 0.05, scores
    layer = output.recurrent.hidden[0]
    assert int(layer.codes.abs().max()) == 1
    assert torch.equal(layer.bias, round_together(layer.bias, 8))
    assert layer.bias.abs().max() > 0


@pytest.mark.parametrize("per_channel", [True, False])
def test_an_embedding_looks_codes_up(per_channel, tmp_path):
    model, example = made(nn.Sequential(nn.Embedding(40, 16, padding_idx=3))), words(2, 7)
    model[0].weight.data[3] = 0
    model[0].weight.data[5] *= 20
    output, context = quantize(model, example, bits=6, per_channel=per_channel)
    layer = output[0]
    assert type(layer) is QuantizedEmbedding
    assert layer.scale.shape == ((40,) if per_channel else (1,))
    assert not layer.codes[3].any()
    weight, step = model[0].weight, layer.scale.reshape(-1, 1)
    inside = weight.abs() <= 31 * step
    assert bool(((layer.dequantized() - weight).abs() <= step / 2 * 1.0001)[inside].all())
    assert torch.equal(output(example), layer.dequantized()[example])
    assert not context.untouched
    output, edits = run(QuantizeWeights(bits=6, per_channel=per_channel), model, Context(data=Data(example=example)))
    fresh = nn.Sequential(nn.Embedding(40, 16, padding_idx=3))
    artifact = agrees_in_onnx_runtime(output, edits, fresh, example, words(5, 7, high=40), tmp_path)
    assert audit(artifact.onnx_bytes())["Gather"] == (2 if per_channel else 1)
    wanted = output(example)
    layer = output[0]
    layer.thaw()
    assert torch.equal(output(example), wanted)
    layer.train()(torch.tensor([1, 3])).sum().backward()
    assert layer.weight.grad[1].any()
    assert not layer.weight.grad[3].any(), "padding gets no gradient"


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, groups=2), (2, 6, 9)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, bias=False), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, dilation=2), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 4)),
    ],
)
def test_a_transposed_convolution_has_a_scale_an_output_channel(layer, shape, per_channel, tmp_path):
    model, example = made(nn.Sequential(layer())), drawn(*shape)
    weight = model[0].weight.data
    for channel in range(model[0].out_channels):  # one channel far larger than the others: only a scale of its own fits
        group, inner = divmod(channel, model[0].out_channels // model[0].groups)
        inputs = model[0].in_channels // model[0].groups
        weight[group * inputs : (group + 1) * inputs, inner] *= 100.0 if channel == 1 else 1.0
    output, edits = run(QuantizeWeights(bits=8, per_channel=per_channel), model, Context(data=Data(example=example)))
    assert type(output[0]) is QuantizedTransposedConv
    assert output[0].scale.shape == ((model[0].out_channels,) if per_channel else (1,))
    more = drawn(5, *shape[1:], seed=3)
    agrees_in_onnx_runtime(output, edits, made(nn.Sequential(layer()), 9), example, more, tmp_path)
    with torch.no_grad():
        gaps = (output(more) - model(more)).flatten(2).norm(dim=2).norm(dim=0) / model(more).flatten(2).norm(
            dim=2
        ).norm(dim=0)
    assert (float(gaps.max()) < 0.02) is per_channel, gaps
    output[0].thaw()
    before = output(more)
    output[0].freeze()
    assert torch.equal(output(more), before)


def test_a_transposed_convolution_takes_an_output_size():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = made(nn.ConvTranspose2d(3, 4, 3, stride=3, padding=1))

        def forward(self, x):
            return self.up(x, output_size=(15, 14))

    output, _ = quantize(Model(), drawn(2, 3, 5, 5), bits=8)
    assert type(output.up) is QuantizedTransposedConv
    assert output(drawn(2, 3, 5, 5)).shape == (2, 4, 15, 14)


def test_groups_of_inputs_have_scales_of_their_own(tmp_path):
    model, example = made(nn.Sequential(nn.Linear(20, 8))), drawn(2, 20)
    model[0].weight.data[:, :8] *= 30  # the first group is far larger
    context = Context(data=Data(example=example))
    output, edits = run(QuantizeWeights(bits=3, group=8), model, context)
    whole, _ = quantize(model, example, bits=3)
    layer = output[0]
    assert layer.scale.shape == (8, 3)  # 8, 8 and 4 inputs
    for first, last in ((0, 8), (8, 16), (16, 20)):
        scale = grid_scale(model[0].weight[:, first:last], 3, per_channel=True)
        assert torch.equal(layer.scale[:, first // 8], scale)
        assert torch.equal(layer.codes[:, first:last], to_codes(model[0].weight[:, first:last], scale, 3))
    small = slice(8, None)
    errors = [(m[0].dequantized() - model[0].weight)[:, small].norm() for m in (output, whole)]
    assert errors[0] < 0.3 * errors[1]
    agrees_in_onnx_runtime(output, edits, nn.Sequential(nn.Linear(20, 8)), example, drawn(5, 20), tmp_path)
    before = output(example)
    layer.thaw()
    assert torch.equal(output(example), before)
    output.train()(example).sum().backward()
    assert layer.scale.grad.shape == (8, 3)
    layer.freeze()
    assert torch.equal(output.eval()(example), before)
    whole, _ = quantize(model, example, bits=3, group=20)
    assert whole[0].scale.shape == (8,)
    same, _ = quantize(model, example, bits=3, group=8, per_channel=False)
    assert torch.equal(same[0].scale, layer.scale)
    _, context = quantize(model, example, bits=3, group=1)
    assert "160 scales" in context.untouched[0].reason


def test_biases_are_whole_numbers_of_one_step():
    values = torch.tensor([1.3, -0.9, 0.004, 0.0, -0.001])
    rounded = round_together(values, 8)
    steps = rounded * 128
    assert torch.equal(steps, steps.round())
    assert float((rounded - values).abs().max()) <= 1 / 256
    assert not torch.signbit(rounded[rounded == 0]).any()
    assert torch.equal(round_together(torch.zeros(3), 8), torch.zeros(3))
