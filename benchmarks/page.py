"""Render `benchmarks/results/` as `docs/benchmarks.md`, and the README's table and picture: `python benchmarks/page.py`."""

from __future__ import annotations

import json
import re
from typing import Any

from results import FOLDER

ROOT = FOLDER.parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "front.svg"
PICTURED = FOLDER / "comparisons" / "mlp" / "report.html"
MARKS = ("<!-- headline: made by benchmarks/page.py -->", "<!-- end of headline -->")
HEADLINE = {
    "spine.digits.ratio": "small CNN on digits: times smaller within the drop asked for",
    "bytes.lenet300.ratio": "LeNet-300-100 on MNIST: times smaller",
    "bytes.lenet5.ratio": "LeNet-5-Caffe on MNIST, at most 1 % error, without the graph: times smaller",
    "bytes.vgg19.own.ratio": "VGG-19 on CIFAR-10 (JPEG copy), its own layers, at most half a point lost: times smaller",
    "bytes.vgg19.student.ratio": "VGG-19 on CIFAR-10 (JPEG copy), a student with 96 % of its accuracy: times smaller",
    "lstm.combined.speed": "LSTM on spoken digits: times as fast as in PyTorch",
    "lstm.40x.drop": "the same LSTM, 40 times smaller: points lost",
    "pruning.resnet56.2.1x.drop": "ResNet-56 on CIFAR-10 (JPEG copy) at 2.1x fewer multiply-adds: points lost",
    "quantization.resnet18_224.over_eager": "ResNet-18 at 224 x 224 on eight bits, a CPU with AMX: times as fast as in PyTorch",
    "spine.resnet20.speed": "ResNet-20 on CIFAR-10 (JPEG copy), cut and on eight bits: times as fast",
    "lowrank.vgg19.speed": "VGG-19 on CIFAR-10 (JPEG copy) by low rank alone, at most a point lost: times as fast",
    "quantization.lstm.w4.drop": "the LSTM on four bits, nothing trained: points lost",
    "distillation.ensemble.drop": "ten MLPs taught to a small one: points lost",
}


def main() -> None:
    """Write the page, and the headline table and the picture of the README."""
    PAGE.write_text(rendered())
    PICTURE.write_text(picture(PICTURED.read_text()))
    README.write_text(readme(README.read_text()))


def readme(text: str) -> str:
    """Return the README with its headline table made anew: one line a figure, with the command that measures it again."""
    known = {row["id"]: row for row in _measured()}
    lines = ["| what | got | seeds | again |", "|---|---|---|---|"]
    for identifier, what in HEADLINE.items():
        row = known.get(identifier)
        if row is not None and row["got"] is not None:
            lines.append(f"| {what} | {row['got']:g} | {row['seeds']} | `{row['command']}` |")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return "\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after])


def picture(page: str) -> str:
    """Return the first chart of a comparison's page, accuracy against bytes, on white for readers in the dark."""
    chart = re.search(r"<svg xmlns=.*?</svg>", page, re.DOTALL)
    if chart is None:
        raise SystemExit(f"{PICTURED} has no chart")
    return chart[0].replace('fill="#ffffff00"', 'fill="#ffffff"', 1) + "\n"


def _measured() -> list[dict[str, Any]]:
    files = sorted(path for path in FOLDER.glob("*.json") if not path.name.endswith(".partial.json"))
    return [row for path in files for row in json.loads(path.read_text())]


def rendered() -> str:
    """Return the page: one row a figure, with what was seen and the command that measures it again."""
    rows = _measured()
    lines = [
        "# Benchmarks",
        "",
        "Made by `benchmarks/page.py` from `benchmarks/results/`, whose rows the scripts wrote that measured them.",
        "",
        "| figure | got | seeds | what was seen | command | CPU |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda item: item["id"]):
        got = "not had" if row["got"] is None else f"{row['got']:g}"
        lines.append(
            f"| `{row['id']}` | {got} | {row['seeds']} | {row['note'].replace('|', '/')} | `{row['command']}` | {_units(row)} |"
        )
    for row in sorted(rows, key=lambda item: item["id"]):
        details = row.get("details")
        if isinstance(details, dict) and "table" in details:
            lines += ["", f"## `{row['id']}`", "", *_table(details["table"])]
    machines = sorted({f"{row['machine']['cpu']} ({', '.join(row['machine']['features'])})" for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}, one thread for latencies.", ""])


def _units(row: dict[str, Any]) -> str:
    """Return the widest integer units of the CPU that a row was measured on."""
    units = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI"}
    return next((name for feature, name in units.items() if feature in row["machine"]["features"]), "AVX2")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of rows with the same keys."""
    cells = [[str(value).replace("|", "/") for value in row.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (list(rows[0]), ["---"] * len(rows[0]), *cells)]


if __name__ == "__main__":
    main()
