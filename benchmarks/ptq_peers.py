"""NNCF, ONNX Runtime's quantizer and torchao on one network: each returns the logits of its int8 model on the test inputs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import Data
from featherweight.data import as_call, batches, example_inputs, forward
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.onnxruntime import Session

Logits = Callable[[nn.Module, Data, int], Tensor]
"""Takes a float model, its data with calibration and test inputs, and how many calibration samples to read."""


def _onnx(model: nn.Module, data: Data) -> bytes:
    return assemble(export_graph(model, data), model.state_dict())


def _parts(inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)


def samples(data: Data, count: int) -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
    """Yield calibration inputs one sample at a time."""
    for inputs, _ in batches(data.calibrate, "calibrate"):
        for one in zip(*(part.split(1) for part in _parts(inputs)), strict=True):
            if not count:
                return
            count -= 1
            yield tuple(part.numpy() for part in one)


def nncf(model: nn.Module, data: Data, count: int, transformer: bool = False) -> Tensor:
    """`nncf.quantize` on the OpenVINO model, with its defaults, run by OpenVINO in float32 where it is not integer."""
    import openvino

    quantized = nncf_model(model, data, count, transformer)
    compiled = openvino.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    found = [compiled([part.numpy() for part in _parts(inputs)])[0] for inputs, _ in batches(data.test, "test")]
    return torch.from_numpy(np.concatenate(found))


def nncf_model(model: nn.Module, data: Data, count: int, transformer: bool = False) -> Any:
    """Return the OpenVINO model that `nncf.quantize` makes."""
    import nncf
    import openvino

    example = _parts(example_inputs(data, batch=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = openvino.convert_model(model.eval(), example_input=example if len(example) > 1 else example[0])
        sizes = {
            port: openvino.PartialShape([-1, *part.shape[1:]])
            for port, part in zip(network.inputs, example, strict=True)
        }
        network.reshape(sizes)
        kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        some = list(samples(data, count))
        return nncf.quantize(network, nncf.Dataset(some), subset_size=len(some), **kind)


def onnxruntime(model: nn.Module, data: Data, count: int) -> Tensor:
    """`quantize_static`, QUInt8 activations and QInt8 weights per channel; `quantize_dynamic` where there is a recurrent layer."""
    session = Session(onnx_model(model, data, count))
    found = [session.run(inputs)[0] for inputs, _ in batches(data.test, "test")]
    return torch.from_numpy(np.concatenate(found))


def onnx_model(model: nn.Module, data: Data, count: int) -> bytes:
    """Return the ONNX model that ONNX Runtime's own quantizer makes."""
    import onnx
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = Session(_onnx(model, data)).inputs

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = samples(data, count)

        def get_next(self) -> Any:
            sample = next(self.samples, None)
            return None if sample is None else dict(zip(names, sample, strict=True))

    with tempfile.TemporaryDirectory() as folder:
        given, ready, made = (Path(folder) / f"{name}.onnx" for name in ("given", "ready", "made"))
        given.write_bytes(_onnx(model, data))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            plain = onnx.load(given)
            plain.graph.ClearField("value_info")  # what the exporter inferred is in the quantizer's way
            onnx.save(plain, given)
            tools.quantize_dynamic(given, made, per_channel=True, weight_type=tools.QuantType.QInt8)
        else:
            quant_pre_process(given, ready, skip_symbolic_shape=True)
            kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
            tools.quantize_static(ready, made, Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=True, **kinds)
        return made.read_bytes()


def torchao(model: nn.Module, data: Data, count: int) -> Tensor:
    """PT2E with `X86InductorQuantizer`, static, run as PyTorch's reference operators.

    Raises:
        NotImplementedError: the model has a recurrent layer, which the quantizer leaves in float.
    """
    converted = pt2e_model(model, data, count)
    with torch.no_grad():
        return torch.cat([forward(converted, inputs) for inputs, _ in batches(data.test, "test")])


def pt2e_model(model: nn.Module, data: Data, count: int) -> Any:
    """Return the graph of reference operators that torchao makes, for any batch size.

    Raises:
        NotImplementedError: the model has a recurrent layer, which the quantizer leaves in float.
    """
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        raise NotImplementedError("X86InductorQuantizer has no pattern for recurrent layers")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    args, kwargs = as_call(example_inputs(data, batch=2))
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in args) if args else {name: {0: batch} for name in kwargs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        read = 0
        for inputs, _ in batches(data.calibrate, "calibrate"):
            if read >= count:
                break
            kept = tuple(part[: count - read] for part in _parts(inputs))
            prepared(*kept)
            read += len(kept[0])
        return convert_pt2e(prepared)


PEERS: dict[str, Logits] = {"nncf": nncf, "onnxruntime": onnxruntime, "torchao": torchao}
