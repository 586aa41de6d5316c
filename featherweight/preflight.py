"""The door that a model and its data come in by, and what is refused there: what does not fit, a device, a path, a foreign checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.budget import Budget
from featherweight.data import Data, batches, complete, example_inputs, forward, select_output
from featherweight.device_command import DeviceCommand
from featherweight.edits import private_copy
from featherweight.errors import ArtifactError, DataError, ExportError, FeatherweightError, ModelError, RecipeError
from featherweight.latency import DEFAULT
from featherweight.modes import evaluating
from featherweight.runtimes import RUNTIMES, find_runtime
from featherweight.scoring import loss_function, score_function
from featherweight.technique import Technique
from featherweight.techniques import together

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """What one compression is asked for.

    Attributes:
        budget: what to meet.
        recipe: what to do, or None to search.
        trials: most candidates that a search trains.
        seed: of every random draw.
        device: where training runs.
        out: where the file goes, or None.
        resume: whether to continue a killed run.
        latency_table: file of measured seconds, or None for one of this run's own.
        runtime: whose latency the budget means.
        epochs: most of a candidate's training, or None for what the network's size allows.
        clock: times whole models where the budget's latency is meant, or None for this machine.

    Raises:
        RecipeError: `epochs` is less than 2: one heals what was cut, and one what was rounded.
    """

    budget: Budget
    recipe: Technique | None
    trials: int
    seed: int
    device: torch.device
    out: Path | None
    resume: bool
    latency_table: Path | None
    runtime: str = DEFAULT
    epochs: int | None = None
    clock: DeviceCommand | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 2:
            raise RecipeError(f"epochs={self.epochs} must be at least 2: one heals what was cut, one what was rounded")

    @property
    def workspace(self) -> Path:
        """The folder of checkpoints beside the file."""
        if self.out is None:
            raise ArtifactError("without an output path there is no folder to keep checkpoints in")
        return self.out.with_name(self.out.name + ".run")

    def to_json(self) -> dict[str, Any]:
        """Return what a resumed run must have asked for too."""
        facts = {"budget": str(self.budget), "recipe": str(self.recipe), "trials": self.trials}
        facts["epochs"] = self.epochs
        facts["device_command"] = None if self.clock is None else self.clock.text
        return {**facts, "seed": self.seed, "device": str(self.device), "runtime": self.runtime}


def opened(model: nn.Module, data: Data) -> tuple[nn.Module, Data, tuple[str, ...]]:
    """Return a private copy of a model, its data with what was missing, and notes; what does not fit is refused before any work.

    Args:
        model: not changed; weights that it computes anew at each forward are plain ones in the copy.
        data: with one loader at least.

    Raises:
        ModelError: the forward fails on the example, weights are of 16 bits, or the model cannot be copied.
        DataError: a loader is empty, has NaN, labels are out of range, or loss and score cannot take the output.
    """
    whole, notes = complete(data)
    copied, baked = private_copy(model)
    _check(copied, whole)
    plain = (f"{name} was computed from other tensors at each forward: it is a plain weight now" for name in baked)
    return copied, whole, (*notes, *plain)


def _check(model: nn.Module, data: Data) -> None:
    """Raise where a model and data do not fit each other."""
    inputs = example_inputs(data)
    for name, weight in model.named_parameters():
        if weight.dtype in _HALVES:
            raise ModelError(
                f"{name} of {type(model).__name__} is {str(weight.dtype).removeprefix('torch.')}, which training rounds away and "
                "few runtimes compute in: give model.float(), and float32 inputs"
            )
    with evaluating(model):
        try:
            output = forward(model, inputs)
        except Exception as error:  # whatever the user's forward raises
            raise ModelError(
                f"{type(model).__name__} does not run on Data.example: {str(error).splitlines()[0]}"
            ) from error
        if isinstance(data.score, str) or isinstance(data.loss, str) or data.output is not None:
            select_output(output, data.output)
        loss, (score, _, _) = loss_function(data), score_function(data)
        for split in ("train", "validate", "test"):
            if getattr(data, split) is None:
                continue
            batch, target = next(iter(batches(getattr(data, split), split)))
            if target is None:
                continue
            try:
                given = forward(model, batch)
                if data.step is None:
                    loss(given, target)
                score(given, target)
            except FeatherweightError as error:
                error.add_note(f"on the first batch of Data.{split}")
                raise
            except Exception as error:  # whatever the user's loss, score or forward raises
                raise DataError(
                    f"the first batch of Data.{split} does not go through model, loss and score: {error}"
                ) from error


def find_device(name: str) -> torch.device:
    """Return a device by name, this process's own where several train together, tried with one small tensor.

    Raises:
        ModelError: it is not there.
    """
    try:
        device = together.own(torch.device(name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {name!r} is not there: {str(error).splitlines()[0]}; use cpu, or another that torch finds"
        ) from error
    return device


def find_clocked(name: str) -> str:
    """Return the name of a runtime that a latency budget can be kept on.

    Raises:
        ExportError: there is no such runtime, its package is missing, or it does not time single operators.
    """
    runtime = find_runtime(name)
    if not runtime.clocked:
        able = ", ".join(other for other, one in RUNTIMES.items() if one.clocked)
        raise ExportError(
            f"runtime {name!r} does not time single operators, so no budget can be kept there; use {able}"
        )
    runtime.need()
    return name


def find_clock(command: str | None, runtime: str, budget: Budget) -> DeviceCommand | None:
    """Return what times models on another machine; None where there is no command.

    Args:
        command: as of `DeviceCommand`.
        runtime: name of the one that exports.
        budget: what the seconds are for.

    Raises:
        RecipeError: the budget has no latency limit, or the command cannot be used.
    """
    if command is None:
        return None
    if budget.limit("latency") is None:
        raise RecipeError(
            f"the device command {command!r} times what a latency limit is about, and the budget {budget} has none: "
            "add one such as latency<=50%, or leave the command out"
        )
    return DeviceCommand(command, runtime)


def writable(out: str | Path | None, example: str = "model.fw") -> Path | None:
    """Return the output path, refused before hours of work when it cannot be written; None stays None.

    Args:
        out: the path of a file, new or to be replaced.
        example: a file name to suggest when it is a folder.

    Raises:
        ArtifactError: it is a folder, or its folder is missing or read-only.
    """
    if out is None:
        return None
    path = Path(out)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: give the name of a file, such as {path / example}")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def open_workspace(folder: Path, request: Request) -> None:
    """Start an empty folder of checkpoints for a request, or continue in the one that a killed run left.

    Raises:
        RecipeError: there is nothing to resume, or it belongs to another request.
    """
    state = folder / "request.json"
    if request.resume:
        if not state.exists():
            raise RecipeError(f"there is nothing to resume in {folder}: leave --resume out to start")
        try:
            stored = {**json.loads(state.read_text())}
        except (OSError, ValueError, TypeError) as error:
            raise RecipeError(f"{state} cannot be read: leave --resume out to start afresh") from error
        for key, value in request.to_json().items():
            if stored.get(key) != value:
                raise RecipeError(
                    f"{folder} belongs to a run with {key}={stored.get(key)!r}, not {value!r}: resume with the same"
                )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps(request.to_json()))
