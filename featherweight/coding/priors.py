"""Bell-shaped first guesses of how often each symbol occurs, told in two bytes instead of a table.

The family is the generalized Gaussian, weight exp(-|x / scale|^shape) at whole x: shape 1 is Laplace, 2 is Gauss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from featherweight.coding.fixed import Floats, Integers
from featherweight.coding.varint import Reader, varint
from featherweight.errors import ArtifactError

STEP = 32
"""What one seen symbol adds to its weight."""

_SHAPES = (0.0, 0.7, 1.0, 1.4, 2.0)  # 0 stands for a flat guess
_STRENGTHS = (1, 3, 6, 12, 32, 128, 1024, 32768)  # the guess counts like so many seen symbols
_SENT_CENTRE = 64


@dataclass(frozen=True)
class Prior:
    """A guess over the symbols 0 … size - 1.

    Args:
        size: number of symbols, at least 2.
        centre: the likeliest symbol, in [0, size).
        usual: the centre that a reader assumes when none is written, in [0, size).
        shape: index into the shapes, 0 to 4.
        strength: index into the strengths, 0 to 7.
        scale: quarter octaves above 1/16, in [0, 255].
    """

    size: int
    centre: int
    usual: int
    shape: int = 0
    strength: int = 0
    scale: int = 0

    def weights(self) -> Integers:
        """Return positive weights, `[size]`, their sum about `STEP` times the strength."""
        shares = _bell(self, np.array([self.scale]))[0]
        return np.asarray(_weights(shares, [_STRENGTHS[self.strength]])[0])

    def pack(self) -> bytes:
        """Return the 1 to 7 bytes that `unpack` reads; size and usual centre are written elsewhere."""
        sent = _SENT_CENTRE if self.centre != self.usual else 0
        head = bytes([sent | self.shape * 8 | self.strength])
        tail = bytes([self.scale]) if self.shape else b""
        return head + tail + (varint(self.centre) if sent else b"")

    @staticmethod
    def unpack(reader: Reader, size: int, usual: int) -> Prior:
        """Read what `pack` wrote.

        Raises:
            ArtifactError: the bytes name no such guess.
        """
        head = reader.byte()
        shape, strength = head % _SENT_CENTRE // 8, head % 8
        if head >= 2 * _SENT_CENTRE or shape >= len(_SHAPES):
            raise ArtifactError(f"{reader.what}: unknown prior {head}")
        scale = reader.byte() if shape else 0
        centre = reader.varint(size - 1) if head & _SENT_CENTRE else usual
        return Prior(size, centre, usual, shape, strength, scale)


def _bell(prior: Prior, scales: Integers) -> Floats:
    """Return shares that sum to 1 for each scale, `[len(scales), size]`."""
    if prior.shape == 0:
        return np.full((len(scales), prior.size), 1 / prior.size)
    distances = np.abs(np.arange(prior.size) - prior.centre)
    widths = np.exp2(scales / 4 - 4)
    bell = np.exp(-((distances[None] / widths[:, None]) ** _SHAPES[prior.shape]).clip(0, 600))
    return np.asarray(bell / bell.sum(1, keepdims=True))


def _weights(shares: Floats, strengths: Sequence[int]) -> Integers:
    """Return positive weights, `[strengths, size]`, of shares, `[size]`."""
    guesses = np.multiply.outer(np.asarray(strengths), STEP * shares)
    return np.asarray(np.maximum(1, np.rint(guesses)), np.int64)


def fit_prior(counts: Integers, usual: int) -> Prior:
    """Return the guess under which the counts, `[size]`, are cheapest to code adaptively.

    The cost is that of a Dirichlet-multinomial (Krichevsky & Trofimov 1981), which knows no order.

    Args:
        counts: occurrences of each symbol, `[size]`, size ≥ 2.
        usual: the symbol expected in the centre, in [0, size).
    """
    size, total = len(counts), max(1, int(counts.sum()))
    places = np.arange(size)
    middle = min(int(np.searchsorted(np.cumsum(counts), total / 2)), size - 1)
    spread = float((counts * np.abs(places - middle)).sum()) / total
    centre = usual if abs(middle - usual) <= 0.1 * spread else middle
    near = round(4 * (math.log2(max(spread, 1 / 8)) + 4))
    scales = np.arange(max(0, near - 12), min(255, near + 12) + 1)
    best, least = Prior(size, centre, usual), np.inf
    for shape in range(len(_SHAPES)):
        prior, share = Prior(size, usual, usual), np.full(size, 1 / size)
        if shape:
            prior = Prior(size, centre, usual, shape)
            bells = _bell(prior, scales)
            chosen = int((-(counts * np.log(bells + 1e-300)).sum(1)).argmin())
            prior, share = replace(prior, scale=int(scales[chosen])), bells[chosen]
        nats = _adaptive_nats(counts, _weights(share, _STRENGTHS))
        cost = float(nats.min()) + 5.5 * len(prior.pack())  # a byte is 5.5 nats
        if cost < least:
            best, least = replace(prior, strength=int(nats.argmin())), cost
    return best


def _adaptive_nats(counts: Integers, weights: Integers) -> Floats:
    """Return the nats to code the counts, `[size]`, one symbol after the other from weights, `[ways, size]`, for each of these."""
    before = torch.from_numpy(weights / STEP)
    after = before + torch.from_numpy(counts)
    gained = (torch.lgamma(after) - torch.lgamma(before)).sum(1)
    return np.asarray((torch.lgamma(after.sum(1)) - torch.lgamma(before.sum(1)) - gained).numpy())
