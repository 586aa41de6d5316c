"""A model on the runtimes that are installed: exported, compared with PyTorch, audited, timed in turn; the fastest is `auto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.agreement import Agreement, compare, diverging
from featherweight.data import Data, Inputs, example_inputs, samples
from featherweight.errors import DataError, ExportError
from featherweight.latency import Latency, interleaved, one_thread
from featherweight.portable import assemble, export_graph, export_program
from featherweight.runtimes import RUNTIMES, Program, Subject, find_runtime, installed

Call = Callable[[], object]
NEAR = 1.15  # times the milliseconds of the fastest: within, a difference may be luck


@dataclass(frozen=True)
class Delivery:
    """A model on one runtime, or why it is not there.

    Attributes:
        runtime: its name.
        path: what was exported.
        file_bytes: of what was exported.
        program: what was loaded from there.
        agreement: with the PyTorch model.
        layers: one row a layer: `path`, `asked` and `runs`, each `int8`, `bf16` or `float32`.
        latency: of one call; None until it is timed.
        form: in which precision it is: `int8` as stored, or what `precision.settled` found faster.
        kept_float: the integer layers that are computed with floats, because that is faster.
        tried: seconds of a call in each form that was timed.
        reason: why there is no program; empty when there is.
    """

    runtime: str
    path: Path | None = None
    file_bytes: int | None = None
    program: Program | None = None
    agreement: Agreement | None = None
    layers: tuple[Mapping[str, str], ...] = ()
    latency: Latency | None = None
    form: str = ""
    kept_float: tuple[str, ...] = ()
    tried: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def missed(self) -> list[Mapping[str, str]]:
        """Return the layers that were to be int8 and are not."""
        return [row for row in self.layers if row["asked"] == "int8" and row["runs"] != "int8"]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        if self.reason:
            return {"runtime": self.runtime, "reason": self.reason}
        counts: dict[str, int] = {}
        for row in self.layers:
            counts[row["runs"]] = counts.get(row["runs"], 0) + 1
        return {
            "runtime": self.runtime,
            "file": str(self.path),
            "file_bytes": self.file_bytes,
            "agreement": self.agreement.to_dict() if self.agreement else None,
            "layers": counts,
            "asked_int8_but_not": [dict(row) for row in self.missed()],
            **(
                {"form": self.form, "kept_float": list(self.kept_float), "tried": dict(self.tried)} if self.form else {}
            ),
            **({"latency": self.latency.to_dict()} if self.latency else {}),
        }


def size(path: Path) -> int:
    """Return the bytes of an exported file, and of what lies beside it under the same name."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.is_file())


def subject(model: nn.Module, data: Data) -> Subject:
    """Return a PyTorch model as runtimes take it.

    Args:
        model: any module, on the CPU; not changed.
        data: gives the example.

    Raises:
        ExportError: it cannot be exported.
    """
    whole = assemble(export_graph(model, data), model.state_dict())
    return Subject(whole, example_inputs(data, batch=1), export_program(model, data))


def deliver(
    subject: Subject,
    name: str,
    folder: Path,
    inputs: Inputs,
    expected: Sequence[Tensor],
    model: nn.Module | None = None,
) -> Delivery:
    """Export a model to one runtime, compare its outputs with PyTorch's, and audit its layers.

    Args:
        subject: the model.
        name: of the runtime.
        folder: where the exported files go.
        inputs: one batch to compare on.
        expected: every tensor of PyTorch's output for it.
        model: in PyTorch, to find the first layer that differs.

    Raises:
        ExportError: the runtime is unknown or not installed, cannot express the model, or disagrees with it; the message
            names the first layer that differs.
        DataError: the inputs do not fit the model.
    """
    runtime = find_runtime(name)
    path = runtime.export(subject, folder)
    program = runtime.load(path)
    try:
        agreed = compare(
            expected, _outputs(program, inputs, samples(inputs) if runtime.any_batch else samples(subject.inputs))
        )
    except ExportError as error:
        where = f"; {diverging(model, subject, runtime, inputs)}" if model is not None else ""
        raise ExportError(f"{name}: {error}{where}") from error
    runs = program.audit()
    lost = [layer for layer in subject.layers() if layer not in runs]
    unnamed = [kind for layer, kind in runs.items() if layer.startswith("?")]
    if len(lost) == len(unnamed):
        runs |= zip(lost, unnamed, strict=True)
    rows = tuple(
        {"path": layer, "asked": "int8" if asked else "float32", "runs": runs.get(layer, "unknown")}
        for layer, asked in subject.layers().items()
    )
    return Delivery(name, path, size(path), program, agreed, rows)


