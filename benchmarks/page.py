"""Render `benchmarks/results/*.json` as `docs/benchmarks.md`: `python benchmarks/page.py`, after any benchmark."""

from __future__ import annotations

import json
from typing import Any

from results import FOLDER

PAGE = FOLDER.parent.parent / "docs" / "benchmarks.md"


def main() -> None:
    """Write the page."""
    PAGE.write_text(rendered())


def rendered() -> str:
    """Return the page: one row a figure, with what was seen and the command that measures it again."""
    files = sorted(path for path in FOLDER.glob("*.json") if not path.name.endswith(".partial.json"))
    rows = [row for path in files for row in json.loads(path.read_text())]
    lines = [
        "# Benchmarks",
        "",
        "Made by `benchmarks/page.py` from `benchmarks/results/`, whose rows the scripts wrote that measured them.",
        "",
        "| figure | got | seeds | what was seen | command |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda item: item["id"]):
        got = "not had" if row["got"] is None else f"{row['got']:g}"
        lines.append(
            f"| `{row['id']}` | {got} | {row['seeds']} | {row['note'].replace('|', '/')} | `{row['command']}` |"
        )
    for row in sorted(rows, key=lambda item: item["id"]):
        details = row.get("details")
        if isinstance(details, dict) and "table" in details:
            lines += ["", f"## `{row['id']}`", "", *_table(details["table"])]
    machines = sorted({f"{row['machine']['cpu']} ({', '.join(row['machine']['features'])})" for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}, one thread for latencies.", ""])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of rows with the same keys."""
    cells = [[str(value).replace("|", "/") for value in row.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (list(rows[0]), ["---"] * len(rows[0]), *cells)]


if __name__ == "__main__":
    main()
