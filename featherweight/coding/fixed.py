"""Logarithms and logistic curves in whole numbers, so that encoder and decoder agree on every machine.

An adaptive decoder has to repeat the encoder's probabilities to the last bit, and `log` and `exp` differ between
processors. Here they are read from tables rounded to a grid far coarser than that difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

UNIT = 1024
"""One natural-logarithm unit, in steps."""

CLIP = 13 * UNIT
"""Log-odds beyond this magnitude are taken as this."""

ONE = 1 << 20
"""Probability one, in steps."""

_MANTISSAS = np.rint(np.log(np.arange(1024, 2048) / 1024) * UNIT).astype(np.int64)
_LOG_TWO = round(float(np.log(2.0)) * UNIT)
_CURVE = np.rint(ONE / (1 + np.exp(-np.arange(-CLIP, CLIP + 1) / UNIT))).clip(1, ONE - 1) / ONE


def logarithm(numbers: Integers) -> Integers:
    """Return the natural logarithm of positive integers below 2**53, in steps of 1 / `UNIT`, any shape."""
    mantissas, exponents = np.frexp(numbers)
    places = (mantissas * 2048).astype(np.int64) - 1024
    return np.asarray(_MANTISSAS[places] + (exponents.astype(np.int64) - 1) * _LOG_TWO)


def logistic(log_odds: Integers) -> Floats:
    """Return probabilities in (0, 1), exact multiples of 1 / `ONE`, for log-odds in steps of 1 / `UNIT`, any shape."""
    probabilities: Floats = _CURVE[np.clip(log_odds, -CLIP, CLIP) + CLIP]
    return probabilities