def _outputs(program: Program, inputs: Inputs, size: int) -> list[Any]:
    """What a program gives for a batch, `size` samples a call."""
    parts = [program.run(_part(inputs, start, size)) for start in range(0, samples(inputs), size)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _part(inputs: Any, start: int, size: int) -> Any:
    """Some samples of a batch, in the batch's structure."""
    if isinstance(inputs, Mapping):
        return {name: _part(value, start, size) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_part(value, start, size) for value in inputs)
    return inputs[start : start + size]


def deliveries(
    subject: Subject,
    names: Iterable[str],
    folder: Path,
    inputs: Inputs,
    expected: Sequence[Tensor],
    model: nn.Module | None = None,
) -> list[Delivery]:
    """Return one delivery a runtime; one that is missing, cannot express the model or disagrees says so.

    Args:
        subject: the model.
        names: of the runtimes.
        folder: each gets a folder of its own in it.
        inputs: one batch to compare on.
        expected: every tensor of PyTorch's output for it.
        model: in PyTorch, to find the first layer that differs.
    """
    made = []
    for name in names:
        try:
            made.append(deliver(subject, name, folder / name, inputs, expected, model))
        except (ExportError, DataError) as error:
            made.append(Delivery(name, reason=str(error)))
    return made


def timed(
    made: Sequence[Delivery], inputs: Inputs, seconds: float = 1.0, beside: Mapping[str, Call] | None = None
) -> list[Delivery]:
    """Return the deliveries with their latencies, called in turn on one thread; the fastest first, those without program last.

    Those near the fastest, which come first, are called anew among themselves, twice as long: calls of the slow ones between
    them slow some runtimes more than others, and a pick of many is partly luck.

    Args:
        made: from `deliveries`.
        inputs: of the call that is timed.
        seconds: to spend on each, about.
        beside: by name, calls that take turns with the near ones and do not compete: what is compared with the fastest afterwards.
    """
    calls = {item.runtime: item.program.prepared(inputs) for item in made if item.program is not None}
    latencies = _in_turn(calls, seconds)
    made = sorted((replace(item, latency=latencies.get(item.runtime)) for item in made), key=_median)
    near = sum(_median(item) <= NEAR * _median(made[0]) for item in made if item.latency)
    if near > 1:
        again = {item.runtime: calls[item.runtime] for item in made[:near]}
        latencies = _in_turn({**again, **(beside or {})}, 2 * seconds)
        made[:near] = sorted((replace(item, latency=latencies[item.runtime]) for item in made[:near]), key=_median)
    return made


def _in_turn(calls: Mapping[str, Call], seconds: float) -> dict[str, Latency]:
    if not calls:
        return {}
    with one_thread(), torch.inference_mode():
        return interleaved(calls, seconds)


def _median(item: Delivery) -> float:
    return item.latency.median if item.latency else math.inf


def first_sample(inputs: Inputs) -> Inputs:
    """Return the first sample of a batch, with its batch dimension, in the batch's structure."""
    part: Inputs = _part(inputs, 0, 1)
    return part


def candidates(subject: Subject) -> list[str]:
    """Return the names of the runtimes that `auto` tries: installed, quick to export to, and able to start from what is at hand."""
    return [
        name
        for name, runtime in RUNTIMES.items()
        if runtime.auto and installed(runtime) and (subject.program is not None or not runtime.from_module)
    ]
