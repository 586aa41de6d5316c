"""ONNX Runtime, the default runtime: run a serialized model on the CPU, and read which layers it computes as integers."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime

from featherweight.errors import DataError, ExportError
from featherweight.integer_graph import layers
from featherweight.runtimes.overflow import exact
from featherweight.runtimes.protocol import (
    FLOAT32,
    INT8,
    Program,
    Runtime,
    Subject,
    by_name,
    fastest_quarter,
    first_line,
    written,
)

_KERNEL = "_kernel_time"
_INTEGER = re.compile(r"QLinear|QGemm|MatMulInteger|ConvInteger|DynamicQuantize(MatMul|LSTM)")


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    package = "onnxruntime"
    clocked: ClassVar[bool] = True
    about: ClassVar[str] = "the default: runs every artifact, int8 as integers"

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.onnx`, which other runtimes read too."""
        return written(folder / "model.onnx", subject.onnx)

    def load(self, path: Path, threads: int = 1) -> Session:
        """Load `model.onnx`."""
        try:
            return Session(path.read_bytes(), threads)
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error

    def operators(self, model: bytes, inputs: Any, calls: int = 30) -> dict[str, float]:
        """Return the seconds of each operator."""
        with tempfile.TemporaryDirectory() as folder:
            session = Session(model, profile=Path(folder) / "profile")
            call = session.prepared(inputs)
            for _ in range(calls):
                call()
            events = session.profiled()
        times: dict[str, list[float]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
                times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e6)
        return {name: fastest_quarter(found) for name, found in times.items()}


class Session(Program):
    """A loaded ONNX model.

    Attributes:
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
    """

    def __init__(self, model: bytes, threads: int = 1, optimized: bool = True, profile: Path | None = None) -> None:
        self._model = model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(exact(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own unexported classes
            raise ExportError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
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

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs.

        Raises:
            DataError: a name, the number, the type or a shape does not fit the model; some only when called.
        """
        feeds = by_name(self.inputs, inputs)

        def call() -> list[Any]:
            try:
                outputs: list[Any] = self._session.run(None, feeds)
            except Exception as error:  # onnxruntime raises its own unexported classes
                wanted = ", ".join(f"{name} {kind}{shape}" for name, (kind, shape) in self._types.items())
                given = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
                raise DataError(f"the model takes {wanted} and was given {given}: {first_line(error)}") from error
            return outputs

        return call

    def profiled(self) -> list[dict[str, Any]]:
        """Return what ONNX Runtime has noted of a session made with `profile`, and end the noting: one event a line of its file."""
        found: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        return found

    def audit(self) -> dict[str, str]:
        """Return how ONNX Runtime computes each layer; what it lists under no integer operator is float."""
        nodes = [
            re.sub(r"_token_\d+$", "", node.name) for node in optimized(self._model) if _INTEGER.match(node.op_type)
        ]
        return {path: INT8 if path in nodes else FLOAT32 for path in layers(onnx.load_model_from_string(self._model))}


def optimized(model: bytes) -> list[onnx.NodeProto]:
    """Return the nodes of ONNX Runtime's own optimized graph of a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(exact(model), options, providers=["CPUExecutionProvider"])
        return list(onnx.load(path).graph.node)


def audit(model: bytes) -> dict[str, int]:
    """Return how often each operator runs in ONNX Runtime's own optimized graph, `{"QLinearConv": 19, ...}`."""
    return dict(sorted(Counter(node.op_type for node in optimized(model)).items()))
