"""ONNX Runtime with LSTMs of integers, whose inputs are rounded as they come."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from featherweight.runtimes.onnxruntime import OnnxRuntime
from featherweight.runtimes.protocol import Subject, written
from featherweight.runtimes.recurrent_integers import with_integers


class OnnxRuntimeDynamic(OnnxRuntime):
    """ONNX Runtime on the CPU, with its own operator for LSTMs of integer weights: other runtimes do not read the file."""

    about: ClassVar[str] = "LSTMs of integer weights as integers, their inputs rounded as they come"
    clocked: ClassVar[bool] = False  # it does not take the original, which a latency is relative to

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.onnx` with the operator `DynamicQuantizeLSTM`.

        Raises:
            ExportError: the model has no LSTM of integer weights, so that it is no different on `onnxruntime`.
        """
        return written(folder / "model.onnx", with_integers(subject.onnx))
