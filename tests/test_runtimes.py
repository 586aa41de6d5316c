"""Every runtime that is installed: the same outputs, any batch, integers where they were asked for, and honest words otherwise."""

from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from featherweight import Context, Data, run
from featherweight.agreement import compare, diverging, expected_outputs
from featherweight.cpu import sums_overflow
from featherweight.delivery import Delivery, candidates, deliver, deliveries, first_sample, subject, timed
from featherweight.errors import DataError, ExportError
from featherweight.integer_graph import layers
from featherweight.latency import Latency
from featherweight.runtimes import FORMATS, RUNTIMES, Subject, find_runtime, inductor, installed
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.runtimes.signed import signed
from featherweight.techniques import QuantizeStatic

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not installed(runtime), reason=f"{runtime.package} is not installed"))
    for name, runtime in RUNTIMES.items()
    # one is for LSTMs alone, see test_recurrent_integers.py, the other is compiled once for all of its tests, below
    if name not in ("onnxruntime_dynamic", "inductor")
]


class Residual(nn.Module):
    """A stem, a residual block and a classifier: what integer graphs stumble over."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
        )
        self.last = nn.Conv2d(16, 16, 3, 2, 1)
        self.linear = nn.Linear(16, 5)

    def forward(self, image):
        x = F.relu(self.stem(image))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.linear(F.relu(self.last(x)).mean((2, 3)))


class Sequences(nn.Module):
    """Linear layers over three dimensions, which ONNX writes as MatMul and Add."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, steps):
        return self.norm(steps + self.down(F.gelu(self.up(steps))))


def quantized(build, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = build().eval(), [torch.randn(8, *shape) for _ in range(2)]
    data = Data(example=batches[0][:1], calibrate=[(batch, batch) for batch in batches], loss="mse")
    return run(QuantizeStatic(), model, Context(data=data)).model, data, batches[0]


@pytest.fixture(scope="module")
def residual():
    model, data, batch = quantized(Residual, (3, 12, 12))
    return model, subject(model, data), batch, expected_outputs(model, batch)


@pytest.fixture(scope="module")
def sequences():
    model, data, batch = quantized(Sequences, (6, 16))
    return model, subject(model, data), batch, expected_outputs(model, batch)


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_computes_what_pytorch_computes_for_any_batch(name, residual, tmp_path):
    model, whole, batch, expected = residual
    made = deliver(whole, name, tmp_path, batch, expected, model)
    assert made.agreement.sqnr_db > 30
    assert made.file_bytes > 1000
    for size in (1, 3) if find_runtime(name).any_batch else ():
        compare([value[:size] for value in expected], made.program.run(batch[:size]))


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] in ("onnxruntime", "openvino")])
def test_all_layers_of_a_residual_network_are_integers(name, residual, tmp_path):
    _, whole, batch, expected = residual
    made = deliver(whole, name, tmp_path, batch, expected)
    runs = {row["path"]: row["runs"] for row in made.layers}
    assert runs.keys() == {"stem", "first", "second", "last", "linear"}
    if name == "openvino" and sums_overflow():
        assert "int8" not in runs.values()
    else:
        assert set(runs.values()) == {"int8"}
        assert made.missed() == []


def pooled():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 5)
    )


def test_a_maximum_is_taken_of_integers_and_is_the_same():
    model, data, batch = quantized(pooled, (3, 12, 12))
    whole, expected = subject(model, data), expected_outputs(model, batch)
    graph = onnx.load_from_string(whole.onnx).graph
    makers = {name: node for node in graph.node for name in node.output}
    pool = next(node for node in graph.node if node.op_type == "MaxPool")
    after = next(node for node in graph.node if node.op_type == "QuantizeLinear" and pool.output[0] in node.input)
    assert makers[pool.input[0]].op_type == "DequantizeLinear"
    assert makers[pool.input[0]].input[1:] == after.input[1:]
    session = onnx.reference.ReferenceEvaluator(onnx.load_from_string(whole.onnx))
    assert compare(expected, session.run(None, {graph.input[0].name: batch.numpy()})).sqnr_db > 100


