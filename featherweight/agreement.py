"""How closely a runtime follows the PyTorch model on the same inputs, and which layer is the first that does not."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from featherweight.data import Inputs, forward, tensors
from featherweight.edits import module_at
from featherweight.errors import ExportError, FeatherweightError
from featherweight.integer_graph import layer_outputs
from featherweight.runtimes import Runtime, Subject

LEAST_SQNR = 25.0  # decibels; below it an exported model does not compute what the PyTorch model computes


class Runs(Protocol):
    """Anything that computes outputs, in order, from inputs: a loaded program, an artifact."""

    def run(self, inputs: Any) -> Sequence[Any]:
        """Return the outputs, one array each."""


@dataclass(frozen=True)
class Agreement:
    """How closely an exported model follows the PyTorch model on the same inputs.

    Attributes:
        max_abs: largest absolute difference of any output.
        sqnr_db: signal to quantization noise ratio of the outputs, decibels; 200 when nothing differs.
        top1: share of samples with the same largest output along dimension 1, or None without such a dimension.
    """

    max_abs: float
    sqnr_db: float
    top1: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the JSON-able form."""
        return {"max_abs": self.max_abs, "sqnr_db": self.sqnr_db, "top1": self.top1}


def expected_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return every tensor of a model's output, in order, as float32.

    Args:
        model: in any mode; a copy runs on the CPU in evaluation mode.
        inputs: one batch.
    """
    plain = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        return [value.float() for value in tensors(forward(plain, inputs))]


def agreement(model: nn.Module, program: Runs, inputs: Inputs) -> Agreement:
    """Compare what a runtime computes with the PyTorch model.

    Args:
        model: the compressed PyTorch model.
        program: made from it.
        inputs: one batch.

    Raises:
        ExportError: they differ by more than rounding (SQNR under 25 dB).
    """
    return compare(expected_outputs(model, inputs), program.run(inputs))


def compare(expected: Sequence[Tensor], outputs: Sequence[Any]) -> Agreement:
    """Compare outputs with those of the PyTorch model.

    Args:
        expected: from `expected_outputs`.
        outputs: arrays, one for each.

    Raises:
        ExportError: they differ by more than rounding (SQNR under 25 dB), or in their number or shape.
    """
    given = [torch.from_numpy(np.array(value)).float() for value in outputs]
    if [value.shape for value in expected] != [value.shape for value in given]:
        raise ExportError(
            f"the exported model gives outputs {[list(v.shape) for v in given]}, PyTorch {[list(v.shape) for v in expected]}"
        )
    largest = max(float((a - b).abs().max()) for a, b in zip(expected, given, strict=True))
    sqnr = signal_to_noise(expected, given)
    if not sqnr >= LEAST_SQNR and not largest <= 1e-5:
        raise ExportError(
            f"the exported model disagrees with PyTorch: SQNR {sqnr:.1f} dB (at least {LEAST_SQNR}), max error {largest:.3g}"
        )
    return Agreement(_significant(largest), _significant(sqnr), _same_top(expected[0], given[0]))


def signal_to_noise(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Return the ratio of the squares of what is expected to those of the difference, in decibels, -200 to 200."""
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(expected, given, strict=True))
    signal = sum(float(a.double().square().sum()) for a in expected)
    if noise == 0:
        return 200.0
    return -200.0 if signal == 0 else max(-200.0, min(200.0, 10 * math.log10(signal / noise)))


def diverging(model: nn.Module, subject: Subject, runtime: Runtime, inputs: Inputs) -> str:
    """Return in words which layer is the first whose output differs by more than rounding, for an error message.

    The layers' outputs are made outputs of the graph, so that the runtime computes them all in one run.

    Args:
        model: the PyTorch model that the subject was made from.
        subject: what was exported.
        runtime: that disagrees; it starts from the ONNX graph.
        inputs: one batch.
    """
    if runtime.from_module:
        return "the first layer that differs is not known: this runtime does not start from the ONNX graph"
    tapped = onnx.load_model_from_string(subject.onnx)
    values = layer_outputs(tapped)
    known = {value.name for value in tapped.graph.output}
    added = [path for path, name in values.items() if name not in known]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=values[path]) for path in added)
    plain = copy.deepcopy(model).cpu().eval()
    wanted = _seen(plain, [path for path in added if "#" not in path], inputs)
    try:
        tapped = onnx.shape_inference.infer_shapes(tapped)
        with tempfile.TemporaryDirectory() as folder:
            program = runtime.load(runtime.export(Subject(tapped.SerializeToString(), inputs), Path(folder)))
            given = program.run(inputs)[-len(added) :] if added else []
    except FeatherweightError as error:
        return f"the first layer that differs is not known: {error}"
    for path, value in zip(added, given, strict=True):
        if path in wanted and wanted[path].shape == value.shape:
            reached = signal_to_noise([wanted[path]], [torch.from_numpy(np.array(value)).float()])
            if reached < LEAST_SQNR:
                return f"the first layer that differs is {path}, by {reached:.1f} dB"
    return "no layer alone differs"


def _seen(model: nn.Module, paths: list[str], inputs: Inputs) -> dict[str, Tensor]:
    """What leaves each layer, by path, where that is one tensor."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def see(_: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.setdefault(path, output.float())

        return see

    handles = [module.register_forward_hook(hook(path)) for path, module in _present(model, paths)]
    with torch.no_grad():
        forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def _present(model: nn.Module, paths: list[str]) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    return ((path, module_at(model, path)) for path in paths if path in modules)


def _same_top(expected: Tensor, given: Tensor) -> float | None:
    if expected.dim() < 2 or expected.shape[1] < 2:
        return None
    return _significant(float((expected.argmax(1) == given.argmax(1)).float().mean()))


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
