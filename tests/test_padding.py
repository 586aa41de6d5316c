"""Zeros around images in an integer graph: the convolution adds them, exactly; any other padding stays an operator of its own."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight import Context, Data, run
from featherweight.agreement import expected_outputs
from featherweight.cpu import sums_overflow
from featherweight.delivery import deliver, subject
from featherweight.runtimes import RUNTIMES, installed
from featherweight.techniques import QuantizeStatic


class Padded(nn.Module):
    """Pointwise, padded depthwise with a stride, pointwise, as in networks that came from TensorFlow."""

    def __init__(self, pad, padding=0):
        super().__init__()
        self.pad = pad
        self.widen = nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16, padding=padding)
        self.narrow = nn.Conv2d(16, 8, 1)

    def forward(self, images):
        return self.narrow(F.relu6(self.depthwise(self.pad(F.relu6(self.widen(images))))))


def made(pad, padding=0):
    torch.manual_seed(0)
    model, batch = Padded(pad, padding).eval(), torch.randn(4, 3, 12, 14)
    data = Data(example=batch[:1], calibrate=[(batch, batch)], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    return small, subject(small, data), batch


def operators(whole):
    return [node.op_type for node in onnx.load_model_from_string(whole.onnx).graph.node]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "openvino_bf16", "litert", "executorch"])
def test_the_convolution_adds_the_zeros(runtime, tmp_path):
    if not installed(RUNTIMES[runtime]):
        pytest.skip(f"{runtime} is not installed")
    model, whole, batch = made(lambda x: F.pad(x, (0, 1, 2, 1)), padding=(1, 0))
    assert "Pad" not in operators(whole)
    assert operators(whole).count("QuantizeLinear") == 3  # what enters each convolution, and no more
    found = deliver(whole, runtime, tmp_path, batch, expected_outputs(model, batch), model)
    assert found.agreement.sqnr_db > 35
    floats = sums_overflow() and runtime.startswith("openvino")  # on this CPU
    if runtime not in ("litert", "executorch") and not floats:  # whose audits know no paths
        # ONNX Runtime wants a grid behind a convolution, and the network's outputs stay float
        assert {row["path"] for row in found.missed()} <= {"narrow"}


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (0, 1, 0, 1), value=1.0),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x, (0, -1, 0, 1)),
    ],
    ids=["ones", "reflected", "cut"],
)
def test_another_padding_stays(pad, tmp_path):
    model, whole, batch = made(pad)
    assert "Pad" in operators(whole)
    assert (
        operators(whole).count("QuantizeLinear") == 4
    )  # one behind the convolution before it too, or that one were float
    found = deliver(whole, "onnxruntime", tmp_path, batch, expected_outputs(model, batch), model)
    assert found.agreement.sqnr_db > 35


def test_zeros_that_two_layers_read_stay(tmp_path):
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images):
            padded = F.pad(images, (1, 1, 1, 1))
            return self.one(padded) + self.two(padded)

    torch.manual_seed(0)
    model, batch = Forked().eval(), torch.randn(4, 3, 8, 8)
    data = Data(example=batch[:1], calibrate=[(batch, batch)], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    whole = subject(small, data)
    assert "Pad" in operators(whole)
    found = deliver(whole, "onnxruntime", tmp_path, batch, expected_outputs(small, batch), small)
    assert found.agreement.sqnr_db > 35
