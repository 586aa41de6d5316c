"""Render `benchmarks/results/*.json` as `docs/benchmarks.md`: `python benchmarks/page.py`, after any benchmark."""

from __future__ import annotations

import json

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
    machines = sorted({f"{row['machine']['cpu']} ({', '.join(row['machine']['features'])})" for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}, one thread for latencies.", ""])


if __name__ == "__main__":
    main()
