"""What a model costs and how good it is: parameters, MACs, memory in a fresh process, agreement with PyTorch."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import cpu
from featherweight.costs import count_macs, original_bytes, parameters
from featherweight.data import Data, Inputs, example_inputs, forward, rebuild, tensors
from featherweight.errors import ExportError, ModelError
from featherweight.latency import Latency
from featherweight.modes import evaluating
from featherweight.runtimes.onnxruntime import Session
from featherweight.runtimes.overflow import exact
from featherweight.runtimes.protocol import by_name
from featherweight.scoring import Score, evaluate_outputs


@dataclass(frozen=True)
class Measurement:
    """What a model costs and how good it is; what was not measured is None.

    Attributes:
        params: unique parameters and stored buffers, elements.
        nonzero: those that are not zero.
        size_bytes: the length of the file; for an original, 4 bytes an element.
        macs: multiply-adds of one call on one sample.
        uncounted: operators of which the multiply-adds could not be counted, with how often each ran.
        score: on data that no choice has seen.
        higher_is_better: direction of the score.
        latency: by runtime, for one call on one sample and one thread.
        peak_bytes: memory that loading and one call take in a fresh process.
        runtime: whose latency a budget means: a name in `latency`.
    """

    params: int
    nonzero: int
    size_bytes: int
    macs: int | None = None
    uncounted: Mapping[str, int] = field(default_factory=dict)
    score: float | None = None
    score_error: float | None = None
    score_name: str = "score"
    higher_is_better: bool = True
    latency: Mapping[str, Latency] = field(default_factory=dict)
    peak_bytes: int | None = None
    runtime: str = "onnxruntime"

    @property
    def latency_seconds(self) -> float | None:
        """Median seconds on `runtime`."""
        timed = self.latency.get(self.runtime)
        return timed.median if timed else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("latency", "uncounted")}
        return {
            **plain,
            "uncounted": dict(self.uncounted),
            "latency": {name: item.to_dict() for name, item in self.latency.items()},
        }


def structure(model: nn.Module, data: Data) -> Measurement:
    """Return the costs that need no clock: parameters, bytes at 4 an element, and MACs of one sample.

    Args:
        model: any module; run once on a copy on the CPU.
        data: gives the example.
    """
    plain = copy.deepcopy(model).cpu().eval()
    inputs = example_inputs(data, batch=2)
    cost = count_macs(lambda: forward(plain, inputs))
    params, nonzero = parameters(model)
    return Measurement(params, nonzero, original_bytes(model), cost.macs // 2, cost.uncounted)


def with_score(measurement: Measurement, score: Score) -> Measurement:
    """Return the measurement with a score in it."""
    values = {key: getattr(measurement, key) for key in measurement.__dataclass_fields__}
    error = score.error if math.isfinite(score.error) else None
    values |= {
        "score": score.value,
        "score_error": error,
        "score_name": score.name,
        "higher_is_better": score.higher_is_better,
    }
    return Measurement(**values)


def score_of(call: Callable[[Inputs], Sequence[Any]], model: nn.Module, data: Data) -> Score:
    """Return the test score of something that gives a flat list of arrays, such as `Artifact.run`.

    Args:
        call: inputs of one batch -> every tensor of the output, in order.
        model: whose output has the structure that loss and score expect; run once on the example.
        data: complete.

    Raises:
        DataError: as `evaluate_outputs`.
    """
    with evaluating(model):
        template = forward(model, example_inputs(data))
    return evaluate_outputs(
        lambda batch: rebuild(template, [torch.as_tensor(value) for value in call(batch)]), data, "test"
    )


_PEAK_PROGRAM = """
import resource, sys
from pathlib import Path
import numpy, onnxruntime
model, feeds = sys.argv[1], dict(numpy.load(sys.argv[2]))
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 3
status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
def kilobytes(key):
    return int(status.read_text().partition(key + ":")[2].split()[0])
try:
    reset.write_text("5")
    before = kilobytes("VmRSS")
except OSError:
    status, before = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)
after = kilobytes("VmHWM") if status else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * (1 if sys.platform == "darwin" else 1024))
"""


def peak_bytes(model: bytes, data: Data) -> int:
    """Return by how many bytes a fresh process grows when it loads a serialized ONNX model and runs one sample.

    Raises:
        ExportError: the process failed.
    """
    feeds = by_name(Session(model).inputs, example_inputs(data, batch=1))
    with tempfile.TemporaryDirectory() as folder:
        path, inputs = Path(folder) / "model.onnx", Path(folder) / "inputs.npz"
        path.write_bytes(exact(model))
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, "-c", _PEAK_PROGRAM, str(path), str(inputs)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ExportError(
            f"measuring memory failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    return int(done.stdout)


_TOLD = frozenset({"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16"})


def machine() -> dict[str, Any]:
    """Return what a figure's reader must know of this machine: CPU, its integer instructions, versions, threads."""
    import platform

    import onnxruntime

    return {
        "cpu": cpu.name(),
        "features": sorted(cpu.instructions() & _TOLD),
        "threads": 1,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def fresh_outputs(path: Path, inputs: list[Inputs], batch: int) -> list[np.ndarray[Any, Any]]:
    """Return the outputs of a file run by the command line in a fresh process, all batches joined along dimension 0.

    Args:
        path: the `.fw` file.
        inputs: batches.
        batch: samples a call.

    Raises:
        ModelError: the process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **_joined(inputs))  # type: ignore[arg-type]
        command = [
            sys.executable,
            "-m",
            "featherweight",
            "run",
            str(path),
            "--input",
            str(given),
            "--output",
            str(taken),
        ]
        done = subprocess.run([*command, "--batch", str(batch), "--json"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(f"{path} does not run in a fresh process: {(done.stderr or done.stdout).strip()[-400:]}")
        order = json.loads(done.stdout)["outputs"]
        with np.load(taken) as outputs:
            return [outputs[name] for name in order]


def _joined(inputs: list[Inputs]) -> dict[str, np.ndarray[Any, Any]]:
    """All batches joined along dimension 0: a flat dict by its names, whose order is free, anything else by numpy's."""
    first = inputs[0]
    if isinstance(first, Mapping) and all(isinstance(value, Tensor) for value in first.values()):
        return {str(name): np.concatenate([_array(batch[name]) for batch in inputs]) for name in first}  # type: ignore[index, call-overload]
    columns = zip(*([_array(value) for value in tensors(batch)] for batch in inputs), strict=True)
    return {f"arr_{place}": np.concatenate(column) for place, column in enumerate(columns)}


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy()
