"""Over the seeds: means with intervals, who is as good as the best at a budget, and the answer in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch

from featherweight.report.wording import amount, factor
from featherweight.significance import bootstrap

Samples = Mapping[tuple[str, str, int], np.ndarray[Any, Any]]
"""The score of each test sample by recipe, budget and seed."""
_ALIKE = 0.03  # of a time, which is no more than its spread
_AVERAGED = (
    "bytes",
    "ratio",
    "score",
    "drop",
    "milliseconds",
    "speedup",
    "macs",
    "peak_bytes",
    "millijoules",
    "seconds",
    "agreement",
    "calibration_error",
)


def ranked(
    rows: Sequence[Mapping[str, Any]], samples: Samples, before: Mapping[int, np.ndarray[Any, Any]]
) -> list[dict[str, Any]]:
    """Return one row a recipe and budget, the best of each budget first.

    Args:
        rows: finished cells.
        samples: their scores by sample.
        before: the original's, by seed.

    Returns:
        `recipe`, `kind`, `budget`, `seeds`, means of what was measured, `drop_low` and `drop_high` (95 %, seeds and samples
        drawn again), `drop_spread` (largest minus smallest over the seeds), `worst_class` (mean damage of the class hurt
        most), `met` in all seeds, and `as_good_as_best`: whether the interval of the difference from the budget's best
        among those that meet it reaches zero; None for those that do not meet it.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            groups.setdefault((row["recipe"], row["budget"]), []).append(row)
    made = []
    for (recipe, budget), cells in groups.items():
        drops = _differences(
            [before[cell["seed"]] for cell in cells],
            [samples[recipe, budget, cell["seed"]] for cell in cells],
            cells[0],
        )
        low, high = bootstrap(drops)
        made.append(
            {
                "recipe": recipe,
                "kind": cells[0]["kind"],
                "budget": budget,
                "allowed": cells[0]["allowed"],
                "seeds": [cell["seed"] for cell in cells],
                **{name: mean(values) for name in _AVERAGED if (values := _known(cells, name))},
                "drop_low": low,
                "drop_high": high,
                "drop_spread": max(cell["drop"] for cell in cells) - min(cell["drop"] for cell in cells),
                "worst_class": _worst(cells),
                "share": all(0 <= cell[name] <= 1 for cell in cells for name in ("score", "score_before")),
                "met": all(cell["met"] for cell in cells),
                "as_good_as_best": None,
            }
        )
    for budget in dict.fromkeys(row["budget"] for row in made):
        inside = [row for row in made if row["budget"] == budget and row["met"]]
        if inside:
            _mark(inside, samples, rows)
    order = list(dict.fromkeys(row["budget"] for row in made))
    return sorted(made, key=lambda row: (order.index(row["budget"]), not row["met"], row["drop"], row["bytes"]))


def _mark(inside: list[dict[str, Any]], samples: Samples, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say of each whether it can be told from the best, over the seeds that both have."""
    best = min(inside, key=lambda row: (row["drop"], row["bytes"]))
    direction = next(row for row in rows if row["recipe"] == best["recipe"] and row["status"] == "done")
    for row in inside:
        shared = sorted(set(best["seeds"]) & set(row["seeds"]))
        if row is best or not shared:
            row["as_good_as_best"] = row is best
            continue
        first = [samples[best["recipe"], best["budget"], seed] for seed in shared]
        other = [samples[row["recipe"], row["budget"], seed] for seed in shared]
        row["as_good_as_best"] = bootstrap(_differences(first, other, direction))[0] <= 0


def _differences(
    first: list[np.ndarray[Any, Any]], last: list[np.ndarray[Any, Any]], row: Mapping[str, Any]
) -> torch.Tensor:
    """By how much the last are worse, sample by sample, `[seeds, n]`."""
    sign = 1 if row["higher_is_better"] else -1
    return torch.from_numpy(np.stack([sign * (a.astype(np.float64) - b) for a, b in zip(first, last, strict=True)]))


def _known(cells: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [cell[name] for cell in cells if cell.get(name) is not None]


def _worst(cells: Sequence[Mapping[str, Any]]) -> float | None:
    tables = [cell["classes"] for cell in cells if cell.get("classes")]
    if not tables:
        return None
    damage = [[table[label] for table in tables if table[label] is not None] for label in range(len(tables[0]))]
    return float(max(mean(values) for values in damage if values))


def answered(ranking: Sequence[Mapping[str, Any]], budgets: Mapping[str, float], seeds: int) -> list[dict[str, Any]]:
    """Return one sentence a budget: what to take, what it costs, and what cannot be told from it.

    Args:
        ranking: of `ranked`.
        budgets: bytes allowed, by budget.
        seeds: that were asked for; a recipe with fewer is told as such.
    """
    found = []
    for budget, allowed in budgets.items():
        # A smaller file of another budget is also at most this large.
        inside = [row for row in ranking if row["met"] and row["bytes"] <= allowed and row["recipe"] != "dense"]
        if not inside:
            found.append(
                {
                    "budget": budget,
                    "allowed": allowed,
                    "recipe": None,
                    "text": f"For at most {_size(allowed)} nothing was small enough.",
                }
            )
            continue
        best = min(inside, key=lambda row: (row["drop"], row["bytes"]))
        others = [row["recipe"] for row in ranking if row["budget"] == budget and row["as_good_as_best"]]
        others = [name for name in others if name != best["recipe"]]
        text = (
            f"For at most {_size(allowed)} take {best['recipe']}: {_size(best['bytes'])}, it {_loss(best)} "
            f"and runs {_speed(best['speedup'])}."
        )
        if others and best["budget"] == budget:
            text += f" Not to be told from it: {', '.join(others)}."
        if len(best["seeds"]) < seeds:
            text += f" Only {len(best['seeds'])} of {seeds} seeds are done."
        found.append({"budget": budget, "allowed": allowed, "recipe": best["recipe"], "text": text})
    return found


def _size(value: float) -> str:
    return amount("size", round(value))


def _loss(row: Mapping[str, Any]) -> str:
    """Return `loses 0.4 points (0.1 to 0.7)`; a score that is no share has no points."""
    unit, scale = (" points", 100) if row["share"] else ("", 1)
    word, sign = ("loses", scale) if row["drop"] >= 0 else ("gains", -scale)
    low, high = sorted((sign * row["drop_low"] + 0.0, sign * row["drop_high"] + 0.0))  # and no -0
    return f"{word} {sign * row['drop']:.3g}{unit} ({low:.3g} to {high:.3g})"


def _speed(speedup: float) -> str:
    if abs(speedup - 1) < _ALIKE:
        return "as fast as the original"
    return f"{factor(speedup)} as fast" if speedup > 1 else f"{factor(1 / speedup)} slower"
