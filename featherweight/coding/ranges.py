"""A range coder over bytes: constriction's, without the padding of its last 32-bit word.

Range coding: Martin 1979; the implementation: Bamler 2022, "Understanding entropy coding", arXiv:2201.01741.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.coding.fixed import Floats
from featherweight.coding.varint import Bytes
from featherweight.errors import ArtifactError

Symbols = NDArray[np.int32]

models, queue = constriction.stream.model, constriction.stream.queue


class Encoder:
    """Collects symbols with their probabilities; `bytes()` gives the stream so far."""

    def __init__(self) -> None:
        self._coder = queue.RangeEncoder()

    def alike(self, symbols: Symbols, weights: Floats) -> None:
        """Append symbols in [0, alphabet), `[n]`, all under the same weights, `[alphabet]`, alphabet ≥ 2."""
        if symbols.size:
            self._coder.encode(symbols, models.Categorical(weights, perfect=False))

    def __bytes__(self) -> bytes:
        return bytes(self._coder.get_compressed().astype(">u4").tobytes().rstrip(b"\0"))


class Decoder:
    """Reads symbols back in the order in which they were appended, given the same probabilities.

    Wrong bytes give wrong symbols, or an `ArtifactError`; the count of symbols is always the one asked for.
    """

    def __init__(self, data: Bytes) -> None:
        padded = bytes(data) + bytes(8 - len(data) % 4)  # the zeros that the encoder dropped
        self._coder = queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def alike(self, count: int, weights: Floats) -> Symbols:
        """Return `count` symbols, `[count]`, all under the same weights, `[alphabet]`."""
        try:
            symbols: Symbols = self._coder.decode(models.Categorical(weights, perfect=False), count)
        except (ValueError, AssertionError) as error:
            raise ArtifactError(f"range-coded stream: damaged ({error})") from error
        return symbols
