"""`compare`: which technique, for this model and this budget? Every contender under the same rules, one table, one page."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from featherweight import measurement as measuring
from featherweight.budget import Budget
from featherweight.comparison.bench import CellBench, Originals, nothing
from featherweight.comparison.cells import RATES, Cell, Ground, Rules
from featherweight.comparison.contenders import BASELINES, CONTENDERS, Contender, chosen
from featherweight.comparison.ranking import answered, ranked
from featherweight.comparison.table import write_tables
from featherweight.data import batches, samples
from featherweight.errors import ArtifactError, FeatherweightError, RecipeError
from featherweight.preflight import find_device
from featherweight.report.compared import Comparison
from featherweight.report.compared_page import write_comparison
from featherweight.techniques import together
from featherweight.techniques.importance import digest
from featherweight.trials import Assignment
from featherweight.workers import Result
from featherweight.workers.hiring import THIS_PROCESS, Crew

_ONCE = "1x"  # the budget that contenders without a strength are listed under
_DRAWN_BY = ("altair", "vl_convert")  # of the extra `report`; without it there are tables only
_VERSIONS = ("torch", "onnxruntime", "numpy", "onnx")


def compare(
    task: Originals,
    recipes: str | Sequence[str] = "all",
    budgets: str | Sequence[str] = ("2x", "4x", "8x", "16x"),
    *,
    out: str | Path,
    seeds: int | Sequence[int] = 3,
    epochs: int = 10,
    tries: int = 1,
    device: str = "cpu",
    watts: float = 10.0,
    name: str = "",
    command: str = "",
    crew: Crew = THIS_PROCESS,
    progress: Callable[[str, float], None] = nothing,
) -> Comparison:
    """Run every recipe at every budget under every seed, by the same rules, and return what was found.

    Each contender sees the same data, trains the same number of epochs in all and tries the same number of learning rates;
    one strength of it, found by halving on the bytes of the untrained file, meets the budget. Four baselines are always
    there: the original healed as long, a small network trained from scratch, channels removed at random, weights zeroed by
    magnitude. A finished cell lies in `OUT/cells/` and is never run again; a killed one goes on from its last epoch. Each cell
    computes on one thread, here or in another process, so that all have the same; several processes fill the machine. A folder
    may go on on a machine of another kind: seeds that are finished stay as they are, and a new seed is its own.

    Args:
        task: a model with its data, its name on the command line, or a function from a seed to one, where every seed has an
            original of its own. Other processes open a task of yours by its name, and get what can be sent otherwise.
        recipes: `"all"`, or names of contenders and paths of recipe files.
        budgets: file sizes such as `"4x"`, `"10%"` or `"300KB"`.
        out: the folder of cells, tables and page; continued where it exists.
        seeds: how many, or which.
        epochs: passes over the training data, all training steps of a recipe together.
        tries: learning rates each contender trains with, 1 to 3; the best on validation data counts.
        device: `"cpu"`, `"cuda"` or `"mps"`, for training.
        watts: what a busy core is stated to take; energy is time times that where no counter can be read.
        name: of the task in reports and commands; the task's own when missing.
        command: how to reproduce this, for the report.
        crew: who carries the cells out.
        progress: called with a message and the share done.

    Returns:
        the facts, which also lie in `OUT/comparison.json`, with `results.csv`, and where the extras are there `results.parquet` and
        `report.html`.

    Raises:
        RecipeError: a recipe is unknown or has more training steps than epochs; a number is out of range.
        BudgetError: a budget cannot be read.
        ArtifactError: the folder holds a comparison by other rules.
        DataError: a worker cannot open the task, or there is no cluster.
        FeatherweightError: a cell failed for a reason that is no fact about its recipe; all others are finished and kept.
    """
    contenders, limits = chosen(recipes), _budgets(budgets)
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not wanted or epochs < 1 or not 1 <= tries <= len(RATES):
        raise RecipeError(
            f"compare: seeds={seeds}, epochs={epochs} must be at least 1, and tries={tries} 1 to {len(RATES)}"
        )
    together.refuse("compare", "its workers= carries out several cells at once")
    find_device(device)
    folder = Path(out)
    label = name or (task if isinstance(task, str) else getattr(task, "name", "") or getattr(task, "__name__", "task"))
    rules = Rules(epochs, tries, device, watts, label)
    _open(folder, rules)
    cells = [cell for seed in wanted for cell in _cells(contenders, limits, seed, folder)]
    rows = _carried_out(CellBench(task, rules, cells, progress=progress), wanted, folder, rules, crew, progress)
    originals = [{"machine": measuring.machine(), **json.loads(_original(folder, seed).read_text())} for seed in wanted]
    facts = Comparison(
        task=label,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        protocol={
            **_rules(rules),
            "budgets": limits,
            "seeds": wanted,
            "splits": originals[0]["splits"],
            **_provenance(),
        },
        machine=_machines(originals),
        contenders=[{"name": one.name, "kind": one.kind, "about": one.about} for one in contenders],
        originals=originals,
        rows=rows,
    )
    done = [cell for cell, row in zip(cells, rows, strict=True) if row["status"] == "done"]
    scores = {(cell.contender.name, cell.budget, cell.seed): cell.samples() for cell in done}
    facts.ranking = ranked(facts.rows, scores, {seed: _samples(folder, seed) for seed in wanted})
    allowed = {row["budget"]: row["allowed"] for row in rows if row["budget"] != _ONCE}
    facts.answers = answered(facts.ranking, allowed, len(wanted))
    (folder / "comparison.json").write_text(json.dumps(facts.to_dict(), indent=1, allow_nan=False) + "\n")
    write_tables(facts, folder)
    if all(importlib.util.find_spec(package) is not None for package in _DRAWN_BY):
        write_comparison(facts, folder)
    return facts


def _carried_out(
    bench: CellBench,
    seeds: Sequence[int],
    folder: Path,
    rules: Rules,
    crew: Crew,
    progress: Callable[[str, float], None],
) -> list[dict[str, Any]]:
    """Return the facts of all cells, those from disk that are finished.

    Raises:
        FeatherweightError: some failed; all others are finished then.
    """
    cells = bench.cells
    rows = {place: known for place, cell in enumerate(cells) if (known := cell.stored()) is not None}
    failed: list[str] = []

    def done(given: Assignment, result: Result) -> None:
        if "failed" in result:
            failed.append(f"{cells[given.number].name}: {result['failed']}")
        else:
            rows[given.number] = bench.received(given, result)
        progress(cells[given.number].name, (len(rows) + len(failed)) / len(cells))

    def missing(seed: int) -> list[Assignment]:
        return [
            Assignment(place, 0, 1.0, cell.name)
            for place, cell in enumerate(cells)
            if cell.seed == seed and place not in rows
        ]

    near, far = (functools.partial(CellBench, bench.sent, rules, cells, far) for far in (False, True))
    with crew.hired(bench, near, far, folder) as workers:
        for seed in seeds:
            if _elsewhere(folder, seed):
                if not missing(seed):
                    continue
                if not any(cell.seed == seed and cell.stored() is not None for cell in cells):
                    _original(folder, seed).unlink()  # it was measured there, and nothing made of it
            _describe(bench.ground(seed), folder)
            if crew.alone:  # while this original is open
                workers.run(missing(seed), done)
        if not crew.alone:
            workers.run([given for seed in seeds for given in missing(seed)], done)
    if failed:
        raise FeatherweightError(
            f"{len(failed)} of {len(cells)} cells failed, the others are kept: {'; '.join(failed[:3])}"
        )
    return [rows[place] for place in range(len(cells))]


def _cells(contenders: Sequence[Contender], budgets: Sequence[str], seed: int, folder: Path) -> Iterator[Cell]:
    for contender in contenders:
        for budget in budgets if contender.scales else [_ONCE]:
            yield Cell(contender, budget, seed, folder)


def _describe(ground: Ground, folder: Path) -> None:
    """Describe the original of a seed in the folder once.

    Raises:
        ArtifactError: the folder's cells are of another original.
    """
    path = _original(folder, ground.seed)
    described = {"digest": digest(ground.model).hex(), "splits": _splits(ground)}
    if path.exists():
        stored = json.loads(path.read_text())
        if any(stored[name] != value for name, value in described.items()):
            raise ArtifactError(
                f"{folder} compares another model or other data (seed {ground.seed}): give another folder"
            )
        return
    np.save(path.with_suffix(".npy"), ground.answers.score.samples.float().numpy())
    described["machine"] = measuring.machine()
    path.write_text(json.dumps({**ground.describe(), **described}, indent=1) + "\n")


def _elsewhere(folder: Path, seed: int) -> bool:
    """Whether the original of a seed was measured on a CPU of another kind, where training comes to other weights."""
    path, here = _original(folder, seed), measuring.machine()
    if not path.exists():
        return False
    there = json.loads(path.read_text()).get("machine", here)
    return any(there[name] != here[name] for name in ("cpu", "features"))


def _machines(originals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the machines of all seeds are: one value where they agree, else each."""
    told: dict[str, list[Any]] = {}
    for original in originals:
        for name, value in original["machine"].items():
            if value not in told.setdefault(name, []):
                told[name].append(value)
    return {name: values[0] if len(values) == 1 else [str(value) for value in values] for name, values in told.items()}