def test_a_grid_around_its_middle_is_signed_and_the_same():
    model, data, batch = quantized(pooled, (3, 12, 12))
    whole = subject(model, data).onnx
    given, turned = onnx.load_from_string(whole), onnx.load_from_string(signed(whole))
    kinds = [[tensor.data_type for tensor in each.graph.initializer] for each in (given, turned)]
    assert [kind.count(onnx.TensorProto.UINT8) for kind in kinds] == [4, 3]
    outputs = [
        onnx.reference.ReferenceEvaluator(each).run(None, {"input": batch.numpy()})[0] for each in (given, turned)
    ]
    assert np.array_equal(*outputs)
    model[0].input_zero = torch.tensor(140, dtype=torch.uint8)
    aside = subject(model, data).onnx
    assert signed(aside) == aside


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.values[0] in ("litert", "litert_dynamic", "executorch")]
)
def test_a_mobile_runtime_says_which_layers_are_integers(name, residual, tmp_path):
    model, whole, batch, expected = residual
    made = deliver(whole, name, tmp_path, batch, expected, model)
    runs = {row["path"]: row["runs"] for row in made.layers}
    assert [runs[path] for path in ("stem", "first", "second", "last")] == ["int8"] * 4
    assert [row["path"] for row in made.missed()] == ([] if name == "litert_dynamic" else ["linear"])
    with pytest.raises(DataError, match=r"\[3, 3, 12, 12\]"):
        made.program.run(batch[:3])


@pytest.mark.skipif(not installed(RUNTIMES["executorch"]), reason="executorch is not installed")
def test_executorch_keeps_the_grid_between_layers(tmp_path):
    model, data, batch = quantized(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (16,))
    made = deliver(subject(model, data), "executorch", tmp_path, batch, expected_outputs(model, batch), model)
    assert {row["path"]: row["runs"] for row in made.layers} == {"0": "int8", "2": "float32"}


def test_onnxruntime_adds_residuals_and_multiplies_sequences_with_integers(residual, sequences):
    assert audit(residual[1].onnx) | {"QLinearConv": 4, "QLinearAdd": 1, "QGemm": 1} == audit(residual[1].onnx)
    assert audit(sequences[1].onnx)["MatMulIntegerToFloat"] == 2
    assert Session(sequences[1].onnx).audit() == {"up": "int8", "down": "int8"}


def test_a_layer_that_was_to_be_int8_and_is_not_is_an_entry(residual, tmp_path):
    _, whole, batch, expected = residual
    made = deliver(whole, "torch", tmp_path, batch, expected)
    assert [row["path"] for row in made.missed()] == ["stem", "first", "second", "last", "linear"]
    assert made.to_dict()["asked_int8_but_not"][0] == {"path": "stem", "asked": "int8", "runs": "float32"}


def test_float_layers_ask_for_nothing(tmp_path):
    model, data = nn.Sequential(nn.Linear(4, 3)), Data(example=torch.ones(1, 4))
    assert subject(model, data).layers() == {"0": False}
    assert subject(nn.Linear(4, 3), data).layers() == {"model": False}


def test_the_first_layer_that_differs_is_named(residual, tmp_path):
    model, whole, batch, expected = residual
    broken = onnx.load_model_from_string(whole.onnx)
    second = next(node for node in broken.graph.node if node.name == "second")
    decoding = next(node for node in broken.graph.node if second.input[1] in node.output)
    codes = next(item for item in broken.graph.initializer if item.name == decoding.input[0])
    codes.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(codes), codes.name))
    wrong = Subject(broken.SerializeToString(), batch)
    with pytest.raises(ExportError, match=r"onnxruntime: .*SQNR .*the first layer that differs is second, by -\d"):
        deliver(wrong, "onnxruntime", tmp_path, batch, expected, model)
    assert diverging(model, whole, find_runtime("onnxruntime"), batch) == "no layer alone differs"
    (failed,) = deliveries(wrong, ["onnxruntime"], tmp_path, batch, expected)
    assert "SQNR" in failed.to_dict()["reason"]


