"""Symbols in a row, all alike, from counts that grow as they are read: no table travels.

Universal coding after Krichevsky & Trofimov 1981, block by block so that numpy does the counting.
"""

from __future__ import annotations

import numpy as np

from featherweight.coding.fixed import Integers
from featherweight.coding.priors import STEP, Prior, fit_prior
from featherweight.coding.ranges import Decoder, Encoder, Symbols
from featherweight.coding.varint import Reader

_FIRST_BLOCK = 8
_LARGEST_BLOCK = 8192


def encode_adaptive(symbols: Symbols, size: int, usual: int) -> bytes:
    """Code symbols in [0, size), `[n]`; size ≥ 2, `usual` is the symbol expected in the centre."""
    prior = fit_prior(np.bincount(symbols, minlength=size).astype(np.int64), usual)
    weights, encoder = prior.weights(), Encoder()
    for start, stop in _blocks(len(symbols)):
        block = symbols[start:stop]
        encoder.alike(block, weights.astype(np.float64))
        weights = _grown(weights, block)
    return prior.pack() + bytes(encoder)


def decode_adaptive(reader: Reader, count: int, size: int, usual: int) -> Symbols:
    """Read `count` symbols in [0, size) that `encode_adaptive` wrote, `[count]`.

    Raises:
        ArtifactError: the bytes are not such a stream.
    """
    weights = Prior.unpack(reader, size, usual).weights()
    decoder, symbols = Decoder(reader.rest()), np.empty(count, np.int32)
    for start, stop in _blocks(count):
        symbols[start:stop] = decoder.alike(stop - start, weights.astype(np.float64))
        weights = _grown(weights, symbols[start:stop])
    return symbols


def _blocks(count: int) -> list[tuple[int, int]]:
    """Return the starts and stops of blocks that grow by a quarter of what came before."""
    blocks, start = [], 0
    while start < count:
        stop = min(count, start + min(_LARGEST_BLOCK, max(_FIRST_BLOCK, start // 4)))
        blocks.append((start, stop))
        start = stop
    return blocks


def _grown(weights: Integers, block: Symbols) -> Integers:
    """Return the weights, `[size]`, after the block, `[n]`, was seen."""
    return weights + STEP * np.bincount(block, minlength=len(weights))
