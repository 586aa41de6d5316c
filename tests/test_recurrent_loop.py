"""Factored recurrent layers as loops in a file: what they compute, where they are, and where kernels stay."""

import onnx
import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.layers import build, looping
from featherweight.portable import assemble, export_graph
from featherweight.runtimes import RUNTIMES, Subject, installed
from featherweight.zoo import randomise

WIDE = 224  # 4 * 224^2 weights a step, 5 * 224 * 8 of two factors: 191,744 fewer
RUNNING = [name for name in ("onnxruntime", "openvino") if installed(RUNTIMES[name])]


class Holder(nn.Module):
    """Takes and gives everything with the batch first, as exported models do."""

    def __init__(self, layer):
        super().__init__()
        self.recurrent = layer
        self.turned = not layer.layers[0].batch_first

    def forward(self, steps, hidden=None, cell=None):
        steps = steps.transpose(0, 1) if self.turned else steps
        states = [state.transpose(0, 1) for state in (hidden, cell) if state is not None]
        values, finals = self.recurrent(steps, (tuple(states) if cell is not None else states[0]) if states else None)
        values = values.transpose(0, 1) if self.turned else values
        return values, [final.transpose(0, 1) for final in (finals if isinstance(finals, tuple) else (finals,))]


def made(kind, inputs=(0, 8), hidden=(8, 8), width=WIDE, **options):
    options = {"input_size": 6, "hidden_size": width, "input_ranks": inputs, "hidden_ranks": hidden, **options}
    return Holder(randomise(build(f"factored_{kind}", options), 1)).eval().requires_grad_(False)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in leaves(part)]


def same_in_a_file(model, data, inputs, folder):
    """Compare with PyTorch on every runtime, and return the operators of the graph."""
    graph = export_graph(model, data)
    wanted, flat = leaves(model(*inputs)), tuple(leaves(inputs))
    for name in RUNNING:
        subject = Subject(assemble(graph, model.state_dict()), flat)
        got = RUNTIMES[name].load(RUNTIMES[name].export(subject, folder / name)).run(flat)
        for value, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), want, atol=2e-5, rtol=2e-5)
    return [node.op_type for node in onnx.load_model_from_string(graph.skeleton).graph.node]


@pytest.mark.parametrize(
    ("kind", "options", "loops", "kernels"),
    [
        ("lstm", {"shared": True, "batch_first": True}, 1, 0),
        ("gru", {"shared": True, "bias": False}, 1, 0),
        ("lstm", {"inputs": (3, 0, 8), "hidden": (8, 8, 0), "bias": False}, 2, 1),
        ("gru", {"inputs": (0, 0), "batch_first": True}, 2, 0),
    ],
)
def test_a_file_computes_what_pytorch_does_from_states_on(kind, options, loops, kernels, tmp_path):
    """Outputs and final states, at another batch size than it was exported for."""
    model = made(kind, **options)

    def inputs(batch):
        states = [drawn(batch, len(model.recurrent.layers), WIDE, seed=seed) for seed in (1, 2)]
        return (drawn(batch, 5, 6), *states[: 2 if kind == "lstm" else 1])

    kinds = same_in_a_file(model, Data(example=inputs(2)), inputs(3), tmp_path)
    assert (kinds.count("Scan"), kinds.count(kind.upper())) == (loops, kernels)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_file_takes_any_batch_and_length(kind, tmp_path):
    """Exported for 2 sequences of 5 steps, and run on 3 of 9."""
    data = Data(example=drawn(2, 5, 6), dynamic={"steps": {1: "time"}})
    kinds = same_in_a_file(made(kind, shared=True, batch_first=True), data, (drawn(3, 9, 6),), tmp_path)
    assert kinds.count("Scan") == 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_sequence_without_a_batch(kind):
    layer = made(kind, shared=True, batch_first=True).recurrent
    states = tuple(drawn(2, WIDE, seed=seed) for seed in (1, 2))
    inputs = drawn(5, 6), states if kind == "lstm" else states[0]
    wanted = leaves(layer(*inputs))
    with looping(layer):
        assert layer.loops
        got = leaves(layer(*inputs))
    for value, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("options", "loops"),
    [
        ({"shared": True}, ((0, 2),)),
        ({}, ((0, 1), (1, 2))),  # the second layer reads another projection than what the loop carries
        ({"hidden": (8, 0)}, ((0, 1),)),
        ({"hidden": (0, 8), "shared": True}, ((1, 2),)),
        ({"inputs": (0, 8, 0), "hidden": (8, 8, 8), "shared": True}, ((0, 2), (2, 3))),
        ({"inputs": (0, 60), "hidden": (60, 8), "shared": True}, ((0, 2),)),  # 224 (4 * 224 - 5 * 60): 133,504 fewer
        ({"inputs": (0, 64), "hidden": (64, 8), "shared": True}, ((1, 2),)),  # 129,024 fewer
        ({"width": 96}, ()),
        ({"bidirectional": True}, ()),
    ],
)
def test_where_loops_are_faster(options, loops):
    """By hand: 130,000 weights fewer a step, and one loop for layers that share what is carried."""
    model = made("lstm", **options)
    assert model.recurrent.faster_loops() == loops
    with looping(model):
        assert model.recurrent.loops == loops
    assert model.recurrent.loops == ()


def test_kernels_come_back_when_an_export_fails():
    model = made("gru", shared=True)
    with pytest.raises(KeyError), looping(model):
        raise KeyError
    assert model.recurrent.loops == ()
