"""Six ways in which others run a network on a CPU, each prepared for one batch of inputs on one thread: what they return is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import torch
from ptq_peers import nncf_model, onnx_model, pt2e_model, samples
from torch import Tensor, nn

from featherweight import Data
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.litert import LiteRT
from featherweight.runtimes.onnxruntime import Session
from featherweight.runtimes.openvino import Compiled
from featherweight.runtimes.protocol import quiet

Call = Callable[[], list[Any]]
SAMPLES = 32  # for calibration


def nncf_openvino(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """`nncf.quantize` on the OpenVINO model with its defaults, run by OpenVINO with its defaults: bfloat16 where it is not integer."""
    path = folder / "nncf.xml"
    if not path.exists():
        with quiet():
            openvino.save_model(nncf_model(model, data, SAMPLES), path, compress_to_fp16=False)
    core = openvino.Core()
    return Compiled(core, core.read_model(path), "bf16", 1).prepared(inputs)


def openvino_bf16(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """OpenVINO on the float model, with its default precision on this CPU."""
    core = openvino.Core()
    float_model = core.read_model(assemble(export_graph(model, data), model.state_dict()))
    return Compiled(core, float_model, "bf16", 1).prepared(inputs)


def onnxruntime_int8(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """ONNX Runtime's own quantizer: QUInt8 activations, QInt8 weights per channel; `quantize_dynamic` for the LSTM."""
    path = folder / "onnxruntime.onnx"
    if not path.exists():
        with quiet():
            made = onnx_model(model, data, SAMPLES)
        path.write_bytes(made)
    return Session(path.read_bytes()).prepared(inputs)


def litert_static(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """ai-edge-quantizer's `static_wi8_ai8` on LiteRT's float model."""
    return _litert(model, data, inputs, folder, "static_wi8_ai8")


def litert_dynamic(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """ai-edge-quantizer's `dynamic_wi8_afp32` on LiteRT's float model."""
    return _litert(model, data, inputs, folder, "dynamic_wi8_afp32")


def _litert(model: nn.Module, data: Data, inputs: Tensor, folder: Path, recipe: str) -> Call:
    path, plain = (folder / f"{name}-{len(inputs)}.tflite" for name in (recipe, "float"))
    with quiet():
        import litert_torch
        from ai_edge_quantizer import quantizer
        from ai_edge_quantizer import recipe as recipes

        if not plain.exists():
            litert_torch.convert(model.eval(), (inputs,)).export(str(plain))
        if not path.exists():
            tool = quantizer.Quantizer(str(plain), getattr(recipes, recipe)())
            found = None
            if tool.need_calibration:
                some = [array for (array,) in samples(data, max(SAMPLES, len(inputs)))]
                groups = [some[at : at + len(inputs)] for at in range(0, len(some) - len(inputs) + 1, len(inputs))]
                name = _input_name(plain)
                found = tool.calibrate({"serving_default": [{name: _joined(group)} for group in groups]})
            path.write_bytes(bytes(tool.quantize(found).quantized_model))
    return LiteRT().load(path).prepared(inputs)


def _input_name(path: Path) -> str:
    from ai_edge_litert.interpreter import Interpreter

    (signature,) = Interpreter(str(path)).get_signature_list().values()
    return str(signature["inputs"][0])


def _joined(arrays: list[Any]) -> Any:
    import numpy

    return numpy.concatenate(arrays)


def inductor_int8(model: nn.Module, data: Data, inputs: Tensor, folder: Path) -> Call:
    """PT2E with `X86InductorQuantizer`, compiled by TorchInductor with freezing.

    Raises:
        NotImplementedError: the model has a recurrent layer, which the quantizer leaves in float.
    """
    import torch._inductor.config as settings

    with quiet(), settings.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(pt2e_model(model, data, SAMPLES), dynamic=False)
        compiled(inputs)
        compiled(inputs)

    def call() -> list[Any]:
        with torch.no_grad():
            return [compiled(inputs)]

    return call


PEERS: dict[str, Callable[[nn.Module, Data, Tensor, Path], Call]] = {
    "nncf_openvino": nncf_openvino,
    "openvino_bf16": openvino_bf16,
    "onnxruntime_int8": onnxruntime_int8,
    "litert_static": litert_static,
    "litert_dynamic": litert_dynamic,
    "inductor_int8": inductor_int8,
}
