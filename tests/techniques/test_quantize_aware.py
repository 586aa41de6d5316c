"""Learned steps: gradients by hand, ranges below 8 bits in ONNX Runtime too, and a result that is never worse than its start."""

import copy

import pytest
import torch
from torch import nn

from featherweight.artifact import load, package
from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.layers import QuantizedEmbedding, QuantizedLinear
from featherweight.layers.quantized import span
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session
from featherweight.scoring import evaluate
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneWeights, QuantizeAware, QuantizeStatic, QuantizeWeights


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()


@pytest.fixture(scope="module")
def task():
    """A network, trained, and its data."""
    inputs = drawn(640, 8)
    labels = inputs[:, :4].argmax(1)
    batches = [(inputs[at : at + 32], labels[at : at + 32]) for at in range(0, 640, 32)]
    data = Data(example=inputs[:2], train=batches[:16], calibrate=batches[:4], validate=batches[16:])
    model, _ = run(Distill(epochs=6, learning_rate=1e-2), network(), Context(data=data))
    return model, data


def trained(task, technique, **more):
    model, data = task
    context = Context(data=data, teacher=copy.deepcopy(model), **more)
    output, edits = run(technique, model, context)
    return output, edits, context


def validated(model, data):
    return evaluate(model, data, "validate", torch.device("cpu")).value


def test_ranges_of_codes():
    assert [span(bits, full=True) for bits in (1, 2, 4, 8)] == [(-1, 1), (-2, 1), (-8, 7), (-128, 127)]
    assert [span(bits) for bits in (1, 2, 4, 8)] == [(-1, 1), (-1, 1), (-7, 7), (-127, 127)]


def test_gradients_of_an_input_by_hand():
    """Two bits, step 0.5, zero at code 1: inputs from -0.5 to 1.0. Inside the step's gradient is round(v) - v, outside the bound.

    0.3 is 0.6 steps, code 2, value 0.5: 1 - 0.6 = 0.4. 2.0 is clipped to code 3, two steps above zero: 2. -4.0: -1.
    """
    layer = QuantizedLinear(3, 3, bits=8, input_grid=True, input_bits=2, bias=False)
    layer.codes.copy_(torch.eye(3))
    layer.input_scale.fill_(0.5)
    layer.input_zero.fill_(1)
    inputs = torch.tensor([[0.3, 2.0, -4.0]], requires_grad=True)
    assert layer(inputs).tolist() == [[0.5, 1.0, -0.5]]
    layer.thaw()
    layer.train()
    output = layer(inputs)
    torch.testing.assert_close(output, torch.tensor([[0.5, 1.0, -0.5]]))
    output.sum().backward()
    assert inputs.grad.tolist() == [[1.0, 0.0, 0.0]]
    slower = (3 * 3) ** -0.5  # 1 / sqrt(features of a sample * largest code)
    torch.testing.assert_close(layer.input_scale.grad.item(), (0.4 + 2 - 1) * slower)
    assert len(layer.steps_in_training()) == 2
    layer.freeze()
    assert {name for name, _ in layer.named_buffers()} == {"codes", "scale", "input_scale", "input_zero"}
    assert not list(layer.parameters())


@pytest.mark.parametrize("activations", [2, 4, 8])
def test_low_bit_inputs_run_in_onnx_runtime_as_in_pytorch(task, activations, tmp_path):
    output, edits, _ = trained(task, QuantizeAware(bits=3, activations=activations, epochs=1))
    data = task[1]
    graph = export_graph(output, data)
    far = 20 * drawn(64, 8, seed=3)  # far outside every range
    with torch.no_grad():
        wanted = output(far)
    ran = torch.from_numpy(Session(assemble(graph, output.state_dict())).run(far)[0])
    # where a value over its step ends in a half, the two may round to different sides
    assert float((ran - wanted).square().mean() / wanted.square().mean()) < 1e-3
    package(output, edits, {}, graph).save(tmp_path / "model.fw")
    torch.testing.assert_close(load(tmp_path / "model.fw", into=network()).eval()(far), wanted)
    inner = output[3]
    assert inner.input_bits == activations
    assert (int(inner.codes.min()), int(inner.codes.max())) == (-4, 3)
    assert int(inner.input_zero) == 0, "nothing is below zero behind a ReLU"


def test_first_and_last_layer_are_wider(task):
    output, edits, _ = trained(task, QuantizeAware(bits=2, activations=4, edges=7, epochs=1))
    layers = [layer for layer in output.modules() if isinstance(layer, QuantizedLinear)]
    assert [layer.bits for layer in layers] == [7, 2, 7]
    assert [layer.input_bits for layer in layers] == [8, 4, 8]
    assert [type(edit).__name__ for edit in edits] == ["Swap", "Swap", "Swap", "Write"]


def test_training_brings_two_bits_back(task):
    model, data = task
    before, _, _ = trained(task, QuantizeAware(bits=2, activations=3, edges=2, epochs=1, learning_rate=0.0))
    after, _, _ = trained(task, QuantizeAware(bits=2, activations=3, edges=2, epochs=8, learning_rate=5e-3))
    scores = [validated(each, data) for each in (before, after, model)]
    assert scores[0] + 0.05 < scores[1] < scores[2] + 0.05, scores


