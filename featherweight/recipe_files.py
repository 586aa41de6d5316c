"""Recipes as text: YAML and JSON in and out, with errors that name the step, the value and what would work."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from featherweight.errors import RecipeError, closest
from featherweight.scoping import Only
from featherweight.technique import Recipe, Technique, name_of
from featherweight.techniques import TECHNIQUES


def known_techniques() -> dict[str, type[Technique]]:
    """Return every technique by name: ours, and those that installed packages add as `featherweight.techniques`."""
    found = {name_of(technique): technique for technique in TECHNIQUES}
    for point in entry_points(group="featherweight.techniques"):
        technique = point.load()
        if name_of(technique) in found:
            raise RecipeError(f"the package of {point.value} brings a second technique named {name_of(technique)!r}")
        found[name_of(technique)] = technique
    return found


def recipe_from_json(value: Any) -> Recipe:
    """Return the recipe that `Recipe.to_json` described: a mapping with `steps`, or a bare list of steps.

    Raises:
        RecipeError: a name is unknown, a setting is out of range, or the order goes back a stage.
    """
    if isinstance(value, list):
        value = {"steps": value}
    if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
        raise RecipeError(f"a recipe is a list of steps, or a mapping with 'steps', not {value!r:.120}")
    unknown = {str(key) for key in value} - {"steps", "any_order", "name", "about"}
    if unknown:
        raise RecipeError(
            f"a recipe has no key {sorted(unknown)[0]!r}.{closest(sorted(unknown)[0], ('steps', 'any_order', 'name', 'about'))}"
        )
    any_order = value.get("any_order", False)
    if not isinstance(any_order, bool):
        raise RecipeError(f"any_order={any_order!r} must be true or false")
    return Recipe(tuple(_step(row, index) for index, row in enumerate(value["steps"], 1)), any_order)


def _step(row: Any, index: int) -> Technique:
    where = f"step {index}"
    if isinstance(row, str):
        row = {row: {}}
    if isinstance(row, dict) and isinstance(row.get("steps"), list):
        return recipe_from_json(row)
    if not isinstance(row, dict) or len(row) != 1:
        raise RecipeError(f"{where}: {row!r:.120} is not a step: write a name, or 'name: {{setting: value}}'")
    name, settings = next(iter(row.items()))
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise RecipeError(f"{where}: the settings of {name!r} are {settings!r:.80}, not a mapping of names to values")
    if name == "only":
        if set(settings) != {"patterns", "step"} or not isinstance(settings["patterns"], list | str):
            raise RecipeError(f"{where}: only takes 'patterns' (a list) and 'step', not {sorted(settings)}")
        patterns = settings["patterns"]
        return Only(
            tuple([patterns] if isinstance(patterns, str) else map(str, patterns)), _step(settings["step"], index)
        )
    known = known_techniques()
    if name not in known:
        raise RecipeError(f"{where}: unknown technique {name!r}.{closest(str(name), [*known, 'only'])}")
    fields = [f.name for f in dataclasses.fields(known[name])]
    for key in settings:
        if key not in fields:
            raise RecipeError(f"{where}: {name} has no setting {key!r}.{closest(str(key), fields)}")
    try:
        return known[name](**settings)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, readable and complete."""
    return yaml.safe_dump(recipe.to_json(), sort_keys=False)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML or JSON file.

    Raises:
        RecipeError: the file cannot be read or parsed, or is not a recipe; it names the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from error
    try:
        return recipe_from_json(value)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: its steps contain each other without end") from error


def describe_techniques() -> list[dict[str, Any]]:
    """Return one row a technique: name, stage, what it does in a sentence, and its settings with defaults and ranges."""
    rows = []
    for name, technique in known_techniques().items():
        settings = []
        for f in dataclasses.fields(technique):
            choices = f.metadata["choices"]
            reach = "|".join(map(str, choices)) if choices else f"{f.metadata['low']:g}..{f.metadata['high']:g}"
            settings.append(f"{f.name}={f.default}" + ("" if isinstance(f.default, bool) else f" ({reach})"))
        stage = technique.stage.name.lower() if technique.stage is not None else "any"
        about = (technique.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "stage": stage, "about": about, "settings": ", ".join(settings)})
    return rows
