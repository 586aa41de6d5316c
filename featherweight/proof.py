"""The proof: the file is written, run in a fresh process, measured beside the original, and judged."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from featherweight import measurement as measuring
from featherweight.agreement import agreement
from featherweight.artifact import Artifact, load, package
from featherweight.data import batches, example_inputs, samples
from featherweight.device_command import DEVICE
from featherweight.edits import module_at
from featherweight.errors import ArtifactError
from featherweight.integer_graph import layers
from featherweight.job import Job, Result
from featherweight.latency import DEFAULT, Latency, latencies
from featherweight.layers import QuantizedLayer
from featherweight.measurement import Measurement
from featherweight.portable import assemble
from featherweight.recipe_files import recipe_to_yaml
from featherweight.report.facts import Report
from featherweight.runtimes.protocol import INT8
from featherweight.scoring import Score, evaluate


def prove(job: Job, result: Result, trials: list[dict[str, Any]], name: str, command: str) -> Artifact:
    """Write the file, run it in a fresh process, measure it beside the original, and judge.

    Args:
        job: what was asked for, and the original.
        result: the recipe carried out.
        trials: what the search made, for the report.
        name: what the model is called in the report.
        command: how to reproduce this, for the report.

    Returns:
        the artifact as loaded back from its file, with `report`.

    Raises:
        ExportError: the exported model disagrees with PyTorch.
        ArtifactError: the file cannot be written, or scores otherwise in a fresh process.
    """
    job.progress("exporting and measuring", 0.0)
    draft = package(result.model, result.edits, {}, result.graph)
    inputs, _ = next(batches(job.data.validate, "validate"))
    agreed = agreement(result.model, draft, inputs)
    before_score = evaluate(job.model, job.data, "test")
    after_score = measuring.score_of(draft.run, job.model, job.data)
    facts = job.facts(result, before_score, after_score, agreed)
    artifact = package(result.model, result.edits, facts, result.graph)
    path = job.request.out if job.request.out is not None else job.workspace / "model.fw"
    size = artifact.save(path)
    fresh = _fresh_score(job, path)
    if abs(fresh.value - after_score.value) > 1e-9:
        raise ArtifactError(
            f"{path} scores {fresh.value} in a fresh process and {after_score.value} here: the runtime is not stable"
        )
    loaded: Artifact = load(path)
    after = replace(measuring.structure(result.model, job.data), size_bytes=size)
    before, after = measuring.with_score(job.before, before_score), measuring.with_score(after, fresh)
    before, after = _timed(job, result.model, before, after, loaded.onnx_bytes())
    verdict, parts = job.request.budget.judge(before, after), loaded.bytes_by_part()
    loaded.report = Report(
        task=name,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=measuring.machine(),
        seed=job.request.seed,
        budget=str(job.request.budget),
        verdict={**verdict.to_dict(), "met": verdict.met, "text": str(verdict)},
        before=before.to_dict(),
        after=after.to_dict(),
        agreement=agreed.to_dict(),
        recipe=recipe_to_yaml(result.recipe),
        steps=result.steps,
        parts=parts,
        layers=layer_rows(result.model, parts),
        untouched=[{"path": item.path, "step": item.step, "reason": item.reason} for item in result.untouched]
        + _not_integers(loaded),
        trials=trials,
        notes=list(job.notes),
    )
    if job.request.out is None:
        loaded.path = None
    return loaded


def _timed(
    job: Job, model: nn.Module, before: Measurement, after: Measurement, whole: bytes
) -> tuple[Measurement, Measurement]:
    """Add latency and memory, the original's and the result's taken side by side on each runtime, and on the device."""
    original, asked = assemble(job.original, job.model.state_dict()), job.request.runtime
    exported = {"original": original, "artifact": whole}
    timed = latencies({"torch": job.model, "torch now": model, **exported}, job.data)
    told = (
        {DEFAULT: timed} if asked == DEFAULT else {DEFAULT: timed, asked: latencies(exported, job.data, runtime=asked)}
    )
    if job.table.clock is not None:  # anew, like every latency of a verdict: the search chose by those in the table
        asked, inputs = DEVICE, example_inputs(job.data, batch=1)
        seconds = {name: job.table.clock(one, inputs) for name, one in exported.items()}
        told[DEVICE] = {name: Latency(value, value, value, 1) for name, value in seconds.items()}
    return (
        replace(
            before,
            latency={**{name: found["original"] for name, found in told.items()}, "pytorch": timed["torch"]},
            peak_bytes=measuring.peak_bytes(original, job.data),
            runtime=asked,
        ),
        replace(
            after,
            latency={**{name: found["artifact"] for name, found in told.items()}, "pytorch": timed["torch now"]},
            peak_bytes=measuring.peak_bytes(whole, job.data),
            runtime=asked,
        ),
    )


def _fresh_score(job: Job, path: Path) -> Score:
    read = [inputs for inputs, _ in batches(job.data.test, "test")]
    sizes = [samples(inputs) for inputs in read]
    outputs = [torch.split(torch.from_numpy(value), sizes) for value in measuring.fresh_outputs(path, read, max(sizes))]
    parts = iter(zip(*outputs, strict=True))
    return measuring.score_of(lambda batch: next(parts), job.model, job.data)


def _not_integers(artifact: Artifact) -> list[dict[str, Any]]:
    """One row a layer that was to be computed with integers and that ONNX Runtime computes otherwise."""
    runs = artifact.session().audit()
    asked = layers(onnx.load_model_from_string(artifact.onnx_bytes()))
    return [
        {"path": path, "step": "onnxruntime", "reason": f"was to be int8, and is computed as {runs[path]} there"}
        for path, integers in asked.items()
        if integers and runs[path] != INT8
    ]


def layer_rows(model: nn.Module, parts: dict[str, int]) -> list[dict[str, Any]]:
    """One row a layer that holds tensors: kind, elements, those not zero, bits of a weight, bytes in the file."""
    owners: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        owners.setdefault(name.rpartition(".")[0], []).append((name, tensor))
    rows = []
    for path, held in owners.items():
        layer = module_at(model, path) if path else model
        rows.append(
            {
                "path": path or type(model).__name__,
                "kind": type(layer).__name__,
                "parameters": sum(tensor.numel() for _, tensor in held),
                "nonzero": sum(int(tensor.count_nonzero()) for _, tensor in held),
                "bits": layer.bits if isinstance(layer, QuantizedLayer) else 32,
                "bytes": sum(parts.get(name, 0) for name, _ in held),
            }
        )
    return rows
