"""ONNX Runtime, the default runtime: run a serialized model on the CPU, and read which layers it computes as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from torch import Tensor

from featherweight.errors import DataError, ExportError

NAME = "onnxruntime"


class Session:
    """A loaded ONNX model.

    Attributes:
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
    """

    def __init__(self, model: bytes, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own unexported classes
            raise ExportError(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0]}") from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self._types = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}

    def signature(self) -> dict[str, tuple[np.dtype[Any], list[int | str]]]:
        """Return type and shape of each input by name; a dynamic size is a string."""
        kinds = {
            "tensor(float)": "float32",
            "tensor(float16)": "float16",
            "tensor(double)": "float64",
            "tensor(bool)": "bool",
        }
        return {
            name: (np.dtype(kinds.get(kind, kind.removeprefix("tensor(").removesuffix(")"))), list(shape))
            for name, (kind, shape) in self._types.items()
        }

    def run(self, inputs: Any) -> list[np.ndarray[Any, Any]]:
        """Return the outputs, one array each.

        Args:
            inputs: a tensor or array, a tuple of them in the order of `self.inputs`, or a mapping by name.

        Raises:
            DataError: a name, the number, the type or a shape does not fit the model.
        """
        feeds = self.feeds(inputs)
        try:
            outputs: list[np.ndarray[Any, Any]] = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime raises its own unexported classes
            wanted = ", ".join(f"{name} {kind}{shape}" for name, (kind, shape) in self._types.items())
            given = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
            raise DataError(f"the model takes {wanted} and was given {given}: {str(error).splitlines()[0]}") from error
        return outputs

    def feeds(self, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Return the inputs as arrays by name, as `run` takes them.

        Raises:
            DataError: a name or the number of inputs does not fit.
        """
        if isinstance(inputs, Mapping):
            missing, unknown = set(self.inputs) - set(inputs), set(inputs) - set(self.inputs)
            if missing or unknown:
                raise DataError(
                    f"the model takes the inputs {', '.join(self.inputs)} and was given {', '.join(map(str, inputs))}"
                )
            return {name: _array(inputs[name]) for name in self.inputs}
        values = inputs if isinstance(inputs, list | tuple) else (inputs,)
        if len(values) != len(self.inputs):
            raise DataError(
                f"the model takes {len(self.inputs)} inputs ({', '.join(self.inputs)}) and was given {len(values)}"
            )
        return dict(zip(self.inputs, map(_array, values), strict=True))


def _array(value: Any) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def audit(model: bytes) -> dict[str, int]:
    """Return how often each operator runs in ONNX Runtime's own optimized graph, `{"QLinearConv": 19, ...}`.

    A layer that was to be an integer and is not shows up as `Conv` or `FusedConv` here.
    """
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(path)
    counts: dict[str, int] = {}
    for node in optimized.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
