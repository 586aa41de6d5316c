"""`measure`, `inspect` and `verify` of whole models and files: facts by name, ready for JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from featherweight import measurement as measuring
from featherweight.artifact import Artifact, load
from featherweight.data import Data, Task, complete
from featherweight.edits import to_json
from featherweight.errors import ExportError
from featherweight.latency import interleaved, latencies, one_thread
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.onnxruntime import audit
from featherweight.scoring import evaluate


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


def measure_file(path: Path, task: Task | None = None) -> dict[str, Any]:
    """Return a file's bytes, its facts and its latency on one sample of noise; with a task, its test score too.

    Raises:
        ArtifactError: the file is damaged or holds no graph.
        DataError: the task's inputs do not fit the file.
    """
    artifact: Artifact = load(path)
    feeds = noise(artifact)
    with one_thread():
        timed = interleaved({"onnxruntime": lambda: artifact.run(feeds)})
    facts = inspect_artifact(artifact)
    kept: dict[str, Any] = {
        key: facts[key] for key in ("file_bytes", "original_bytes", "parameters", "nonzero", "macs") if key in facts
    }
    found: dict[str, Any] = dict(kept)
    found |= {
        "latency": {"onnxruntime": timed["onnxruntime"].to_dict()},
        "machine": measuring.machine(),
    }
    if task is not None:
        score = measuring.score_of(artifact.run, task.model, complete(task.data)[0])
        found |= {"score": score.value, "score_name": score.name}
    return found


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
