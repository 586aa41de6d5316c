"""One multiple-choice integer program over the whole network: a treatment for each weight, a share for each group.

A weight between two groups shrinks with both, so its choice is one of (share of outputs, share of inputs, treatment), and
the choices of all weights that a group touches agree on its share. The linear relaxation is solved first; what its reduced
costs cannot rule out goes into an integer program. Both by SciPy's HiGHS, exact to a gap of 0.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose parts load when they are first used: most commands never do
from numpy.typing import NDArray

from featherweight.allocation.treatments import COSTS, Group, Row, Tables, Treatment, frontier
from featherweight.descriptors import nowhere
from featherweight.errors import BudgetError

_GAP = 1e-3
_FIRST = 4  # variables a weight or group that the first integer program has, about
_NODES = 1000  # of an integer program, after which the best choice found is taken: the same on any machine
_WHOLE = Group((), 1, (1.0,), (0.0,))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """What to do to every weight and group.

    Attributes:
        treatments: by name of the weight.
        shares: kept of each group, in the order of the tables.
        costs: predicted, by metric.
        damage: predicted, in nats.
    """

    treatments: dict[str, Treatment]
    shares: tuple[float, ...]
    costs: dict[str, float]
    damage: float


def solve(tables: Tables, limits: Mapping[str, float], goal: str = "damage") -> Allocation:
    """Return the choice of least `goal` that keeps every limit.

    Args:
        tables: what can be chosen.
        limits: most of `size`, `params`, `macs`, `seconds` and `damage`, those that count.
        goal: which of them is to be least.

    Raises:
        BudgetError: no choice keeps the limits; the message has the least that each of them can be.
    """
    program = _Program(tables, [name for name in COSTS if name in limits or name == goal])
    picked = program.least(goal, limits)
    if picked is None:
        least = {name: program.least(name, {}) for name in limits}
        told = [
            f"{name} {program.total(name, found):,.4g} where {limits[name]:,.4g} is allowed"
            for name, found in least.items()
            if found is not None
        ]
        raise BudgetError(f"no treatment keeps all limits; the least that each alone can be is {', '.join(told)}")
    return program.allocation(picked)


def front(
    tables: Tables,
    metric: str,
    points: int = 12,
    limits: Mapping[str, float] | None = None,
) -> list[Allocation]:
    """Return allocations of least damage, the mildest first, evenly apart in the logarithm of one cost.

    Args:
        tables: what can be chosen.
        metric: `size`, `params`, `macs` or `seconds`.
        points: how many, at least 2.
        limits: others to keep.
    """
    others = dict(limits or {})
    least = solve(tables, others, metric).costs[metric]
    most = solve(tables, others).costs[metric]
    return [
        solve(tables, {**others, metric: float(step) * (1 + 1e-9)})
        for step in np.geomspace(max(most, least), least, points)
    ]


class _Program:
    """The variables as columns: what each belongs to, costs and loses, and the equations they obey."""

    def __init__(self, tables: Tables, metrics: list[str]) -> None:
        self.tables = tables
        self.offered = [frontier(row.treatments, metrics or ["size"]) for row in tables.rows]
        parts = [self._of_row(place, row) for place, row in enumerate(tables.rows)]
        parts += [self._of_group(at, group) for at, group in enumerate(tables.groups)]
        self.columns: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        self.equations, self.right = self._agreement()

    def _of_row(self, place: int, row: Row) -> dict[str, NDArray[Any]]:
        """The variables of a weight: each share of its outputs, of its inputs, and each treatment."""
        making, reading = (self.tables.groups[at] if at >= 0 else _WHOLE for at in (row.makes, row.reads))
        offered, counts = self.offered[place], (len(making.shares), len(reading.shares))
        made, read, which = (part.flatten() for part in np.indices((*counts, len(offered))))
        shares = np.array(making.shares)[made], np.array(reading.shares)[read]
        columns = {name: self._cost(name, row, offered, which, *shares) for name in (*COSTS, "damage")}
        columns["seconds"] = np.array(row.seconds)[made, read] if row.seconds else np.zeros(len(made))
        return {**columns, "owner": np.full(len(made), place), "made": made, "read": read, "which": which}

    def _cost(
        self, name: str, row: Row, offered: tuple[Treatment, ...], which: NDArray[Any], out: Floats, inside: Floats
    ) -> Floats:
        found = np.zeros(len(which))
        for place, one in enumerate(offered):
            own = which == place
            found[own] = getattr(one, name) * one.share(name, row.shape, out[own], inside[own])
        return found

    def _of_group(self, at: int, group: Group) -> dict[str, NDArray[Any]]:
        """The variables of a group: each share."""
        made = np.arange(len(group.shares))
        nothing = {name: np.zeros(len(made)) for name in (*COSTS, "seconds")}
        owner = np.full(len(made), len(self.tables.rows) + at)
        return {
            **nothing,
            "damage": np.array(group.damages),
            "owner": owner,
            "made": made,
            "read": 0 * made,
            "which": 0 * made,
        }

    def _agreement(self) -> tuple[scipy.sparse.csr_matrix, Floats]:
        """One variable of each owner is taken, and those of a weight at a share of a group sum to that share's."""
        owner, made, read = (self.columns[key] for key in ("owner", "made", "read"))
        rows = len(self.tables.rows)
        blocks = [(owner[None] == np.unique(owner)[:, None]).astype(float)]
        for place, row in enumerate(self.tables.rows):
            for at, own in ((row.makes, made), (row.reads, read)):
                if at >= 0:
                    shares = np.arange(len(self.tables.groups[at].shares))[:, None]
                    chosen = ((owner == place) & (own == shares)).astype(float)
                    leader = (owner == rows + at) & (made == shares)
                    blocks.append(chosen - leader)
        right = np.concatenate([np.ones(len(blocks[0])), *(np.zeros(len(block)) for block in blocks[1:])])
        matrix = scipy.sparse.vstack([scipy.sparse.csr_matrix(block) for block in blocks]).tocsr()
        return matrix, right

    def least(self, goal: str, limits: Mapping[str, float]) -> NDArray[np.int64] | None:
        """Return the variables taken, or None where no choice keeps the limits."""
        target = self.columns[goal] / max(float(np.abs(self.columns[goal]).max()), 1e-300)
        bounds = np.array([limits[name] - self.fixed(name) for name in limits])
        size = np.maximum(np.abs(bounds), 1e-12)  # so that tolerances mean the same for bytes and seconds
        costs = np.array([self.columns[name] for name in limits]).reshape(len(limits), len(target)) / size[:, None]
        relaxed = scipy.optimize.linprog(
            target,
            A_ub=costs if limits else None,
            b_ub=bounds / size if limits else None,
            A_eq=self.equations,
            b_eq=self.right,
            bounds=(0, None),
            method="highs",
        )
        if relaxed.x is None:
            return None
        reduced: Floats = relaxed.lower.marginals
        order, many = np.sort(reduced), _FIRST * len(np.unique(self.columns["owner"]))
        reach = order[min(many, len(order)) - 1]
        while True:
            kept = np.flatnonzero(reduced <= reach)
            with nowhere(1):  # HiGHS prints there now and then, whatever it is told
                solved = scipy.optimize.milp(
                    target[kept],
                    constraints=[
                        scipy.optimize.LinearConstraint(self.equations[:, kept], self.right, self.right),
                        *([scipy.optimize.LinearConstraint(costs[:, kept], -np.inf, bounds / size)] if limits else []),
                    ],
                    integrality=np.ones(len(kept)),
                    bounds=scipy.optimize.Bounds(0, 1),
                    options={"mip_rel_gap": _GAP, "node_limit": _NODES},
                )
            everything = len(kept) == len(target)
            if solved.x is not None:
                # whoever takes a variable outside pays at least its reduced cost more than the relaxation
                needed = solved.fun * (1 - _GAP) - relaxed.fun
                if everything or needed <= reach:
                    picked: NDArray[np.int64] = kept[solved.x > 0.5]
                    return picked
                reach = needed
            elif everything:
                return None
            else:
                many *= _FIRST
                reach = order[min(many, len(order)) - 1]

    def fixed(self, metric: str) -> float:
        """What no choice changes."""
        return self.tables.fixed.get(metric, 0.0)

    def total(self, metric: str, picked: NDArray[np.int64]) -> float:
        """What a choice costs or loses."""
        return self.fixed(metric) + float(self.columns[metric][picked].sum())

    def allocation(self, picked: NDArray[np.int64]) -> Allocation:
        """Return a choice by the names of the tables."""
        treatments: dict[str, Treatment] = {}
        places: dict[int, int] = {}
        for owner, made, which in zip(*(self.columns[key][picked] for key in ("owner", "made", "which")), strict=True):
            if owner < len(self.tables.rows):
                treatments[self.tables.rows[owner].name] = self.offered[owner][which]
            else:
                places[int(owner) - len(self.tables.rows)] = int(made)
        shares = tuple(group.shares[places[at]] for at, group in enumerate(self.tables.groups))
        costs = {metric: self.total(metric, picked) for metric in (*COSTS, "seconds")}
        return Allocation(treatments, shares, costs, self.total("damage", picked))
