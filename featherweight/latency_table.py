"""A table of measured seconds, which makes choices by time repeatable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from featherweight.data import Data, example_inputs
from featherweight.device_command import DeviceCommand
from featherweight.errors import ArtifactError
from featherweight.latency import DEFAULT, latencies, prepared
from featherweight.runtimes import find_runtime
from featherweight.runtimes.protocol import fastest_quarter

_TOGETHER = 16  # operators that are timed between two looks at the original
_LOOK = 20  # calls of the original in one of them


class LatencyTable:
    """Seconds by graph, measured once and then read: what is decided by a clock is decided the same way again.

    A candidate is timed in turn with the original, and stored as its ratio times the original's first time; so is an operator.
    Ratios are those of the faster calls: where another process shares the core, a long call is interrupted more often than a
    short one, and a ratio of medians would make whatever is shorter look faster than it is.

    With a clock, whole models take what it says, the original too; operators are timed here, and scaled to the original there.
    """

    def __init__(self, path: Path | None, runtime: str = DEFAULT, clock: DeviceCommand | None = None) -> None:
        """Read the table, or start an empty one.

        Args:
            path: of its JSON file; None keeps it in memory.
            runtime: whose seconds are read and measured; one file holds those of several.
            clock: times whole models on another machine; one file holds the seconds of several.

        Raises:
            ArtifactError: the file exists and is no latency table.
        """
        self.path, self.runtime, self.clock = path, runtime, clock
        self.seconds: dict[str, float] = {}
        if path is not None and path.exists():
            try:
                self.seconds = {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise ArtifactError(f"{path} is no latency table (a JSON object of seconds): {error}") from error

    def original(self, model: bytes, data: Data) -> float:
        """Return the original's seconds, of the whole model as serialized ONNX."""
        if self.clock is not None:
            return self._elsewhere(self.clock, model, data)
        key = self._key("original")
        if key not in self.seconds:
            self._put({key: latencies({"original": model}, data, runtime=self.runtime)["original"].median})
        return self.seconds[key]

    def candidate(self, model: bytes, original: bytes, data: Data) -> float:
        """Return a candidate's seconds, by its `form`; both models are whole."""
        if self.clock is not None:
            return self._elsewhere(self.clock, model, data)
        key = self._key(form(model))
        if key not in self.seconds:
            base = self.original(original, data)
            timed = latencies({"original": original, "candidate": model}, data, seconds=0.5, runtime=self.runtime)
            self._put({key: timed["candidate"].low / timed["original"].low * base})
        return self.seconds[key]

    def operators(
        self, graphs: Mapping[str, tuple[bytes, Any]], original: bytes, data: Data, longest: int = 1
    ) -> dict[str, float]:
        """Return the seconds of the operators that take longest in each of some graphs, as the runtime itself times them.

        Args:
            graphs: by any name: serialized ONNX, and the inputs of a call; equal ones are timed once.
            original: the whole model, called before and after every few graphs.
            data: gives its example.
            longest: how many operators of each are summed.
        """
        kind = "operator" if longest == 1 else f"{longest} operators"
        keys = {name: self._key(f"{kind} {form(graph)}") for name, (graph, _) in graphs.items()}
        missing = list({key: name for name, key in keys.items() if key not in self.seconds}.items())
        if missing:
            base, runtime = self.original(original, data), find_runtime(self.runtime)
            call = prepared(original, example_inputs(data, batch=1), self.runtime)
            for start in range(0, len(missing), _TOGETHER):
                part = missing[start : start + _TOGETHER]
                now = _look(call)
                timed = {key: sum(sorted(runtime.operators(*graphs[name]).values())[-longest:]) for key, name in part}
                scale = base / fastest_quarter(now + _look(call))
                self._put({key: seconds * scale for key, seconds in timed.items()})
        return {name: self.seconds[key] for name, key in keys.items()}

    def _elsewhere(self, clock: DeviceCommand, model: bytes, data: Data) -> float:
        key = self._key(form(model))
        if key not in self.seconds:
            self._put({key: clock(model, example_inputs(data, batch=1))})
        return self.seconds[key]

    def _key(self, name: str) -> str:
        own = name if self.runtime == DEFAULT else f"{self.runtime} {name}"
        return own if self.clock is None else f"{own} by {self.clock.text}"

    def digest(self) -> str:
        """Return the hash of the whole table, for the manifest."""
        return hashlib.sha256(json.dumps(self.seconds, sort_keys=True).encode()).hexdigest()[:16]

    def _put(self, seconds: Mapping[str, float]) -> None:
        self.seconds.update(seconds)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(self.seconds, indent=1, sort_keys=True))
            os.replace(part, self.path)


def _look(call: Callable[[], object]) -> list[float]:
    """Seconds of some calls, the first left out."""
    times = []
    for _ in range(_LOOK + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times[1:]


def form(model: bytes) -> str:
    """Return a hash of a serialized ONNX model but for the values of its weights: what its time depends on.

    Whole numbers of 64 bits count, because they are shapes and axes.
    """
    read = onnx.load_model_from_string(model)
    for tensor in read.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:
            bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(bare)
    return hashlib.sha256(read.SerializeToString(deterministic=True)).hexdigest()[:32]