def test_auto_times_what_agrees_in_turn_and_puts_the_fastest_first(residual, tmp_path):
    model, whole, batch, expected = residual
    assert "onnxruntime" in candidates(whole)
    assert candidates(Subject(whole.onnx, batch)) == [
        name for name, runtime in RUNTIMES.items() if installed(runtime) and not runtime.from_module
    ]
    made = timed(deliveries(whole, ["torch", "onnxruntime"], tmp_path, batch, expected, model), first_sample(batch))
    assert {item.runtime for item in made} == {"torch", "onnxruntime"}
    assert made[0].latency.median <= made[1].latency.median


def test_those_near_the_fastest_are_timed_anew_among_themselves(residual, tmp_path, monkeypatch):
    _, whole, batch, expected = residual
    (one,) = deliveries(whole, ["onnxruntime"], tmp_path, batch, expected)
    made = [replace(one, runtime=name) for name in ("slow", "first", "second")] + [Delivery("gone", reason="missing")]
    rounds = [{"slow": 2.0, "first": 1.0, "second": 1.1}, {"first": 1.3, "second": 1.2, "original": 9.0}]
    asked = []

    def in_turn(calls, seconds):
        asked.append((sorted(calls), seconds))
        return {name: Latency(median, median, median, 20) for name, median in rounds[len(asked) - 1].items()}

    monkeypatch.setattr("featherweight.delivery.interleaved", in_turn)
    found = timed(made, batch, 0.5, beside={"original": lambda: None})
    assert asked == [(["first", "second", "slow"], 0.5), (["first", "original", "second"], 1.0)]
    medians = [(item.runtime, item.latency.median if item.latency else None) for item in found]
    assert medians == [("second", 1.2), ("first", 1.3), ("slow", 2.0), ("gone", None)]


def test_what_does_not_fit_is_refused_in_words(residual, tmp_path, monkeypatch):
    _, whole, batch, _ = residual
    with pytest.raises(ExportError, match=r"unknown runtime 'onxruntime'. Did you mean 'onnxruntime'"):
        find_runtime("onxruntime")
    with pytest.raises(ExportError, match=r"starts from the PyTorch module.*--task"):
        RUNTIMES["torch"].export(Subject(whole.onnx, batch), tmp_path)
    (tmp_path / "a file").write_text("")
    with pytest.raises(ExportError, match="a file"):
        RUNTIMES["onnxruntime"].export(whole, tmp_path / "a file")


@pytest.mark.skipif(not installed(RUNTIMES["openvino"]), reason="openvino is not installed")
def test_openvino_names_what_it_was_given(residual, tmp_path):
    program = RUNTIMES["openvino"].load(RUNTIMES["openvino"].export(residual[1], tmp_path))
    with pytest.raises(DataError, match=r"image.*and was given float32\[2, 4, 12, 12\]"):
        program.run(np.ones((2, 4, 12, 12), np.float32))
    with pytest.raises(DataError, match="takes 1 inputs"):
        program.run((residual[2], residual[2]))
    assert program.run(residual[2][:2])[0].shape == (2, 5)


def test_a_missing_package_has_its_pip_line(monkeypatch, residual, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ExportError, match=r"pip install 'featherweight\[openvino\]'"):
        RUNTIMES["openvino"].export(residual[1], tmp_path)


def test_layers_are_named_by_their_paths(sequences):
    assert layers(onnx.load_model_from_string(sequences[1].onnx)) == {"up": True, "down": True}


