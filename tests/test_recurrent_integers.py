"""LSTMs as integers on ONNX Runtime: from the stored codes, near PyTorch, read from its own graph, and refused in words otherwise."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from featherweight import Context, Data, run
from featherweight.agreement import expected_outputs
from featherweight.delivery import deliver, subject
from featherweight.errors import ExportError
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.runtimes.recurrent_integers import with_integers
from featherweight.techniques import FactorRecurrent, QuantizeStatic, QuantizeWeights


class Tagger(nn.Module):
    """A recurrent layer over steps of 6 features, and a linear layer on each of its outputs."""

    def __init__(self, cell=nn.LSTM, **options):
        super().__init__()
        self.cell = cell(6, 12, batch_first=True, **options)
        self.linear = nn.Linear(24 if self.cell.bidirectional else 12, 4)

    def forward(self, steps):
        return self.linear(self.cell(steps)[0])


def made(technique, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = Tagger(**options).eval(), [torch.randn(8, 9, 6) for _ in range(2)]
    data = Data(example=batches[0][:1], calibrate=[(batch, batch) for batch in batches], loss="mse")
    small = run(technique, model, Context(data=data)).model
    return small, subject(small, data), batches[0]


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("technique", [QuantizeStatic(), QuantizeWeights(bits=8)], ids=["static", "weights"])
def test_every_lstm_is_computed_with_integers_and_agrees_with_pytorch(technique, options, tmp_path):
    model, whole, batch = made(technique, **options)
    found = deliver(whole, "onnxruntime_dynamic", tmp_path, batch, expected_outputs(model, batch), model)
    assert found.agreement.sqnr_db > 30
    runs = {row["path"]: row["runs"] for row in found.layers}
    assert {runs[path] for path in runs if path.startswith("cell")} == {"int8"}
    assert audit(found.path.read_bytes())["DynamicQuantizeLSTM"] == options.get("num_layers", 1)
    assert found.program.run(batch[:3])[0].shape == (3, 9, 4)


def test_its_codes_are_those_of_the_model():
    model, whole, _ = made(QuantizeWeights(bits=4))
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_model_from_string(with_integers(whole.onnx)).graph.initializer
    }
    for letter, layer in (("W", model.cell.incoming[0]), ("R", model.cell.hidden[0])):
        order = torch.arange(48).reshape(4, 12)[[0, 3, 1, 2]].flatten()  # PyTorch's gates are i f g o, ONNX's i o f g
        np.testing.assert_array_equal(stored[f"cell.{letter}"][0], layer.codes[order].T)
        np.testing.assert_array_equal(stored[f"cell.{letter}.step"][0], layer.scale[order])
        assert not stored[f"cell.{letter}.zero"].any()


def test_the_file_stays_as_small_as_its_codes():
    _, whole, _ = made(QuantizeWeights(bits=8))
    assert len(with_integers(whole.onnx)) < len(whole.onnx) + 2000


@pytest.mark.parametrize(
    ("technique", "options"),
    [
        (QuantizeWeights(bits=8), {"cell": nn.GRU}),
        (QuantizeWeights(bits=8, group=2), {}),
        (FactorRecurrent(), {}),
    ],
    ids=["gru", "groups", "factors"],
)
def test_what_the_operator_cannot_take_is_refused(technique, options, tmp_path):
    model, whole, batch = made(technique, **options)
    with pytest.raises(ExportError, match="no LSTM here has weights of integer codes with one scale for each gate"):
        deliver(whole, "onnxruntime_dynamic", tmp_path, batch, expected_outputs(model, batch), model)
    assert set(Session(whole.onnx).audit().values()) == {"float32"}
