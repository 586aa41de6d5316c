"""Damage and cost tables on a terminal: a few treatments of each weight, and a few shares of each group."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table
from rich.text import Text

from featherweight.allocation import Row, Tables, Treatment

_DENSITY, _BITS, _RANK = 0.25, 4, 0.4  # about which ways are shown
_SHARES = 5


def damage_tables(tables: Tables) -> list[Table]:
    """Return a table of weights and one of channel groups, readable at 100 columns."""
    shown: dict[str, Callable[[Row], Treatment | None]] = {
        f"{_BITS} bits": lambda row: _stored(row, _BITS, 1.0),
        "2 bits": lambda row: _stored(row, 2, 1.0),
        f"{_DENSITY:.0%} left, {_BITS} bits": lambda row: _stored(row, _BITS, _DENSITY),
        f"low rank, {_BITS} bits": _ranked,
    }
    weights = _table("Weights: nats lost, and bytes", "weight", "shape", *shown)
    for row in tables.rows:
        shape = " x ".join(map(str, row.shape))
        weights.add_row(Text(row.name), shape, *(_cell(pick(row)) for pick in shown.values()))
    found = [weights]
    if tables.groups:
        shares = [share for share in tables.groups[0].shares if share < 1][:_SHARES]
        channels = _table(
            "Channels that leave together: nats lost", "layers", "units", *(f"{share:.0%} kept" for share in shares)
        )
        for group in tables.groups:
            lost = dict(zip(group.shares, group.damages, strict=True))
            names = Text(", ".join(group.names[:2]) + (f" and {len(group.names) - 2} more" if group.names[2:] else ""))
            channels.add_row(names, str(group.units), *(f"{lost[share]:.2g}" for share in shares))
        found.append(channels)
    return found


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left", overflow="fold", no_wrap=not place)
    return table


def _stored(row: Row, bits: int, density: float) -> Treatment | None:
    return next((one for one in row.treatments if (one.bits, one.density, one.rank) == (bits, density, 0)), None)


def _ranked(row: Row) -> Treatment | None:
    """The factored form whose parameters are nearest to a share of the matrix's."""
    whole = row.treatments[0].params
    factored = [one for one in row.treatments if one.rank and one.bits == _BITS]
    return min(factored, key=lambda one: abs(one.params - _RANK * whole), default=None)


def _cell(one: Treatment | None) -> str:
    if one is None:
        return ""
    return f"{f'{one.rank}: ' if one.rank else ''}{one.damage:.1g}, {one.size:,.0f}"