class Pair(nn.Module):
    """Two inputs by name, a layer for each, and a product of the two."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(6, 16)

    def forward(self, first, second):
        return self.left(first) * torch.relu(self.right(second))


@pytest.fixture(scope="module")
def compiled(residual, tmp_path_factory):
    model, whole, batch, expected = residual
    return deliver(whole, "inductor", tmp_path_factory.mktemp("inductor"), batch, expected, model)


@pytest.fixture(scope="module")
def compiled_pair(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Pair().eval(), {"first": torch.randn(5, 8), "second": torch.randn(5, 6)}
    whole, expected = subject(model, Data(example=inputs)), expected_outputs(model, inputs)
    return deliver(whole, "inductor", tmp_path_factory.mktemp("pair"), inputs, expected, model), inputs, expected


def test_inductor_computes_integers_for_any_batch(residual, compiled):
    _, _, batch, expected = residual
    assert compiled.agreement.sqnr_db > 30
    for size in (1, 3):
        compare([value[:size] for value in expected], compiled.program.run(batch[:size]))
    assert {row["path"]: row["runs"] for row in compiled.layers} == dict.fromkeys(
        ("stem", "first", "second", "last", "linear"), "int8"
    )
    assert compiled.missed() == []


def test_inductor_computes_float_layers_with_floats_and_takes_inputs_by_name(compiled_pair):
    made, inputs, expected = compiled_pair
    assert made.agreement.sqnr_db > 80
    assert {row["path"]: row["runs"] for row in made.layers} == {"left": "float32", "right": "float32"}
    compare([value[:1] for value in expected], made.program.run({name: value[:1] for name, value in inputs.items()}))


def test_inductor_refuses_inputs_that_its_code_would_misread(residual, compiled, compiled_pair):
    batch = residual[2]
    for wrong in (batch[:, :2], batch[0], batch.double(), (batch, batch)):
        with pytest.raises(DataError, match=r"takes float32\[\w+, 3, 12, 12\] and was given float"):
            compiled.program.run(wrong)
    made, inputs, _ = compiled_pair
    with pytest.raises(DataError, match=r"float32\[5, 8\], float32\[4, 6\]"):
        made.program.run({**inputs, "second": inputs["second"][:4]})


def test_inductor_without_a_compiler_says_so(residual, tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ExportError, match=r"needs a C\+\+ compiler, and there is none: install g\+\+"),
    ):
        RUNTIMES["inductor"].export(residual[1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_inductor_does_not_take_what_it_has_not_written(residual, tmp_path):
    with pytest.raises(ExportError, match=r"TorchInductor cannot load .*model\.pt2"):
        RUNTIMES["inductor"].load(RUNTIMES["torch"].export(residual[1], tmp_path))
    with pytest.raises(ExportError, match="starts from the PyTorch module"):
        RUNTIMES["inductor"].export(Subject(residual[1].onnx, residual[2]), tmp_path)


def test_auto_does_not_wait_for_a_compiler(residual):
    assert FORMATS["inductor"] == "inductor"
    assert "inductor" not in candidates(residual[1])
    assert "torch" in candidates(residual[1])


def test_inductor_claims_only_what_its_code_says():
    source = """
    constants_info_[0].name = "block_layer_bias";
    constants_info_[0].original_fqn = "block.layer.bias";
    constants_info_[1].name = "_frozen_param0";
    constants_info_[1].original_fqn = "_frozen_param0";
    aoti_torch_cpu__qconv_pointwise_tensor(buf0, block_layer_bias, &buf1);
    aoti_torch_cpu_addmm_out(buf2, _frozen_param0, buf1);
    aoti_torch_cpu_bmm_out(buf4, buf3, buf1);
    """
    assert inductor._precisions(source) == {"block.layer": "int8", "?1": "float32"}
    assert inductor._precisions(source + "cached_torch_dtype_bfloat16") == {"block.layer": "int8", "?1": "unknown"}
