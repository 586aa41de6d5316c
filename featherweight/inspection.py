"""`measure`, `inspect` and `verify` of whole models and files: facts by name, ready for JSON."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import measurement as measuring
from featherweight.agreement import expected_outputs
from featherweight.allocation import PREPARED, Tables, tables_of
from featherweight.artifact import Artifact, load
from featherweight.data import Data, Inputs, Task, batches, complete, example_inputs
from featherweight.delivery import Delivery, candidates, deliver, deliveries, first_sample, timed
from featherweight.edits import to_json
from featherweight.errors import ExportError
from featherweight.latency import latencies
from featherweight.portable import assemble, export_graph, export_program
from featherweight.precision import settled
from featherweight.running import run
from featherweight.runtimes import Subject, find_format
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.scoring import evaluate
from featherweight.technique import Context, Report


def analyze_task(model: nn.Module, data: Data, progress: Report = lambda message, done: None) -> Tables:
    """Return the damage and cost tables of a model, its batch norms folded and its attention split, as the allocation reads them.

    Args:
        model: not changed.
        data: with one loader at least.
        progress: called with a message and the share done.

    Raises:
        DataError: the data cannot be used.
    """
    complete_data, _ = complete(data)
    context = Context(data=complete_data, report=progress)
    prepared, _ = run(PREPARED, model, context)
    return tables_of(prepared, context)


def measure_task(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return what a PyTorch model costs and how good it is on the test data.

    Args:
        model: not changed.
        data: with one loader at least; the score is taken from `test`, or from what is split off for it.

    Raises:
        DataError: the data cannot be used.
        ExportError: the model cannot be exported to ONNX.
    """
    data, notes = complete(data)
    found = measuring.with_score(measuring.structure(model, data), evaluate(model, data, "test"))
    whole = assemble(export_graph(model, data), model.state_dict())
    timed = latencies({"pytorch": model, "onnxruntime": whole}, data)
    facts = {
        "original_bytes": found.size_bytes,
        "parameters": found.params,
        "nonzero": found.nonzero,
        "macs": found.macs,
    }
    return {
        **facts,
        "uncounted": dict(found.uncounted),
        "score": found.score,
        "score_name": found.score_name,
        "score_error": found.score_error,
        "latency": {name: item.to_dict() for name, item in timed.items()},
        "peak_bytes": measuring.peak_bytes(whole, data),
        "machine": measuring.machine(),
        "notes": list(notes),
    }


def measure_file(path: Path, task: Task | None = None, runtime: str = "onnxruntime") -> dict[str, Any]:
    """Return a file's bytes, its facts and its latency on one sample; with a task, its test score too.

    Args:
        path: the file.
        task: whose class and data it was made from; without it, noise is the sample.
        runtime: a name of `runtimes.RUNTIMES`, or `auto` for those that are installed, timed in turn.

    Raises:
        ArtifactError: the file is damaged or holds no graph.
        DataError: the task's inputs do not fit the file.
        ExportError: the runtime is unknown or missing, cannot express the model, or disagrees with it.
    """
    artifact: Artifact = load(path)
    found = delivered(artifact, task, runtime)
    facts = inspect_artifact(artifact)
    kept: dict[str, Any] = {
        key: facts[key] for key in ("file_bytes", "original_bytes", "parameters", "nonzero", "macs") if key in facts
    }
    made: dict[str, Any] = dict(kept)
    made |= {
        "fastest": found[0].runtime,
        "latency": {item.runtime: item.latency.to_dict() for item in found if item.latency is not None},
        "runtimes": [item.to_dict() for item in found],
        "machine": measuring.machine(),
    }
    if task is not None:
        score = measuring.score_of(artifact.run, task.model, complete(task.data)[0])
        made |= {"score": score.value, "score_name": score.name}
    return made


