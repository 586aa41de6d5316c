"""Allocation on a network of 62 layers: how long the tables take, and how long the integer program.

    python benchmarks/budget_allocation.py

The network is a ResNet-62 for 32 x 32 images; weights and images are random, which changes no time. Latency tables are not
counted. The program's row is the slowest of four budgets for 60 of its weights with 30 treatments each, groups left out; how
long the whole tables take, groups and all, stands beside.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch
from networks import resnet
from results import record

from featherweight import Context, Data, run
from featherweight.allocation import Row, Tables, measure_tables, solve
from featherweight.techniques import FoldBatchNorm

NAME = "budget_allocation"
DEPTH, LAYERS, TREATMENTS = 62, 60, 30
SHARES = (0.5, 0.2, 0.1, 0.05)  # of the bytes of the mildest treatments
BATCH, BATCHES = 32, 16


def main() -> None:
    """Measure the tables, then the program, and write both rows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = [(torch.randn(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.long)) for _ in range(BATCHES)]
    context = Context(data=Data(example=images[0][0][:1], calibrate=images), report=_say)
    folded, _ = run(FoldBatchNorm(), resnet(DEPTH), context)
    start = time.perf_counter()
    tables = measure_tables(folded, context, BATCHES)
    minutes = (time.perf_counter() - start) / 60
    note = (
        f"ResNet-{DEPTH}: {len(tables.rows)} weights with {min(len(row.treatments) for row in tables.rows)} or more treatments, "
        f"{len(tables.groups)} groups; {BATCHES} batches of {BATCH}, one thread"
    )
    record(NAME, "budget.tables.minutes", round(minutes, 2), 1, note)
    plain = Tables(tuple(_plain(row) for row in tables.rows[:LAYERS]), (), {})
    alone, whole = _times(plain), _times(tables)
    note = (
        f"slowest of {len(SHARES)} size budgets, {LAYERS} weights of ResNet-{DEPTH} with {TREATMENTS} treatments each: "
        f"{_told(alone)} s; all weights and treatments with the shares of {len(tables.groups)} groups: {_told(whole)} s"
    )
    record(NAME, "budget.solve.seconds", round(max(alone), 2), 1, note)


def _plain(row: Row) -> Row:
    """The row without groups, and as many of its treatments as the figure says, from the mildest to the strongest."""
    count = len(row.treatments)
    picked = sorted({round(place * (count - 1) / (TREATMENTS - 1)) for place in range(TREATMENTS)})
    return replace(row, makes=-1, reads=-1, treatments=tuple(row.treatments[place] for place in picked))


def _times(tables: Tables) -> list[float]:
    """Seconds of each budget."""
    most = sum(row.treatments[0].size for row in tables.rows)
    found = []
    for share in SHARES:
        start = time.perf_counter()
        solve(tables, {"size": share * most})
        found.append(time.perf_counter() - start)
    return found


def _told(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
