"""Settings that give tensors or layers numbers of their own, by patterns of their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

from featherweight.errors import RecipeError, closest


def read_own(text: str, allowed: Callable[[float], bool], wanted: str) -> dict[str, float]:
    """Return numbers by pattern of a name, of text such as `"0.weight 0.5, layer1.* 0.9"`.

    Args:
        text: pairs of a pattern and a number, with commas between them.
        allowed: says whether a number may be.
        wanted: what a pair has to be, for the error.

    Raises:
        RecipeError: a pair is none, or its number is not allowed.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, number = part.rpartition(" ")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not pattern or not allowed(value):
            raise RecipeError(f"{part!r} is no {wanted}")
        found[pattern.strip()] = value
    return found


def matched(own: dict[str, float], names: Iterable[str], what: str) -> dict[str, float]:
    """Return the number of each name that a pattern matches, the first that does.

    Args:
        own: of `read_own`.
        names: of the tensors or layers in scope.
        what: they are, for the error.

    Raises:
        RecipeError: a pattern matches none.
    """
    names = list(names)
    for pattern in own:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(f"no {what} in scope is called {pattern!r}.{closest(pattern, names)}")
    return {
        name: next(number for pattern, number in own.items() if fnmatch.fnmatchcase(name, pattern))
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in own)
    }
