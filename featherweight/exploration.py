"""`explore`: the whole story of a search over recipes, from a task and a budget to a folder with the front and the best."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.artifact import Artifact
from featherweight.budget import Budget
from featherweight.data import Task
from featherweight.errors import RecipeError
from featherweight.journal import Journal, read_rows
from featherweight.pipeline import compress
from featherweight.preflight import find_device
from featherweight.recipe_files import recipe_from_json, recipe_to_yaml
from featherweight.spaces import DefaultSpace, Space, families
from featherweight.study import Plan, Standing, Study, stand
from featherweight.tasks import find_task
from featherweight.technique import Recipe
from featherweight.techniques import together
from featherweight.trials import Bench, without
from featherweight.workers.hiring import THIS_PROCESS, Crew

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Search:
    """How a search is carried out.

    Attributes:
        trials: recipes to draw.
        sampler: see `Plan`.
        seed: of every draw, and of the training of each trial.
        generation: trials drawn before any of their results is told.
        rungs: shares of the training that a generation goes through.
        epochs: of one heal at full length, in the default space.
        crew: who carries trials out.
        device: where trials train.
    """

    trials: int = 24
    sampler: str = "nsga2"
    seed: int = 0
    generation: int = 8
    rungs: tuple[float, ...] = (0.2, 1.0)
    epochs: int = 10
    crew: Crew = THIS_PROCESS
    device: str = "cpu"


def explore(
    task: Task | str,
    budget: Budget | str,
    out: str | Path,
    settings: Search | None = None,
    *,
    space: Space | None = None,
    space_name: str = "default",
    resume: bool = False,
    watch: Callable[[Standing], None] = lambda standing: None,
    progress: Callable[[str, float], None] = lambda message, done: None,
) -> tuple[Standing, Artifact | None]:
    """Search over recipes for a budget, and leave in a folder the journal, the front, and the best recipe and its file.

    The folder gets `journal.jsonl`, `front.json`, `best.yaml` and, unless nothing worked, `model.fw`. Only validation data
    decides; test data is read once, for the verdict on `model.fw`.

    Args:
        task: the task, or its name. Workers other than this process open a user's own by its name, and get a built-in one sent.
        budget: limits such as `"size<=10%, drop<=1pt"`.
        out: the folder.
        settings: how; the defaults of `Search` when missing.
        space: draws recipes from an Optuna trial; the default space of the families that apply to the model when missing.
        space_name: what the space is called in the journal: a resumed search must use the same.
        resume: go on with the search in the folder.
        watch: called after each result.
        progress: called with a message and the share done.

    Returns:
        how the search stands, and the artifact of the best recipe, or None when no recipe worked.

    Raises:
        RecipeError: there is a search already and `resume` is False, or none and it is True, or it was another search.
        BudgetError, DataError, ExportError, ArtifactError: see there; the message says what would work.
    """
    how, folder = settings if settings is not None else Search(), Path(out)
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    together.refuse("search", "its workers= trains several trials at once")
    find_device(how.device)
    found_before = (folder / JOURNAL).exists()
    if resume != found_before:
        raise RecipeError(
            f"{folder} has a search already: add --resume to go on with it, or choose another folder"
            if found_before
            else f"there is no search to resume in {folder}"
        )
    with Journal(folder / JOURNAL) as journal:
        progress("opening the task and measuring the original", 0.0)
        found = find_task(task) if isinstance(task, str) else task
        limited = [limit.metric for limit in wanted.limits]
        measured = [metric for metric in limited if metric in ("latency", "memory")]
        original = stand(journal.rows).plan.original if journal.rows else None  # milliseconds are not the same again
        open_bench = functools.partial(
            Bench, metrics=tuple(measured), seed=how.seed, device=how.device, workspace=folder / "checkpoints"
        )
        bench = open_bench(found, original=original)
        if space is None:
            progress("finding out which families apply to the model", 0.0)
            space = DefaultSpace(families(bench.model, bench.data), how.epochs, "latency" in limited)
            space_name = f"default, {how.epochs} epochs"
        plan = Plan(
            budget=wanted,
            original=bench.original,
            goals=_goals(limited),
            sampler=how.sampler,
            seed=how.seed,
            trials=how.trials,
            generation=how.generation,
            rungs=how.rungs,
            about=f"{task if isinstance(task, str) else found.name}; space {space_name}; {how.device}",
        )
        study = Study(space, plan, journal)
        sent = task if isinstance(task, str) and ":" in task else found
        near = functools.partial(open_bench, sent, original=bench.original)
        far = functools.partial(near, workspace=None)
        with how.crew.hired(bench, near, far, folder) as workers:
            standing = study.run(workers, watch)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "front.json").write_text(json.dumps(standing.front, indent=1) + "\n")
    if standing.best is None:
        return standing, None
    return standing, _delivered(standing.best, found, wanted, how, folder, progress)


def _delivered(
    best: dict[str, Any],
    task: Task,
    wanted: Budget,
    how: Search,
    folder: Path,
    progress: Callable[[str, float], None],
) -> Artifact:
    """Write the best recipe and its file."""
    recipe = best_recipe(best)
    (folder / "best.yaml").write_text(recipe_to_yaml(recipe))
    progress("the best recipe, to the file", 0.0)
    return compress(
        task.model,
        task.data,
        wanted,
        recipe,
        seed=how.seed,
        device=how.device,
        out=folder / "model.fw",
        name=task.name,
        command=f"featherweight search, trial {best['trial']}",
        progress=progress,
    )


def status(out: str | Path) -> Standing:
    """Return how the search in a folder stands, while it runs or after.

    Raises:
        ArtifactError: there is no readable journal.
        RecipeError: the journal is of no search.
    """
    return stand(read_rows(Path(out) / JOURNAL)[0])


def best_recipe(row: dict[str, Any]) -> Recipe:
    """Return the recipe of a row of the journal, without the steps that found nothing to do."""
    return without(recipe_from_json(row["recipe"]), row.get("idle", ()))


def _goals(limited: list[str]) -> tuple[str, ...]:
    """What is made small: costs first where the drop has a limit, else the drop first."""
    costs = [metric for metric in limited if metric != "drop"] or ["size"]
    return (*costs, "drop") if "drop" in limited else ("drop", *costs)
