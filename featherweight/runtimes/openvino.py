"""OpenVINO on the CPU, from the ONNX graph: integers where inputs are on grids, and float32 or bfloat16 for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from featherweight.cpu import sums_overflow
from featherweight.errors import DataError, ExportError
from featherweight.runtimes.lengths import without_lengths
from featherweight.runtimes.loops import closed
from featherweight.runtimes.openvino_recurrent import named, with_integers
from featherweight.runtimes.protocol import (
    BF16,
    FLOAT32,
    INT8,
    UNKNOWN,
    Program,
    Runtime,
    Subject,
    by_name,
    fastest_quarter,
    first_line,
    quiet,
)
from featherweight.runtimes.signed import signed

_PRECISIONS = {"u8": INT8, "i8": INT8, "bf16": BF16, "f32": FLOAT32, "f16": "float16"}
_BEFORE_BIAS = "/WithoutBiases"  # behind the path of a layer in the name of its product
_MOST_SHAPES = 4  # compiled for; after that one program takes every shape


class OpenVino(Runtime):
    """OpenVINO on the CPU, with float32 for what is not computed with integers."""

    package = "openvino"
    extra = "openvino"
    precision: ClassVar[str] = "f32"
    about: ClassVar[str] = "int8 as integers, the rest in float32"
    clocked: ClassVar[bool] = True

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.xml` and `model.bin`."""
        openvino = self.need()
        path = folder / "model.xml"
        try:
            with quiet():
                whole = without_lengths(subject.onnx)
                model = openvino.Core().read_model(signed(closed(whole)))
                named(model, whole)
                if not sums_overflow():
                    with_integers(openvino, model, {path for path, integers in subject.layers().items() if integers})
                folder.mkdir(parents=True, exist_ok=True)
                openvino.save_model(model, path, compress_to_fp16=False)
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise ExportError(f"OpenVINO cannot take the model: {first_line(error)}") from error
        return path

    def load(self, path: Path, threads: int = 1) -> Program:
        """Load `model.xml`."""
        core = self.need().Core()
        try:
            return Compiled(core, core.read_model(path), self.precision, threads)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot load {path}: {first_line(error)}") from error

    def operators(self, model: bytes, inputs: Any, calls: int = 30) -> dict[str, float]:
        """Return the seconds of each operator."""
        core = self.need().Core()
        try:
            compiled = Compiled(
                core, core.read_model(signed(closed(without_lengths(model)))), self.precision, 1, clocked=True
            )
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot load the model: {first_line(error)}") from error
        return compiled.operators(inputs, calls)


class OpenVinoBf16(OpenVino):
    """OpenVINO with bfloat16 for what is not computed with integers: faster where the CPU multiplies it, and less exact."""

    about = "int8 as integers, the rest in bfloat16: 8 significant bits"
    precision = "bf16"


class Compiled(Program):
    """A model that OpenVINO has read; it is compiled for each shape of inputs, since kernels are chosen by shape."""

    def __init__(self, core: Any, model: Any, precision: str, threads: int, clocked: bool = False) -> None:
        self._core, self._model = core, model
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": clocked,
            **({"LP_TRANSFORMS_MODE": "NO"} if sums_overflow() else {}),  # nothing is computed with integers then
        }
        self.inputs = tuple(value.any_name for value in model.inputs)
        self._loose = [value.partial_shape for value in model.inputs]
        self._compiled: dict[Any, Any] = {}

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs."""
        request, feeds = self._requested(inputs)
        return lambda: list(request.infer(feeds, share_inputs=True).to_tuple())

    def operators(self, inputs: Any, calls: int) -> dict[str, float]:
        """Return the seconds of each operator, where the program was made with `clocked`."""
        request, feeds = self._requested(inputs)
        times: dict[str, list[float]] = {}
        for _ in range(calls):
            request.infer(feeds, share_inputs=True)
            for noted in request.get_profiling_info():
                times.setdefault(noted.node_name, []).append(noted.real_time.total_seconds())
        return {name: fastest_quarter(found) for name, found in times.items()}

    def _requested(self, inputs: Any) -> tuple[Any, dict[int, Any]]:
        """A request that has answered these inputs once, and the inputs as it takes them."""
        arrays = list(by_name(self.inputs, inputs).values())
        try:
            request = self._for_shapes(tuple(array.shape for array in arrays)).create_infer_request()
            feeds = dict(enumerate(arrays))
            request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            wanted = ", ".join(
                f"{value.any_name} {value.element_type.get_type_name()}{shape}"
                for value, shape in zip(self._model.inputs, self._loose, strict=True)
            )
            given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)
            raise DataError(f"the model takes {wanted} and was given {given}: {first_line(error)}") from error
        return request, feeds

    def audit(self) -> dict[str, str]:
        """Return the precision of each layer in the model that OpenVINO has compiled last."""
        if not self._compiled:
            self._for_shapes(None)
        found: dict[str, str] = {}
        for node in list(self._compiled.values())[-1].get_runtime_model().get_ordered_ops():
            facts = {
                key: str(node.get_rt_info()[key].astype(str))
                for key in ("originalLayersNames", "runtimePrecision", "layerType")
            }
            for name in facts["originalLayersNames"].replace(_BEFORE_BIAS, "").split(","):
                if facts["layerType"] not in (
                    "Const",
                    "Reorder",
                ):  # a fused subgraph does not say how it computes inside
                    runs = UNKNOWN if facts["layerType"] == "Subgraph" else _PRECISIONS.get(facts["runtimePrecision"])
                    found.setdefault(name, runs or UNKNOWN)
        # weights may be stored as bytes then, which is what OpenVINO tells
        return dict.fromkeys(found, FLOAT32) if sums_overflow() else found

    def _for_shapes(self, shapes: Any) -> Any:
        """The program for some shapes of the inputs, or for any."""
        if shapes not in self._compiled:
            if shapes is None or len(self._compiled) >= _MOST_SHAPES:
                shapes, wanted = None, self._loose
            else:
                wanted = shapes
            if shapes not in self._compiled:
                self._model.reshape(dict(enumerate(wanted)))
                self._compiled[shapes] = self._core.compile_model(self._model, "CPU", self._settings)
        return self._compiled[shapes]
