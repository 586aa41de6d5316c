"""The one table of a comparison: a row a cell with the whole protocol in it, as CSV, and as Parquet where pyarrow is there."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from featherweight.errors import need
from featherweight.report.compared import Comparison

_LEFT_OUT = ("layers", "untouched", "drop_interval")


def flat(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows with plain values only: lists as JSON text, the protocol and the machine in every row."""
    machines = {original["seed"]: original["machine"] for original in comparison.originals}
    rows = []
    for row in comparison.rows:
        every = {**comparison.protocol, **machines[row["seed"]], "task": comparison.task}
        kept = {name: value for name, value in row.items() if name not in _LEFT_OUT}
        if row.get("drop_interval"):
            kept["drop_low"], kept["drop_high"] = row["drop_interval"]
        rows.append(
            {name: _plain(value) for name, value in {**kept, **{f"protocol_{k}": v for k, v in every.items()}}.items()}
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list | tuple) else value


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `results.csv`, and `results.parquet` where the extra `compare` is installed; return what was written."""
    rows = flat(comparison)
    if not rows:
        return []
    path = folder / "results.csv"
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
    if importlib.util.find_spec("pyarrow") is None:
        return [path]
    arrow, parquet = (
        need("pyarrow", "compare", "a Parquet table"),
        need("pyarrow.parquet", "compare", "a Parquet table"),
    )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    whole = folder / "results.parquet"
    part = whole.with_suffix(".part")
    parquet.write_table(arrow.table(columns), part)
    os.replace(part, whole)
    return [path, whole]
