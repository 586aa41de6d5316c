"""Ready-made tasks by name, and the user's own from `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from featherweight.data import Task
from featherweight.errors import DataError, FeatherweightError, RecipeError, closest

TASKS: dict[str, tuple[str, str]] = {
    "digits": ("featherweight.tasks.digits:task", "scikit-learn's 8x8 digits and a small CNN, 151,306 parameters"),
    "lenet300": (
        "featherweight.tasks.mnist:lenet300_task",
        "MNIST and LeNet-300-100, 266,610 parameters (mnist.npz in FEATHERWEIGHT_DATA)",
    ),
    "lenet5": (
        "featherweight.tasks.mnist:lenet5_task",
        "MNIST and LeNet-5-Caffe, 431,080 parameters (mnist.npz in FEATHERWEIGHT_DATA)",
    ),
}


def find_task(name: str) -> Task:
    """Return a built-in task, or the one that a function in the user's file returns.

    Args:
        name: a key of `TASKS`, or `path/to/file.py:function`.

    Raises:
        RecipeError: the name is unknown, or the file has no such function.
        DataError: the function does not return a `Task`.
    """
    if name in TASKS:
        module, _, function = TASKS[name][0].partition(":")
        task = getattr(importlib.import_module(module), function)()
    elif ":" in name:
        task = made_by(name)
    else:
        raise RecipeError(f"unknown task {name!r}.{closest(name, TASKS)} Or your own: path/to/file.py:function")
    if not isinstance(task, Task):
        raise DataError(f"{name} returned {type(task).__name__}, not a featherweight.Task(model=..., data=...)")
    return task


def made_by(name: str) -> Any:
    """Return what a function in the user's file returns.

    Args:
        name: `path/to/file.py:function`; the function takes no argument.

    Raises:
        RecipeError: there is no such file or function.
        DataError: it failed.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"task {file}:{function}: there is no file {path.resolve()}")
    name = f"featherweight_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"task {file}:{function}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function, None)
        if not callable(made):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise RecipeError(f"task {file}:{function}: {path} has no function {function!r}.{closest(function, names)}")
        return made()
    except FeatherweightError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise DataError(f"task {file}:{function} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
