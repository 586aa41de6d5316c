"""Damage and cost tables: what can be done to each weight and each coupled group, what it loses and what it then costs.

Plain data: rows hold numbers and names, no tensor and no layer, and go to JSON and back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

COSTS = ("size", "params", "macs")
FAMILIES = ("channels", "ranks", "zeros", "rounding")


@dataclass(frozen=True)
class Treatment:
    """One way to store a weight.

    Attributes:
        bits: width of the codes, 2 to 8; 32 for floats.
        density: share of the weights that are not zero, above 0, up to 1.
        rank: of the two factors in its place; 0 for one matrix.
        removal: nats by which the network's output diverges for the zeros or the lower rank, alone.
        rounding: further nats for the rounding.
        size: bytes in the file.
        params: elements that are stored.
        macs: multiply-adds of one sample.
    """

    bits: int
    density: float
    rank: int
    removal: float
    rounding: float
    size: float
    params: float
    macs: float

    @property
    def damage(self) -> float:
        """Nats in all."""
        return self.removal + self.rounding

    def share(self, cost: str, shape: tuple[int, ...], out: Any, inside: Any) -> Any:
        """Return the share of a cost, or of the damage, that is left with shares of outputs and inputs, numbers or arrays.

        Factors of a rank `r` have `r (out + in)` entries, and their ranks stay.
        """
        if not self.rank or cost == "damage":
            return out * inside
        first, rest = shape[0], math.prod(shape[1:])
        return (out * first + inside * rest) / (first + rest)

    def __str__(self) -> str:
        parts = [f"rank {self.rank}"] if self.rank else []
        parts += [f"{self.density:.2g} dense"] if self.density < 1 else []
        return ", ".join([*parts, f"{self.bits} bits"])


@dataclass(frozen=True)
class Row:
    """A weight and its treatments.

    Attributes:
        name: of the tensor.
        path: of the layer that holds it.
        shape: of the tensor.
        makes: which group the outputs are of, or -1.
        reads: which group the inputs are of, or -1.
        treatments: what can be done, the mildest first.
        seconds: of the operator on the chosen runtime, by share of outputs and of inputs kept, in the order of the groups'
            shares; one entry where there is no group; empty where it was not measured.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    makes: int
    reads: int
    treatments: tuple[Treatment, ...]
    seconds: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Group:
    """Channels that leave together, or in equal numbers, and what leaving costs.

    Attributes:
        names: paths of the layers that make them.
        units: how many there are.
        shares: kept, the largest first, 1 being the first.
        damages: nats of each share, 0 for all.
    """

    names: tuple[str, ...]
    units: int
    shares: tuple[float, ...]
    damages: tuple[float, ...]


@dataclass(frozen=True)
class Tables:
    """All rows of a network.

    Attributes:
        rows: weights.
        groups: of channels.
        fixed: `size`, `params` and `macs` that no treatment changes, and `seconds` where they were measured.
        split: whether there are rows of what `split_layers` takes layers apart into.
        loose: whether there are parameters of two dimensions or more that are in no row.
    """

    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    fixed: dict[str, float]
    split: bool = False
    loose: bool = False

    def scaled(self, factors: Mapping[str, float]) -> Tables:
        """Return tables whose damages are multiplied, by family, as what healing leaves of them differs.

        Args:
            factors: for some of `FAMILIES`.
        """
        channels, rounding = factors.get("channels", 1.0), factors.get("rounding", 1.0)

        def treated(one: Treatment) -> Treatment:
            removal = one.removal * factors.get("ranks" if one.rank else "zeros", 1.0)
            return replace(one, removal=removal, rounding=one.rounding * rounding)

        rows = tuple(replace(row, treatments=tuple(map(treated, row.treatments))) for row in self.rows)
        groups = tuple(
            replace(group, damages=tuple(channels * lost for lost in group.damages)) for group in self.groups
        )
        return replace(self, rows=rows, groups=groups)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tables:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        rows = tuple(
            Row(
                **{
                    **row,
                    "shape": tuple(row["shape"]),
                    "treatments": tuple(Treatment(**one) for one in row["treatments"]),
                    "seconds": tuple(map(tuple, row["seconds"])),
                }
            )
            for row in value["rows"]
        )
        groups = tuple(
            Group(tuple(group["names"]), group["units"], tuple(group["shares"]), tuple(group["damages"]))
            for group in value["groups"]
        )
        return cls(rows, groups, dict(value["fixed"]), bool(value["split"]), bool(value["loose"]))


def frontier(treatments: Sequence[Treatment], metrics: Sequence[str]) -> tuple[Treatment, ...]:
    """Return the treatments that none of their form beats in damage and in every one of some costs, the mildest first.

    Matrices and factors are apart, because channels that leave make them smaller in different proportions.

    Args:
        treatments: of one weight.
        metrics: names of costs, of `COSTS`.
    """
    kept: list[Treatment] = []
    for one in sorted(treatments, key=lambda one: (one.damage, *(getattr(one, metric) for metric in metrics))):
        alike = (other for other in kept if bool(other.rank) == bool(one.rank))
        if not any(all(getattr(other, metric) <= getattr(one, metric) for metric in metrics) for other in alike):
            kept.append(one)
    return tuple(kept)