def delivered(artifact: Artifact, task: Task | None, runtime: str) -> list[Delivery]:
    """Return a file on a runtime, or on all that `auto` tries, timed in turn; the fastest first.

    Of `auto`, each runtime computes with integers the layers that are faster so, and the others with floats.

    Raises:
        ExportError: the runtime is unknown or missing, or no runtime computes what the file says.
    """
    whole, inputs, expected, model = _stated(artifact, task)
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "auto":
            made = deliveries(whole, candidates(whole), Path(folder), inputs, expected, model)
            made = settled(whole, made, Path(folder), inputs, expected, first_sample(inputs), model)
        else:
            made = [deliver(whole, runtime, Path(folder), inputs, expected, model)]
        made = timed(made, first_sample(inputs))
    if made[0].program is None:
        raise ExportError(f"{artifact.path} runs nowhere here: " + "; ".join(item.reason for item in made))
    return made


def export_file(path: Path, to: str, folder: Path, task: Task | None = None) -> dict[str, Any]:
    """Export a file to a runtime's format, and return how closely the result agrees and how each layer is computed.

    Args:
        path: the file.
        to: a format, a name of `runtimes.FORMATS`.
        folder: where the exported files go.
        task: whose class and data it was made from: wanted by runtimes that start from PyTorch, and to compare with it.

    Raises:
        ArtifactError: the file is damaged or holds no graph.
        ExportError: as `delivery.deliver`.
    """
    artifact: Artifact = load(path)
    name = find_format(to)
    whole, inputs, expected, model = _stated(artifact, task)
    made = deliver(whole, name, folder, inputs, expected, model)
    return {
        **made.to_dict(),
        "compared_with": "PyTorch on calibration data" if model is not None else "the file's own graph on noise",
    }


def _stated(artifact: Artifact, task: Task | None) -> tuple[Subject, Inputs, list[Tensor], nn.Module | None]:
    """What runtimes are given, a batch to compare on, the outputs to expect, and the PyTorch model if there is one."""
    if task is None:
        inputs = {name: torch.from_numpy(value) for name, value in noise(artifact, batch=2).items()}
        plain = Session(artifact.onnx_bytes(), optimized=False)
        expected = [torch.from_numpy(value).float() for value in plain.run(inputs)]
        return Subject(artifact.onnx_bytes(), inputs), inputs, expected, None
    model, data = artifact.into(task.model), complete(task.data)[0]
    read, _ = next(batches(data.calibrate, "calibrate"))
    whole = Subject(artifact.onnx_bytes(), example_inputs(data, batch=1), export_program(model, data))
    return whole, read, expected_outputs(model, read), model


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """Return what a file says of itself and where its bytes go."""
    elements = sum(value.numel() for value in artifact.state.values())
    facts = {"file_bytes": len(artifact.to_bytes(graph=artifact.graph is not None)), **artifact.facts}
    facts.setdefault("parameters", elements)
    return {**facts, "bytes_by_part": artifact.bytes_by_part(), "edits": to_json(artifact.edits)}


def verify_artifact(artifact: Artifact) -> dict[str, Any]:
    """Check what loading has not: the graph assembles, runs on noise, and gives finite outputs twice alike.

    Raises:
        ArtifactError: the file holds no graph, or its graph asks for tensors that are not there.
        ExportError: the model does not load, or gives outputs that are not finite or not repeatable.
    """
    feeds = noise(artifact)
    first, second = artifact.run(feeds), artifact.run(feeds)
    if not all(np.isfinite(value).all() for value in first if np.issubdtype(value.dtype, np.floating)):
        raise ExportError(f"{artifact.path} gives outputs that are not finite on noise")
    if not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        raise ExportError(f"{artifact.path} gives different outputs for the same input")
    return {
        "file": str(artifact.path),
        "verified": True,
        "tensors": len(artifact.state),
        "outputs": {name: list(value.shape) for name, value in zip(artifact.session().outputs, first, strict=True)},
        "operators": audit(artifact.onnx_bytes()),
    }


def noise(artifact: Artifact, batch: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Return seeded noise for every input of a file, one sample: normal for floats, zeros for integers.

    Raises:
        ArtifactError: the file holds no graph.
    """
    rng = np.random.default_rng(0)
    feeds = {}
    for name, (dtype, shape) in artifact.session().signature().items():
        sizes = [size if isinstance(size, int) else batch for size in shape]
        feeds[name] = (
            rng.standard_normal(sizes).astype(dtype) if np.issubdtype(dtype, np.floating) else np.zeros(sizes, dtype)
        )
    return feeds
