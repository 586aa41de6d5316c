"""LiteRT (once TensorFlow Lite), from PyTorch's exported program: integers from input to output, computed by XNNPACK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data import as_call
from featherweight.errors import DataError, ExportError
from featherweight.layers.quantized import reference
from featherweight.runtimes.baking import baked, loosened
from featherweight.runtimes.protocol import (
    FLOAT32,
    INT8,
    Array,
    Program,
    Runtime,
    Subject,
    first_line,
    in_order,
    program_of,
    quiet,
    written,
)

_COMPUTING = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV", "FULLY_CONNECTED")


class LiteRT(Runtime):
    """LiteRT on the CPU."""

    package = "ai_edge_litert"
    extra = "litert"
    about = "for phones; int8 on one grid from input to output; one batch size"
    from_module = True
    any_batch = False

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.tflite`, for the batch size of the subject's inputs."""
        convert, settings = self.need("litert_torch"), self.need("litert_torch.quantize.quant_config")
        quantizer = self.need("litert_torch.quantize.pt2e_quantizer")
        args, kwargs = as_call(subject.inputs)
        program = baked(program_of(subject, self), args, kwargs, signed=True, floats=True)
        integers = any(node.target is reference.quantize_per_tensor.default for node in program.graph.nodes)
        grids = quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
        config = settings.QuantConfig(pt2e_quantizer=quantizer.PT2EQuantizer().set_global(grids)) if integers else None
        path = folder / "model.tflite"
        written(path, b"")
        try:
            with quiet():
                made = convert.convert(program.module(), args, kwargs, quant_config=config)
                made.export(str(path))
        except Exception as error:  # the converter raises whatever its passes raise
            path.unlink()
            raise ExportError(f"LiteRT cannot express the model: {first_line(error)}") from error
        return path

    def load(self, path: Path, threads: int = 1) -> Program:
        """Load `model.tflite`."""
        package = self.need("ai_edge_litert.interpreter")
        try:
            with quiet():
                interpreter = package.Interpreter(str(path), num_threads=threads)
                interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"LiteRT cannot load {path}: {first_line(error)}") from error
        return Interpreted(interpreter)


class LiteRTDynamic(LiteRT):
    """LiteRT with int8 weights and activations that are rounded to 8 bits anew at each call, each layer by its own range."""

    about = "as litert, but activations get their grid at each call: fast on sequences; one batch size"

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.tflite`, for the batch size of the subject's inputs."""
        convert, tools = self.need("litert_torch"), self.need("ai_edge_quantizer")
        args, kwargs = as_call(subject.inputs)
        program = loosened(program_of(subject, self), args, kwargs)
        plain, path = written(folder / "model.float", b""), folder / "model.tflite"
        try:
            with quiet():
                convert.convert(program.module(), args, kwargs).export(str(plain))
                quantizer = tools.quantizer.Quantizer(str(plain), tools.recipe.dynamic_wi8_afp32())
                data = bytes(quantizer.quantize().quantized_model)
        except Exception as error:  # the converter raises whatever its passes raise
            raise ExportError(f"LiteRT cannot express the model: {first_line(error)}") from error
        finally:
            plain.unlink()
        return written(path, data)


class Interpreted(Program):
    """A loaded `.tflite` file; floats are put on its grids, and what it gives is taken off them."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._inputs = sorted(interpreter.get_input_details(), key=lambda detail: str(detail["name"]))
        self._outputs = interpreter.get_output_details()

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs."""
        arrays = in_order(inputs)
        wanted = [detail["shape"].tolist() for detail in self._inputs]
        if [list(array.shape) for array in arrays] != wanted:
            raise DataError(f"LiteRT takes {wanted} and was given {[list(array.shape) for array in arrays]}")
        feeds = [_encoded(array, detail) for array, detail in zip(arrays, self._inputs, strict=True)]

        def call() -> list[Any]:
            for value, detail in zip(feeds, self._inputs, strict=True):
                self._interpreter.set_tensor(detail["index"], value)
            self._interpreter.invoke()
            return [_decoded(self._interpreter.get_tensor(detail["index"]), detail) for detail in self._outputs]

        return call

    def audit(self) -> dict[str, str]:
        """Return how each layer is computed, by the types of the tensors that its operator reads."""
        tensors = {detail["index"]: detail for detail in self._interpreter.get_tensor_details()}
        found: dict[str, str] = {}
        for operator in self._interpreter._get_ops_details():
            if operator["op_name"] in _COMPUTING:
                kinds = {np.dtype(tensors[index]["dtype"]) for index in operator["inputs"][:2] if index in tensors}
                names = [str(tensors[index]["name"]) for index in operator["outputs"] if index in tensors]
                runs = INT8 if np.dtype(np.int8) in kinds else FLOAT32  # with float inputs, the kernel rounds them
                paths = [path for name in names if (path := _path(name))] or [f"?{len(found)}"]
                found.update(dict.fromkeys(paths, runs))
        return found


def _path(name: str) -> str:
    """The dotted path in a tensor's name, which reads `package.Outer/package.Inner_layers/package.Linear_0;2`."""
    classes = [part.rsplit(".", 1)[-1] for part in name.partition(";")[0].split("/")[1:]]
    return ".".join(one.partition("_")[2] for one in classes)


def _encoded(array: Array, detail: Any) -> Array:
    kind, (scale, zero) = np.dtype(detail["dtype"]), detail["quantization"]
    if kind == array.dtype or not scale:
        return array.astype(kind)
    limits = np.iinfo(kind)
    codes: Array = np.clip(np.round(array / scale) + zero, limits.min, limits.max)
    return codes.astype(kind)


def _decoded(array: Array, detail: Any) -> Array:
    scale, zero = detail["quantization"]
    return (array.astype(np.float32) - zero) * np.float32(scale) if scale else array
