"""Sums of bytes that would overflow 16 bits are exact, on whatever CPU this runs."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from featherweight import cpu
from featherweight.agreement import signal_to_noise
from featherweight.cpu import sums_overflow
from featherweight.data import Data
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes import find_runtime, overflow
from featherweight.runtimes.onnxruntime import Session
from featherweight.runtimes.overflow import unsigned
from featherweight.runtimes.protocol import Subject
from featherweight.technique import Context
from featherweight.techniques import QuantizeStatic


class Twice(nn.Module):
    """A layer called twice: two nodes read one weight."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).relu()).relu())


NETWORKS = {
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(), nn.Conv2d(24, 32, 1)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)),
        ),
        (3, 10, 10),
    ),
    "perceptron": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), (64,)),
    "twice": (Twice, (32,)),
}


def quantized(name, step=None):
    """The network with weights that are nearly all large and positive, on inputs that are too."""
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build().eval(), torch.rand(32, *shape)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data += 0.7 * weight.data.std()
    data = Data(example=inputs[:1], calibrate=[inputs])
    model = run(step or QuantizeStatic(), model, Context(data=data)).model
    with torch.no_grad():
        return assemble(export_graph(model, data), model.state_dict()), inputs, model(inputs)


@pytest.mark.parametrize(("runtime", "least"), [("onnxruntime", 50), ("openvino", 30)])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_computed_with_integers_is_exact(name, runtime, least, tmp_path):
    """Sums that overflow leave 17 to 34 dB here; OpenVINO rounds some values another way, which leaves more than 30."""
    if runtime == "openvino":
        pytest.importorskip("openvino")
    model, inputs, expected = quantized(name)
    chosen = find_runtime(runtime)
    given = chosen.load(chosen.export(Subject(model, inputs), tmp_path)).run(inputs)
    assert signal_to_noise([expected], [torch.from_numpy(np.array(value)) for value in given]) > least


@pytest.mark.parametrize("name", NETWORKS)
def test_unsigned_weights_are_the_same(name):
    model, inputs, _ = quantized(name)
    moved = unsigned(model)
    kinds = [
        {tensor.data_type for tensor in onnx.load_model_from_string(one).graph.initializer} for one in (model, moved)
    ]
    assert onnx.TensorProto.INT8 in kinds[0]
    assert onnx.TensorProto.UINT8 in kinds[1]
    before, after = (Session(one, optimized=False).run((inputs,)) for one in (model, moved))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_cannot_overflow_stays_as_it_is(monkeypatch):
    """Codes of 7 bits, on any CPU; and any codes on a CPU that adds in 32 bits."""
    narrow, _, _ = quantized("perceptron", QuantizeStatic(weight_bits=7))
    assert unsigned(narrow) is narrow
    wide, _, _ = quantized("perceptron")
    monkeypatch.setattr(cpu, "instructions", lambda: frozenset({"avx2", "avx_vnni"}))
    assert not sums_overflow()
    assert overflow.exact(wide) is wide
    monkeypatch.setattr(cpu, "instructions", lambda: frozenset({"avx2", "avx512f"}))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "AMD64")
    assert sums_overflow()
    assert overflow.exact(wide) != wide
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert not sums_overflow()