def _original(folder: Path, seed: int) -> Path:
    return folder / "cells" / f"original-{seed}.json"


def _samples(folder: Path, seed: int) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(_original(folder, seed).with_suffix(".npy"), allow_pickle=False))


def _splits(ground: Ground) -> dict[str, int]:
    """Samples of each split, those of training counted in batches where its length is known."""
    found = {}
    for split in ("train", "calibrate", "validate", "test"):
        loader = getattr(ground.data, split)
        if loader is not None:
            found[split] = sum(samples(inputs) for inputs, _ in batches(loader, split))
    return found


def _rules(rules: Rules) -> dict[str, Any]:
    return {
        "task": rules.task,
        "epochs": rules.epochs,
        "tries": rules.tries,
        "device": rules.device,
        "watts": rules.watts,
    }


def _open(folder: Path, rules: Rules) -> None:
    """Make the folder, or check that it holds a comparison by the same rules.

    Raises:
        ArtifactError: it does not, or cannot be written.
    """
    path = folder / "cells" / "rules.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(_rules(rules), indent=1) + "\n")
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used: {error}") from error
    for name, value in _rules(rules).items():
        if stored.get(name) != value:
            raise ArtifactError(
                f"{folder} holds a comparison with {name}={stored.get(name)!r}, not {value!r}: give another folder"
            )


def _provenance() -> dict[str, Any]:
    """Versions of what computes, and the commit that this package was checked out at."""
    found: dict[str, Any] = {"versions": {name: version(name) for name in _VERSIONS}}
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return found | {"commit": git.stdout.strip() if git.returncode == 0 else "not from a checkout"}


def _budgets(budgets: str | Sequence[str]) -> list[str]:
    asked = [part.strip() for part in budgets.split(",")] if isinstance(budgets, str) else list(budgets)
    for budget in asked:
        Budget.parse(f"size<={budget}")
    return list(dict.fromkeys(asked))


__all__ = ["BASELINES", "CONTENDERS", "Comparison", "Contender", "compare"]
