"""LSTMs as integers on OpenVINO: asked for by a grid on their input, near PyTorch, and left float where the kernel cannot follow."""

import pytest
import torch
from test_recurrent_integers import Tagger, made
from torch import nn

from featherweight import Context, Data, run
from featherweight.agreement import expected_outputs
from featherweight.cpu import sums_overflow
from featherweight.delivery import deliver, subject
from featherweight.float_graph import alike, floated
from featherweight.layers.quantized import QuantizedLayer
from featherweight.runtimes import Subject
from featherweight.techniques import QuantizeStatic, QuantizeWeights

pytest.importorskip("openvino")


def rows(whole, model, batch, folder, runtime="openvino"):
    found = deliver(whole, runtime, folder, batch, expected_outputs(model, batch), model)
    runs = {row["path"]: (row["asked"], row["runs"]) for row in found.layers}
    if sums_overflow() and runtime != "onnxruntime":
        assert "int8" not in {how for _, how in runs.values()}
        pytest.skip("OpenVINO computes no integers on a CPU without VNNI")
    return runs, found


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("runtime", ["openvino", "openvino_bf16"])
def test_an_lstm_on_a_grid_is_computed_with_integers_and_agrees_with_pytorch(runtime, options, tmp_path):
    model, whole, batch = made(QuantizeStatic(), **options)
    runs, found = rows(whole, model, batch, tmp_path, runtime)
    lstms = {path: row for path, row in runs.items() if path.startswith("cell")}
    assert len(lstms) == options.get("num_layers", 1)
    assert set(lstms.values()) == {("int8", "int8")}
    assert found.agreement.sqnr_db > 27
    assert found.program.run(batch[:3])[0].shape == (3, 9, 4)


def test_large_inputs_and_hidden_states_share_a_grid(tmp_path):
    """The grid reaches from the largest input to hidden states of at most 1: one for the inputs alone would leave them three codes."""
    torch.manual_seed(0)
    model, batches = Tagger().eval(), [100 * torch.randn(8, 9, 6) for _ in range(2)]
    with torch.no_grad():
        model.cell.weight_ih_l0 /= 100
    data = Data(example=batches[0][:1], calibrate=[(batch, batch) for batch in batches], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    whole = subject(small, data)
    runs, found = rows(whole, small, batches[0], tmp_path)
    assert runs["cell"] == ("int8", "int8")
    assert found.agreement.sqnr_db > 27


def test_codes_alone_stay_float(tmp_path):
    model, whole, batch = made(QuantizeWeights(bits=8))
    assert rows(whole, model, batch, tmp_path)[0]["cell"] == ("float32", "float32")


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"cell": nn.GRU}], ids=str)
def test_what_the_kernel_cannot_do_stays_float_and_agrees(options, tmp_path):
    model, whole, batch = made(QuantizeStatic(), **options)
    runs, found = rows(whole, model, batch, tmp_path)
    assert runs["cell"][1] != "int8"
    assert found.agreement.sqnr_db > 40


class Started(nn.Module):
    """An LSTM whose first state is made of its first step."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(6, 12)
        self.cell = nn.LSTM(6, 12, batch_first=True)

    def forward(self, steps):
        state = self.start(steps[:, 0])[None]
        return self.cell(steps, (state, state))[0]


def test_a_first_state_that_is_not_zero_keeps_the_layer_float(tmp_path):
    torch.manual_seed(0)
    model, batch = Started().eval(), torch.randn(8, 9, 6)
    data = Data(example=batch[:1], calibrate=[(batch, batch)], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    runs, _ = rows(subject(small, data), small, batch, tmp_path)
    assert runs["cell"] == ("int8", "float32")


def test_another_runtime_says_that_it_computes_floats(tmp_path):
    model, whole, batch = made(QuantizeStatic())
    runs, found = rows(whole, model, batch, tmp_path, "onnxruntime")
    assert runs["cell"] == ("int8", "float32")
    assert [row["path"] for row in found.missed()] == ["cell"]


def test_it_can_be_taken_back_to_floats_alone(tmp_path):
    model, whole, batch = made(QuantizeStatic(), num_layers=2)
    assert ["cell", "cell#2"] in alike(whole.onnx)
    loose = Subject(floated(whole.onnx, ["cell", "cell#2"]), whole.inputs)
    runs, _ = rows(loose, model, batch, tmp_path)
    assert runs == {"cell": ("float32", "float32"), "cell#2": ("float32", "float32"), "linear": ("int8", "int8")}


def test_the_input_is_rounded_in_pytorch_too_and_the_grid_learns():
    model, _, batch = made(QuantizeStatic())
    first = model.cell.incoming[0]
    assert first.input_grid
    wanted = nn.LSTM.forward(model.cell, first.rounded(batch))[0]
    torch.testing.assert_close(model.cell(batch)[0], wanted)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    for layer in layers:
        layer.thaw()
    model.train()
    batch.requires_grad_()
    model(batch).square().sum().backward()
    assert first.input_scale.grad.abs() > 0
    assert batch.grad.abs().sum() > 0