def test_never_worse_than_its_start(task):
    """At a rate that ruins everything the post-training codes and steps come back."""
    started, _, _ = trained(task, QuantizeAware(bits=4, activations=4, epochs=1, learning_rate=0.0))
    ruined, _, _ = trained(task, QuantizeAware(bits=4, activations=4, epochs=2, learning_rate=1.0))
    assert validated(ruined, task[1]) >= validated(started, task[1])
    for name, value in started.state_dict().items():
        assert torch.equal(value, ruined.state_dict()[name]), name


def test_features_of_the_teacher_are_followed_where_loss_says_so(task):
    model, data = task
    inputs = torch.cat([inputs for inputs, _ in data.validate])
    gaps = {}
    for loss in ("soft_targets", "soft_targets + 10 * hint 3"):
        output, _, _ = trained(
            task, QuantizeAware(bits=2, edges=2, epochs=6, learning_rate=1e-2, teacher_share=1.0, loss=loss)
        )
        with torch.no_grad():
            gaps[loss] = float((output[:4](inputs) - model[:4](inputs)).square().mean())
    plain, followed = gaps.values()
    assert followed < 0.7 * plain
    with pytest.raises(RecipeError, match="nonsense"):
        QuantizeAware(loss="nonsense")


def test_layers_quantized_before_are_trained_as_they_are(task):
    recipe = Recipe((QuantizeStatic(weight_bits=3), QuantizeAware(epochs=3, learning_rate=5e-3)))
    before, _, _ = trained(task, recipe.parts[0])
    after, _, _ = trained(task, recipe)
    widths = [
        [layer.bits for layer in model.modules() if isinstance(layer, QuantizedLinear)] for model in (before, after)
    ]
    assert widths[0] == widths[1]
    assert validated(after, task[1]) >= validated(before, task[1])
    assert not torch.equal(after[3].input_scale, before[3].input_scale), "steps of activations are learned"


def test_zeros_of_pruned_tensors_stay(task):
    recipe = Recipe((PruneWeights(ratio=0.5), QuantizeAware(bits=3, epochs=2, learning_rate=5e-3)))
    pruned, _, _ = trained(task, recipe.parts[0])
    output, _, context = trained(task, recipe)
    assert "3.weight" in context.sparse
    assert not output[3].codes[pruned[3].weight == 0].any()


def test_norms_keep_their_statistics_at_the_end(task, monkeypatch):
    """Of six epochs the last two leave them alone."""
    forward, modes = nn.BatchNorm1d.forward, []

    def seen(norm, inputs):
        modes.append(norm.training)
        return forward(norm, inputs)

    monkeypatch.setattr(nn.BatchNorm1d, "forward", seen)
    trained(task, QuantizeAware(epochs=6))
    assert modes.count(True) == 4 * len(task[1].train)


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_nothing_is_dropped_at_random_where_the_teacher_alone_is_followed(task, monkeypatch, share):
    model, data = task
    forward, modes = nn.Dropout.forward, []

    def seen(dropout, inputs):
        modes.append(dropout.training)
        return forward(dropout, inputs)

    monkeypatch.setattr(nn.Dropout, "forward", seen)
    dropping = nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:]).eval()
    trained((dropping, data), QuantizeAware(epochs=1, learning_rate=1e-2, teacher_share=share))
    assert modes
    assert any(modes) == (share < 1)


def test_nothing_to_quantize_is_said(task):
    context = Context(data=task[1])
    run(QuantizeAware(epochs=1), nn.Sequential(nn.ReLU()), context)
    assert context.untouched[0].reason == "no quantized layer is in scope"


def test_inputs_of_recurrent_matrices_are_said_to_stay_float():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lstm, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, steps):
            return self.head(self.lstm(steps)[0][:, -1])

    batches = [(drawn(8, 5, 6, seed=place), torch.arange(8) % 3) for place in range(3)]
    data = Data(example=batches[0][0][:1], train=batches, calibrate=batches, validate=batches)
    context = Context(data=data)
    output, _ = run(QuantizeAware(bits=4, activations=4, epochs=1), Last().eval(), context)
    assert {u.path for u in context.untouched if "float" in u.reason} == {"lstm.incoming.0", "lstm.hidden.0"}
    assert output.lstm.hidden[0].bits == 4
    assert output.head.input_grid


def test_quantized_weights_keep_their_groups(task):
    recipe = Recipe((QuantizeWeights(bits=2, group=4), QuantizeAware(epochs=1)))
    output, _, _ = trained(task, recipe)
    assert output[3].scale.shape == (32, 8)


def test_inputs_that_an_earlier_step_left_float_are_told(task):
    recipe = Recipe((QuantizeWeights(bits=4), QuantizeAware(bits=4, activations=4, epochs=1)))
    _, _, context = trained(task, recipe)
    assert {u.path for u in context.untouched if "earlier step" in u.reason} == {"0", "3", "5"}


def test_rows_of_a_table_are_rounded_as_the_whole_table_is():
    """A batch looks up some rows; values and gradients are those of rounding all of them."""
    layer = QuantizedEmbedding(6, 4, bits=2, full=True)
    layer.thaw()
    layer.train()
    with torch.no_grad():
        layer.weight.copy_(drawn(6, 4))
        layer.scale.copy_(torch.arange(1, 7) / 4)
    tokens, slopes = torch.tensor([[0, 3, 3], [5, 0, 1]]), drawn(2, 3, 4, seed=2)
    found = []
    for output in (layer(tokens), nn.functional.embedding(tokens, layer.dequantized())):
        layer.zero_grad()
        (output * slopes).sum().backward()
        found.append((output.detach(), layer.weight.grad.clone(), layer.scale.grad.clone()))
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole)
