"""Which layers of a model are worth integers on a runtime: measured, with groups of layers alike taken back to floats in turn.

A quantized layer that is slower than its float form stays float. Nothing is assumed of a runtime: every form is exported,
compared with PyTorch and timed, all in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from featherweight.data import Inputs
from featherweight.delivery import NEAR, Delivery, deliver
from featherweight.errors import DataError, ExportError
from featherweight.float_graph import alike, floated
from featherweight.latency import one_thread, paired_ratio, rounds
from featherweight.runtimes import Subject, find_runtime

AS_STORED, FEWER_GRIDS, MIXED, FLOAT = "int8", "int8, fewer grids", "mixed", "float"


@dataclass
class _Trial:
    """A model on one runtime, in the forms tried so far.

    Attributes:
        runtime: its name.
        made: the forms that the runtime takes and that agree with PyTorch, by the layers that are float in them.
        folder: where they are exported.
    """

    subject: Subject
    runtime: str
    folder: Path
    expected: Sequence[Tensor]
    inputs: Inputs
    model: nn.Module | None
    groups: list[list[str]]
    made: dict[str, Delivery] = field(default_factory=dict)
    floats: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def attempt(self, form: str, floats: Sequence[str], grids: bool) -> None:
        """Export one more form; one that the runtime refuses or that disagrees is left out."""
        whole = Subject(floated(self.subject.onnx, floats, grids), self.subject.inputs)
        place = self.folder / f"form{len(self.floats)}"
        self.floats[form] = tuple(floats)
        try:
            self.made[form] = deliver(whole, self.runtime, place, self.inputs, self.expected, self.model)
        except (ExportError, DataError):
            return

    def every(self) -> list[str]:
        """Return the paths of all integer layers."""
        return [path for group in self.groups for path in group]


def settled(
    subject: Subject,
    made: Sequence[Delivery],
    folder: Path,
    inputs: Inputs,
    expected: Sequence[Tensor],
    timed_on: Inputs,
    model: nn.Module | None = None,
    seconds: float = 0.3,
) -> list[Delivery]:
    """Return the deliveries, each in the fastest of its forms: integers as stored, float, or some layers of each.

    Runtimes that do not start from the ONNX graph, and models without integer layers, have one form.

    Args:
        subject: what was delivered.
        made: from `deliveries`.
        folder: where further forms are exported.
        inputs: one batch to compare on.
        expected: every tensor of PyTorch's output for it.
        timed_on: inputs of the calls that are timed.
        model: in PyTorch, to find the first layer that differs.
        seconds: to time each form, about.
    """
    groups = alike(subject.onnx)
    trials = []
    for item in made:
        if groups and item.program is not None and not find_runtime(item.runtime).from_module:
            trial = _Trial(subject, item.runtime, folder / item.runtime, expected, inputs, model, groups)
            trial.made[AS_STORED], trial.floats[AS_STORED] = item, ()
            trial.attempt(FEWER_GRIDS, (), grids=False)
            trial.attempt(FLOAT, trial.every(), grids=False)
            trials.append(trial)
    times = _times(trials, timed_on, seconds)
    best = {trial.runtime: min(median(value) for value in times[trial.runtime].values()) for trial in trials}
    chosen = {}
    for trial in trials:
        own = times[trial.runtime]
        if best[trial.runtime] <= NEAR * min(best.values()):
            _mix(trial, own, timed_on, seconds)
            own = _times([trial], timed_on, seconds, forms=(AS_STORED, FEWER_GRIDS, MIXED, FLOAT))[trial.runtime]
        chosen[trial.runtime] = _fastest(trial, own)
    return [chosen.get(item.runtime, item) for item in made]


def _mix(trial: _Trial, times: Mapping[str, list[float]], timed_on: Inputs, seconds: float) -> None:
    """Take one group after another to the other precision than the faster extreme has, and join those that gain."""
    start = min(times, key=lambda form: median(times[form]))
    every, base, grids = trial.every(), set(trial.floats[start]), start != FEWER_GRIDS
    flipped = {}
    for place, group in enumerate(trial.groups):
        name = f"group {place}"
        flipped[name] = base ^ set(group)
        trial.attempt(name, [path for path in every if path in flipped[name]], grids)
    found = _times([trial], timed_on, seconds, forms=(start, *flipped))[trial.runtime]
    floats = set(base)
    for name, group in zip(flipped, trial.groups, strict=True):
        if name in found and paired_ratio(found[name], found[start])[2] < 1:  # faster, beyond what chance does
            floats ^= set(group)
    if floats not in (set(), set(every)):
        trial.attempt(MIXED, [path for path in every if path in floats], grids)


def _times(
    trials: Sequence[_Trial], timed_on: Inputs, seconds: float, forms: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, of all forms of all trials in turn: by runtime and form."""
    calls: dict[tuple[str, str], Callable[[], object]] = {
        (trial.runtime, form): item.program.prepared(timed_on)
        for trial in trials
        for form, item in trial.made.items()
        if item.program is not None and (not forms or form in forms)
    }
    if not calls:
        return {}
    with one_thread(), torch.inference_mode():
        measured = rounds({f"{runtime}\n{form}": call for (runtime, form), call in calls.items()}, seconds)
    found: dict[str, dict[str, list[float]]] = {}
    for runtime, form in calls:
        found.setdefault(runtime, {})[form] = measured[f"{runtime}\n{form}"]
    return found


def _fastest(trial: _Trial, times: Mapping[str, list[float]]) -> Delivery:
    """The fastest form, which says what was tried."""
    form = min(times, key=lambda name: median(times[name]))
    tried = {name: median(values) for name, values in times.items()}
    return replace(trial.made[form], form=form, kept_float=trial.floats[form], tried=tried)


__all__ = ["settled"]
