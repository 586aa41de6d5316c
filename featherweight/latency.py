"""Milliseconds: several models timed in turn on one thread."""

from __future__ import annotations

import copy
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from featherweight.data import Data, Inputs, example_inputs, forward
from featherweight.runtimes import Subject, find_runtime

DEFAULT = "onnxruntime"
_SPIN = 0.05  # seconds of warm-up for each candidate
_TURN = 0.01  # seconds of calls in each turn that are not timed, and of calls that are


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: the median, the quartiles around it, and of how many turns."""

    median: float
    low: float
    high: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        """Return the JSON-able form, in seconds."""
        return {"median": self.median, "low": self.low, "high": self.high, "runs": self.runs}


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 20, most: int = 2000
) -> dict[str, Latency]:
    """Time several calls in turn, so that whatever else the machine does falls on all of them alike.

    Each turn is of calls in a row, as a program in use makes them, and the first of them are not timed: they find the caches
    and the clock as some other program left them.

    Args:
        calls: by name; each is warmed up first.
        seconds: to spend on each call, about.
        least: rounds at least.
        most: rounds at most.
    """
    return {name: summary(values) for name, values in rounds(calls, seconds, least, most).items()}


def rounds(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 20, most: int = 2000
) -> dict[str, list[float]]:
    """Return the seconds of a call in each round of `interleaved`, by name, so that rounds can be paired.

    Each round has an order of its own: what ran just before leaves its code and data in the caches, which helps a sibling.

    Args:
        calls: by name; each is warmed up first.
        seconds: to spend on each call, about.
        least: rounds at least.
        most: rounds at most.
    """
    for call in calls.values():
        _timed(call, _SPIN)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)  # noqa: S311
    start = time.perf_counter()
    while (rounds := len(next(iter(times.values())))) < most:
        if rounds >= least and time.perf_counter() - start > seconds * len(calls):
            break
        draw.shuffle(order)
        for name in order:
            _timed(calls[name], _TURN)
            times[name].append(statistics.median(_timed(calls[name], _TURN)))
    return times


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of some calls in a row, one at least."""
    found: list[float] = []
    while not found or sum(found) < seconds:
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return found


def summary(values: list[float]) -> Latency:
    """Return the median and the quartiles of some seconds, two at least."""
    quartiles = statistics.quantiles(values, n=4)
    return Latency(statistics.median(values), quartiles[0], quartiles[2], len(values))


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return how many times longer the first takes: the median over paired rounds, and its 95 % interval by order statistics.

    Args:
        first: seconds of each round, of `rounds`.
        second: the same of another call.
    """
    paired = sorted(a / b for a, b in zip(first, second, strict=True))
    reach = 0.98 * math.sqrt(len(paired))
    low, high = math.floor(len(paired) / 2 - reach), math.ceil(len(paired) / 2 + reach)
    return statistics.median(paired), paired[max(0, low)], paired[min(len(paired) - 1, high)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latencies(
    candidates: Mapping[str, nn.Module | bytes], data: Data, seconds: float = 1.0, runtime: str = DEFAULT
) -> dict[str, Latency]:
    """Time models on one sample and one thread, interleaved.

    Args:
        candidates: by name: PyTorch modules (eager), or serialized ONNX models.
        data: gives the example.
        seconds: to spend on each.
        runtime: name of the one that runs the serialized models.
    """
    inputs = example_inputs(data, batch=1)
    calls: dict[str, Callable[[], object]] = {}
    for name, candidate in candidates.items():
        if isinstance(candidate, bytes):
            calls[name] = prepared(candidate, inputs, runtime)
        else:
            plain = copy.deepcopy(candidate).cpu().eval()
            calls[name] = lambda plain=plain: forward(plain, inputs)  # type: ignore[misc]
    with one_thread(), torch.inference_mode():
        return interleaved(calls, seconds)


def prepared(model: bytes, inputs: Inputs, runtime: str) -> Callable[[], object]:
    """Return a call of a serialized ONNX model on a runtime, on one thread.

    Args:
        model: weights included.
        inputs: of the call.
        runtime: its name.
    """
    found = find_runtime(runtime)
    with tempfile.TemporaryDirectory() as folder:
        return found.load(found.export(Subject(model, inputs), Path(folder))).prepared(inputs)
