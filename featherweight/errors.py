"""What can go wrong, in one tree; every message names the place, the value and what would work.

FeatherweightError
 ├ DataError      the data cannot be used so (loader, batch, shape or value in the message)
 ├ RecipeError    the request makes no sense (unknown name, value out of range, wrong order, path that matches nothing)
 ├ ModelError     this model cannot be edited or run so (path, type and shape in the message)
 │  └ DivergedError  its training did (epoch, batch and learning rate in the message)
 ├ BudgetError    the budget cannot be read, or nothing met it (then it carries the closest artifact)
 ├ ArtifactError  the file is damaged, foreign or of another version, or cannot be written
 └ ExportError    the runtime cannot express the model, disagrees with it, or is not installed (the message has the pip line)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FeatherweightError(Exception):
    """Anything Featherweight refuses to do; the parent of every error it raises on purpose."""


class DataError(FeatherweightError):
    """The data cannot be used so: the message names the loader, the batch and the value."""


class RecipeError(FeatherweightError):
    """The request makes no sense: an unknown name, a value out of range, steps in the wrong order."""


class ModelError(FeatherweightError):
    """The model cannot be edited or run so: the message names the path, the type and the shape."""


class DivergedError(ModelError):
    """The loss of a training stopped being finite: the message names the epoch, the batch and the learning rate."""


class BudgetError(FeatherweightError):
    """The budget cannot be read, or nothing met it; then `artifact` is the closest one found."""

    def __init__(self, message: str, artifact: Any = None) -> None:
        super().__init__(message)
        self.artifact = artifact


class ArtifactError(FeatherweightError):
    """The file is damaged, foreign, of another version, or cannot be written."""


class ExportError(FeatherweightError):
    """The runtime cannot express the model, disagrees with it, or is not installed."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known name, and all of them when they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names)}." if len(names) <= 24 else hint


def need(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package, or say which extra brings it.

    Args:
        module: dotted name to import, for example `"openvino"`.
        extra: the extra of this package that installs it.
        purpose: what it is wanted for, in words, for the message.

    Raises:
        ExportError: the package is not installed; the message has the pip line.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ExportError(f"{purpose} needs the package {package!r}: pip install 'featherweight[{extra}]'") from error
