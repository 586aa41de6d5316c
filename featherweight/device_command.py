"""A target that is not this machine: a command of the user's times an exported file there."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featherweight.data import Inputs
from featherweight.errors import ExportError, RecipeError, closest
from featherweight.latency import DEFAULT
from featherweight.runtimes import Subject, find_runtime
from featherweight.runtimes.onnxruntime import Session
from featherweight.runtimes.protocol import by_name

DEVICE = "device"  # what its seconds are called in a report, where others go by the name of a runtime
_PLACES = ("model", "inputs")
_PLACE = re.compile(r"\{(\w+)\}")
_PATIENCE = 900.0  # seconds that one command may take, the copying to the device with it
_WANTED = 'The last line it prints must be the seconds of one call, such as 0.0042 or {"seconds": 0.0042}'


@dataclass(frozen=True)
class DeviceCommand:
    """A command that times a model elsewhere: called with serialized ONNX and the inputs of a call, it gives seconds.

    Attributes:
        text: the command, split as a shell would but run without one. `{model}` in it becomes the path of the exported file,
            `{inputs}` that of an `.npz` of the inputs by name.
        runtime: whose export the file is.

    Raises:
        RecipeError: the text cannot be split, names no program that is here, lacks `{model}` or has another placeholder.
    """

    text: str
    runtime: str = DEFAULT

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.text)
        except ValueError as error:
            raise RecipeError(f"the device command {self.text!r} cannot be split into words: {error}") from error
        named = {place for word in words for place in _PLACE.findall(word)}
        for place in sorted(named - set(_PLACES)):
            raise RecipeError(
                f"the device command {self.text!r} has an unknown placeholder {{{place}}}.{closest(place, _PLACES)}"
            )
        if "model" not in named:
            raise RecipeError(
                f"the device command {self.text!r} has no {{model}}, the path of the file to time; "
                "write for example 'python time_model.py {model} {inputs}'"
            )
        if shutil.which(words[0]) is None:
            raise RecipeError(
                f"the device command {self.text!r}: there is no program {words[0]!r} here; give one on the PATH, or its path"
            )

    @property
    def note(self) -> str:
        """What a reader of a report must know of its seconds."""
        return (
            f"The latency of the budget and of the steps is that of the device, as {self.text!r} printed it; "
            "latencies by runtime are of this machine."
        )

    def __call__(self, model: bytes, inputs: Inputs) -> float:
        """Return the seconds of one call of a model on the device.

        Args:
            model: serialized ONNX, weights included.
            inputs: of the call, one sample.

        Raises:
            ExportError: the runtime cannot express the model; or the command does not start or end in time, fails, or prints no
                positive number.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = {"inputs": Path(folder) / "inputs.npz"}
            np.savez(paths["inputs"], **by_name(Session(model).inputs, inputs))  # type: ignore[arg-type]
            paths["model"] = find_runtime(self.runtime).export(Subject(model, inputs), Path(folder))
            said = self._ran([_PLACE.sub(lambda place: str(paths[place[1]]), word) for word in shlex.split(self.text)])
        try:
            return _seconds(_last_line(said.stdout))
        except ValueError as error:
            raise self._failed(f"ended with exit status 0 and {error}", said.stderr) from error

    def _ran(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """What a program printed that ended well, in time."""
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
                check=False,
            )
        except OSError as error:
            raise self._failed(f"does not start ({error.strerror or error})") from error
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"was not done after {_PATIENCE:g} seconds", error.stderr) from error
        if done.returncode:
            raise self._failed(f"ended with exit status {done.returncode}", done.stderr)
        return done

    def _failed(self, how: str, stderr: str | bytes | None = None) -> ExportError:
        """The error that says how the command failed, and what would work."""
        said = _last_line(stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or "")
        return ExportError(
            f"the device command {self.text!r} {how}; "
            f"{f'its last word on stderr: {said}' if said else 'stderr is empty'}. {_WANTED}. "
            "What was trained and timed so far is kept beside the output path: put it right and resume (--resume)"
        )


def _last_line(text: str) -> str:
    """The last line that is not blank, at most 300 characters of it; empty where there is none."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


def _seconds(line: str) -> float:
    """Read what a command printed last.

    Raises:
        ValueError: it is no positive number, alone or as `{"seconds": ...}`.
    """
    try:
        told = float(str(json.loads(line)["seconds"] if line.startswith("{") else line))  # no bool, which is a number
    except (ValueError, KeyError):
        told = math.nan
    if not 0 < told < math.inf:
        raise ValueError(f"printed {line!r}, which is no positive number of seconds" if line else "printed nothing")
    return told
